// MixtureOfExperts and QuantizedMixtureOfExperts, one kernel in two formats of weights.
#include "../generated/kimi_ort_ops.h"
#include "op.h"

namespace kimi::ort {
namespace {

namespace plain = mixture_of_experts;
namespace quantized = quantized_mixture_of_experts;

// Their routers are the same ports and attributes.
static_assert(int{plain::kInputHiddenStates} == quantized::kInputHiddenStates &&
              int{plain::kInputRouterWeight} == quantized::kInputRouterWeight &&
              int{plain::kInputRouterBias} == quantized::kInputRouterBias);
static_assert(int{plain::kFieldTopK} == quantized::kFieldTopK && int{plain::kFieldNGroup} == quantized::kFieldNGroup &&
              int{plain::kFieldTopkGroup} == quantized::kFieldTopkGroup &&
              int{plain::kFieldRenormalize} == quantized::kFieldRenormalize &&
              int{plain::kFieldRoutedScalingFactor} == quantized::kFieldRoutedScalingFactor &&
              int{plain::kFieldNumExperts} == quantized::kFieldNumExperts &&
              int{plain::kFieldIntermediate} == quantized::kFieldIntermediate);

cpu::MixtureOfExpertsArguments routed(const Call& call, int64_t tokens, int64_t hidden) {
  cpu::MixtureOfExpertsArguments a = {};
  a.tokens = tokens;
  a.hidden = hidden;
  a.num_experts = call.fields[plain::kFieldNumExperts].integer;
  a.intermediate = call.fields[plain::kFieldIntermediate].integer;
  a.top_k = call.fields[plain::kFieldTopK].integer;
  a.n_group = call.fields[plain::kFieldNGroup].integer;
  a.topk_group = call.fields[plain::kFieldTopkGroup].integer;
  a.renormalize = call.fields[plain::kFieldRenormalize].integer != 0;
  a.routed_scaling_factor = call.fields[plain::kFieldRoutedScalingFactor].real;
  a.hidden_states = call.input<float>(plain::kInputHiddenStates);
  a.router_weight = call.input<float>(plain::kInputRouterWeight);
  a.router_bias = call.input<float>(plain::kInputRouterBias);
  a.output = call.output(plain::kOutputOutput);
  a.workspace = call.workspace;
  return a;
}

cpu::MixtureOfExpertsArguments plain_arguments(const Call& call) {
  cpu::MixtureOfExpertsArguments a = routed(call, call.sizes[plain::kSymbolBatch] * call.sizes[plain::kSymbolSequence],
                                            call.sizes[plain::kSymbolHidden]);
  a.bits = 32;
  a.gate_up = {call.input<float>(plain::kInputGateUpWeight), nullptr, nullptr};
  a.down = {call.input<float>(plain::kInputDownWeight), nullptr, nullptr};
  return a;
}

cpu::MixtureOfExpertsArguments quantized_arguments(const Call& call) {
  using namespace quantized;
  cpu::MixtureOfExpertsArguments a =
      routed(call, call.sizes[kSymbolBatch] * call.sizes[kSymbolSequence], call.sizes[kSymbolHidden]);
  a.bits = static_cast<int32_t>(call.fields[kFieldBits].integer);
  a.block_size = call.fields[kFieldBlockSize].integer;
  a.int8_activations = call.fields[kFieldActivations].integer == static_cast<int64_t>(Activations::kInt8);
  a.gate_up = {call.input<uint8_t>(kInputGateUpLevels), call.input<float>(kInputGateUpScales),
               call.input<uint8_t>(kInputGateUpZeroPoints)};
  a.down = {call.input<uint8_t>(kInputDownLevels), call.input<float>(kInputDownScales),
            call.input<uint8_t>(kInputDownZeroPoints)};
  return a;
}

// Attributes that no shape depends on, before they are computed with.
cpu::Status check(const cpu::MixtureOfExpertsArguments& a) {
  const auto refused = [](int64_t seen, int64_t bound) { return cpu::Status{cpu::Fault::kRouting, 0, seen, bound}; };
  if (a.num_experts < 1 || a.num_experts > cpu::kMaxExperts) return refused(a.num_experts, cpu::kMaxExperts);
  if (a.top_k < 1 || a.top_k > a.num_experts) return refused(a.top_k, a.num_experts);
  if (a.n_group < 1 || a.num_experts % a.n_group != 0) return refused(a.n_group, a.num_experts);
  if (a.topk_group < 1 || a.topk_group > a.n_group) return refused(a.topk_group, a.n_group);
  if (a.bits == 32) return {};
  const bool known = (a.bits == 4 || a.bits == 8) && (a.block_size == 32 || a.block_size == 64 || a.block_size == 128);
  if (!known || a.hidden % a.block_size != 0 || a.intermediate % a.block_size != 0) {
    return {cpu::Fault::kBlocks, 0, a.block_size, 128};
  }
  return {};
}

size_t workspace(const cpu::MixtureOfExpertsArguments& a, const Call& call) {
  return check(a).fault == cpu::Fault::kNone ? cpu::mixture_of_experts_workspace(a, call.parallel) : 0;
}

cpu::Status run(const cpu::MixtureOfExpertsArguments& a, const Call& call) {
  const cpu::Status checked = check(a);
  return checked.fault == cpu::Fault::kNone ? cpu::mixture_of_experts(a, call.parallel) : checked;
}

}  // namespace

const Launcher& mixture_of_experts_launcher() {
  static constexpr Launcher launcher = {
      &plain::kSpec,
      [](const Call& call) { return workspace(plain_arguments(call), call); },
      [](const Call& call) { return run(plain_arguments(call), call); },
  };
  return launcher;
}

const Launcher& quantized_mixture_of_experts_launcher() {
  static constexpr Launcher launcher = {
      &quantized::kSpec,
      [](const Call& call) { return workspace(quantized_arguments(call), call); },
      [](const Call& call) {
        const cpu::MixtureOfExpertsArguments a = quantized_arguments(call);
        const bool symmetric = call.fields[quantized::kFieldSymmetric].integer != 0;
        const int64_t given = (a.gate_up.zero_points != nullptr) + (a.down.zero_points != nullptr);
        if (given != (symmetric ? 0 : 2)) return cpu::Status{cpu::Fault::kZeroPoints, 0, given, symmetric ? 0 : 2};
        return run(a, call);
      },
  };
  return launcher;
}

}  // namespace kimi::ort
