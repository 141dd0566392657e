// Tokenwise, an op of this library's own: ONNX Runtime's nodes between our ops, which
// kimi_deploy/runtime/ort_tokenwise.py puts together when a session is opened. No export has it.
#pragma once

#include "ort_abi.h"

namespace kimi::ort {

inline constexpr const char* kTokenwiseName = "Tokenwise";
// Of the attribute `program`, below; the same is in ort_tokenwise.py.
inline constexpr const char* kTokenwiseAbi = "1";

// The op's callbacks, for as many threads at most. `program` has a line for each value, which later ones name by its
// number, and one for each output in turn; ports are inputs of the node, and all but those of `input` are constants:
//   input PORT COLUMNS | add A B | norm A PORT EPSILON | part A BEGIN COLUMNS | join A B | swiglu A B
//   product A COLUMNS BITS BLOCK_SIZE INT8_ACTIVATIONS ZERO_POINTS PORT | output A
const CustomOp& tokenwise_op(int32_t threads);

}  // namespace kimi::ort
