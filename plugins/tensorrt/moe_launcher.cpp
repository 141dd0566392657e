#include "../generated/kimi_ops.h"
#include "../kernels/kimi_moe.h"
#include "launcher.h"
#include "report.h"

namespace kimi {

namespace {

using namespace mixture_of_experts;

KimiMoeArguments arguments_of(const Invocation& call) {
  const int64_t tokens = call.symbols[kSymbolBatch] * call.symbols[kSymbolSequence];
  if (tokens > INT32_MAX) throw Refusal("hidden_states has more than 2^31 - 1 tokens; seen: " + std::to_string(tokens));
  KimiMoeArguments a = {};
  a.struct_size = sizeof(a);
  a.data_type = call.type;
  a.tokens = static_cast<int32_t>(tokens);
  a.hidden = call.size(kSymbolHidden);
  a.num_experts = call.size(kSymbolNumExperts);
  a.intermediate = call.size(kSymbolIntermediate);
  a.top_k = call.size(kSymbolTopK);
  a.n_group = call.size(kSymbolNGroup);
  a.topk_group = call.size(kSymbolTopkGroup);
  a.renormalize = call.size(kSymbolRenormalize);
  a.routed_scaling_factor = call.real(kFieldRoutedScalingFactor);
  a.hidden_states = call.inputs[kInputHiddenStates];
  a.router_weight = call.inputs[kInputRouterWeight];
  a.router_bias = static_cast<const float*>(call.inputs[kInputRouterBias]);
  a.gate_up_weight = call.inputs[kInputGateUpWeight];
  a.down_weight = call.inputs[kInputDownWeight];
  a.output = call.outputs[kOutputOutput];
  a.workspace = call.workspace;
  a.workspace_size = call.workspace_size;
  a.stream = call.stream;
  return a;
}

int32_t workspace(const Invocation& call, size_t* bytes) {
  const KimiMoeArguments a = arguments_of(call);
  return kimi_moe_workspace(&a, bytes);
}

int32_t enqueue(const Invocation& call) {
  const KimiMoeArguments a = arguments_of(call);
  return kimi_moe(&a);
}

constexpr Launcher kLauncher = {&kSpec, workspace, enqueue};

}  // namespace

const Launcher& moe_launcher() { return kLauncher; }

}  // namespace kimi
