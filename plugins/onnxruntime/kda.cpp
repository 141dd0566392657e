#include "../generated/kimi_ort_ops.h"
#include "op.h"

namespace kimi::ort {
namespace {

using namespace kimi_delta_attention;

cpu::KdaArguments arguments_of(const Call& call) {
  cpu::KdaArguments a = {};
  a.batch = call.sizes[kSymbolBatch];
  a.sequence = call.sizes[kSymbolSequence];
  a.num_heads = call.sizes[kSymbolNumHeads];
  a.head_dim = call.sizes[kSymbolHeadDim];
  a.conv_width = call.sizes[kSymbolConvWidth];
  a.norm_eps = call.fields[kFieldNormEps].real;
  a.scale = call.fields[kFieldScale].real;
  a.bounded_gate = call.fields[kFieldGate].integer == static_cast<int64_t>(Gate::kBounded);
  a.gate_lower_bound = call.fields[kFieldGateLowerBound].real;
  a.qkv = call.input<float>(kInputQkv);
  a.decay = call.input<float>(kInputDecay);
  a.beta = call.input<float>(kInputBeta);
  a.output_gate = call.input<float>(kInputOutputGate);
  a.conv_weight = call.input<float>(kInputConvWeight);
  a.A_log = call.input<float>(kInputALog);
  a.dt_bias = call.input<float>(kInputDtBias);
  a.norm_weight = call.input<float>(kInputNormWeight);
  a.past_conv_state = call.input<float>(kInputPastConvState);
  a.past_recurrent_state = call.input<float>(kInputPastRecurrentState);
  a.sequence_lengths = call.input<int32_t>(kInputSequenceLengths);
  a.output = call.output(kOutputOutput);
  a.present_conv_state = call.output(kOutputPresentConvState);
  a.present_recurrent_state = call.output(kOutputPresentRecurrentState);
  a.workspace = call.workspace;
  return a;
}

}  // namespace

const Launcher& kda_launcher() {
  static constexpr Launcher launcher = {
      &kSpec,
      [](const Call& call) { return cpu::kda_workspace(arguments_of(call), call.parallel); },
      [](const Call& call) { return cpu::kda(arguments_of(call), call.parallel); },
  };
  return launcher;
}

}  // namespace kimi::ort
