// Refusing what the kernels of the standard's operators cannot run, before anything is launched.
#pragma once

#include <string>

#include "kda_check.h"
#include "kimi_causal_conv.h"
#include "kimi_linear_attention.h"

namespace kimi {

// KIMI_OK, or the code of the first thing wrong, which `message` then describes.
KimiStatus check(const KimiLinearAttentionArguments* arguments, std::string& message);
KimiStatus check(const KimiCausalConvArguments* arguments, std::string& message);

// As `check`, without the pointers.
KimiStatus check_sizes(const KimiLinearAttentionArguments* arguments, std::string& message);

// Query heads that read one state.
int queries_of_state(const KimiLinearAttentionArguments& arguments);

// Rows of a warp for this key size: 64, 128, 256 or 512.
int rows_for(int key_dim);

}  // namespace kimi
