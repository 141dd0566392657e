#include "../generated/kimi_ops.h"
#include "launcher.h"

namespace kimi {

namespace {

using namespace kimi_delta_attention;

KimiKdaArguments arguments_of(const Invocation& call) {
  KimiKdaArguments a = {};
  a.struct_size = sizeof(a);
  a.data_type = call.type;
  a.state_type = KIMI_FLOAT32;
  a.gate = static_cast<Gate>(call.integer(kFieldGate)) == Gate::kSoftplus ? KIMI_GATE_SOFTPLUS : KIMI_GATE_BOUNDED;
  a.batch = call.size(kSymbolBatch);
  a.sequence = call.size(kSymbolSequence);
  a.num_heads = call.size(kSymbolNumHeads);
  a.head_dim = call.size(kSymbolHeadDim);
  a.conv_width = call.size(kSymbolConvWidth);
  a.norm_eps = call.real(kFieldNormEps);
  a.scale = call.real(kFieldScale);
  a.gate_lower_bound = call.real(kFieldGateLowerBound);
  a.qkv = call.inputs[kInputQkv];
  a.decay = call.inputs[kInputDecay];
  a.beta = call.inputs[kInputBeta];
  a.output_gate = call.inputs[kInputOutputGate];
  a.conv_weight = call.inputs[kInputConvWeight];
  a.A_log = static_cast<const float*>(call.inputs[kInputALog]);
  a.dt_bias = static_cast<const float*>(call.inputs[kInputDtBias]);
  a.norm_weight = call.inputs[kInputNormWeight];
  a.past_conv_state = call.inputs[kInputPastConvState];
  a.past_recurrent_state = call.inputs[kInputPastRecurrentState];
  a.sequence_lengths = static_cast<const int32_t*>(call.inputs[kInputSequenceLengths]);
  a.output = call.outputs[kOutputOutput];
  a.present_conv_state = call.outputs[kOutputPresentConvState];
  a.present_recurrent_state = call.outputs[kOutputPresentRecurrentState];
  a.workspace = call.workspace;
  a.workspace_size = call.workspace_size;
  a.stream = call.stream;
  return a;
}

int32_t workspace(const Invocation& call, size_t* bytes) {
  const KimiKdaArguments a = arguments_of(call);
  return kimi_kda_workspace(&a, bytes);
}

int32_t enqueue(const Invocation& call) {
  const KimiKdaArguments a = arguments_of(call);
  return kimi_kda(&a);
}

constexpr Launcher kLauncher = {&kSpec, workspace, enqueue};

}  // namespace

const Launcher& kda_launcher() { return kLauncher; }

}  // namespace kimi
