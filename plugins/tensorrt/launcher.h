// What an op adds to the generic plugin: how one invocation becomes calls of the kernels' C ABI.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../kernels/kimi_kernels.h"
#include "fields.h"
#include "op_spec.h"

namespace kimi {

// One invocation: shapes that agree with the op, and, unless only sizes are asked for, memory.
struct Invocation {
  const std::vector<FieldValue>* fields;
  int64_t symbols[kMaxSymbols];   // by index of the op's symbols; -1 where no input gives a value
  bool present[kMaxPorts];        // of the inputs
  KimiDataType type;              // of T ports
  KimiDataType state_type;        // of S ports
  const void* inputs[kMaxPorts];  // null where absent
  void* outputs[kMaxPorts];
  void* workspace;
  size_t workspace_size;  // bytes
  void* stream;

  int32_t integer(int field) const { return (*fields)[static_cast<size_t>(field)].integer; }
  float real(int field) const { return (*fields)[static_cast<size_t>(field)].real; }
  int32_t size(int symbol) const { return static_cast<int32_t>(symbols[symbol]); }
};

struct Launcher {
  const OpSpec* spec;

  // Bytes of workspace of an invocation; KIMI_OK, or why the kernels do not take its sizes or types (kimi_last_error).
  // Pointers are not looked at. Grows with every size.
  // Throws Refusal for what the kernels' C ABI cannot even say.
  int32_t (*workspace)(const Invocation&, size_t* bytes);

  // Launches on the invocation's stream. No allocation, no synchronisation.
  int32_t (*enqueue)(const Invocation&);
};

const Launcher& kda_launcher();
const Launcher& moe_launcher();
const Launcher& linear_attention_launcher();
const Launcher& causal_conv_launcher();

}  // namespace kimi
