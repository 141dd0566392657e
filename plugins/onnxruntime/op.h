// A custom op of ONNX Runtime is an OpSpec of the generated header and a launcher; the adapter in op.cpp does the rest.
#pragma once

#include "../cpu/kimi_cpu.h"
#include "../tensorrt/op_spec.h"
#include "ort_abi.h"

namespace kimi::ort {

inline constexpr int32_t kMaxFields = 16;

struct FieldValue {
  int64_t integer = 0;  // an integer, or the index of a string's choice
  float real = 0;
};

// One call of a kernel, checked against the OpSpec: sizes by symbol, attributes by field, tensors by port. An absent
// input is null.
struct Call {
  const int64_t* sizes;
  const FieldValue* fields;
  const void* const* inputs;
  void* const* outputs;
  cpu::Parallel parallel;
  void* workspace;

  template <class T>
  const T* input(int32_t port) const {
    return static_cast<const T*>(inputs[port]);
  }
  float* output(int32_t port) const { return static_cast<float*>(outputs[port]); }
};

struct Launcher {
  const OpSpec* spec;
  size_t (*workspace)(const Call& call);  // bytes
  cpu::Status (*run)(const Call& call);
};

const Launcher& kda_launcher();
const Launcher& latent_attention_launcher();
const Launcher& mixture_of_experts_launcher();
const Launcher& quantized_mixture_of_experts_launcher();

// A registered op. ONNX Runtime keeps the address of its first member and gives it back.
struct Op {
  CustomOp callbacks;
  const Launcher* launcher;
  int32_t threads;

  Op(const Launcher& launcher, int32_t threads);
};

}  // namespace kimi::ort
