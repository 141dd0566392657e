// Refusing what the kernels cannot run, before anything is launched.
#pragma once

#include <string>

#include "kimi_kernels.h"

namespace kimi {

// What a call does with its arguments; kSizes: it only has to find out which kernel takes them.
enum class Call { kSizes, kDecode, kPrefillWorkspace, kPrefill };

// KIMI_OK, or the code of the first thing wrong, which `message` then describes.
KimiStatus check(const KimiKdaArguments* arguments, Call call, std::string& message);

// Bytes of workspace of a prefill whose sizes passed `check`, and where its second part starts.
struct Workspace {
  size_t tiles;
  size_t raw_output;
  size_t total() const { return tiles + raw_output; }
};
Workspace prefill_workspace(const KimiKdaArguments& arguments);

// Keeps `message` for kimi_last_error and returns `status`.
KimiStatus finish(KimiStatus status, const std::string& message);

// Tiles of all sequences together, at most.
int64_t max_tiles(const KimiKdaArguments& arguments);

}  // namespace kimi
