#include "../generated/kimi_ops.h"
#include "../kernels/kimi_causal_conv.h"
#include "launcher.h"
#include "report.h"

namespace kimi {

namespace {

using namespace causal_conv_with_state;

KimiCausalConvArguments arguments_of(const Invocation& call) {
  KimiCausalConvArguments a = {};
  a.struct_size = sizeof(a);
  a.data_type = call.type;
  a.activation = static_cast<Activation>(call.integer(kFieldActivation)) == Activation::kNone ? KIMI_ACTIVATION_NONE
                                                                                              : KIMI_ACTIVATION_SILU;
  a.batch = call.size(kSymbolBatch);
  a.channels = call.size(kSymbolChannels);
  a.sequence = call.size(kSymbolLength);
  a.width = call.size(kSymbolKernelSize);
  a.input = call.inputs[kInputInput];
  a.weight = call.inputs[kInputWeight];
  a.bias = call.inputs[kInputBias];
  a.past_state = call.inputs[kInputPastState];
  a.output = call.outputs[kOutputOutput];
  a.present_state = call.outputs[kOutputPresentState];
  a.stream = call.stream;
  return a;
}

int32_t workspace(const Invocation& call, size_t* bytes) {
  if (call.integer(kFieldNdim) != 1) {
    throw Refusal("the convolution is over " + std::to_string(call.integer(kFieldNdim)) + " axes; expected: 1");
  }
  *bytes = 0;
  return KIMI_OK;
}

int32_t enqueue(const Invocation& call) {
  const KimiCausalConvArguments a = arguments_of(call);
  return kimi_causal_conv(&a);
}

constexpr Launcher kLauncher = {&kSpec, workspace, enqueue};

}  // namespace

const Launcher& causal_conv_launcher() { return kLauncher; }

}  // namespace kimi
