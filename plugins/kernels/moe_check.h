// Refusing what the kernels of MixtureOfExperts cannot run, before anything is launched; and how they share workspace.
#pragma once

#include <string>

#include "kda_check.h"
#include "kimi_moe.h"

namespace kimi {

// Tokens up to which each pair reads its expert by itself; beyond, pairs are sorted by expert. On an H100, a layer of
// the 48B model: 8 tokens take 314 us so, 1.4 times their experts' bytes; 16 sorted take 416, 1.2 times theirs (python
// -m kimi_deploy.bench.kernels.thresholds). Another bound was not tried.
constexpr int kMostFewTokens = 8;

// KIMI_OK, or the code of the first thing wrong, which `message` then describes. `sizes_only`: whatever the pointers.
KimiStatus check(const KimiMoeArguments* arguments, bool sizes_only, std::string& message);

// Byte offsets of the parts of a workspace for sizes that passed `check`, and the whole.
struct MoeWorkspace {
  size_t scores, chosen, weights, few_hidden, counts, sorted, tile_expert, tile_first, many_hidden, many_output, total;
};
MoeWorkspace moe_workspace(const KimiMoeArguments& arguments);

// Tiles that the pairs of all experts make, at most.
int64_t moe_tiles(const KimiMoeArguments& arguments);

}  // namespace kimi
