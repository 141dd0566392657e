#include "../generated/kimi_ops.h"
#include "../kernels/kimi_linear_attention.h"
#include "launcher.h"
#include "report.h"

namespace kimi {

namespace {

using namespace linear_attention;

// The generated choices are in the order of the kernels' codes.
static_assert(static_cast<int>(UpdateRule::kLinear) == KIMI_RULE_LINEAR &&
              static_cast<int>(UpdateRule::kGated) == KIMI_RULE_GATED &&
              static_cast<int>(UpdateRule::kDelta) == KIMI_RULE_DELTA &&
              static_cast<int>(UpdateRule::kGatedDelta) == KIMI_RULE_GATED_DELTA);

int32_t quotient(const char* what, int32_t size, int32_t parts) {
  if (parts < 1 || size % parts != 0 || size == 0) {
    throw Refusal(std::string(what) + " does not divide into heads; seen: " + std::to_string(size) + " values, " +
                  std::to_string(parts) + " parts");
  }
  return size / parts;
}

// What the sizes say of a tensor that a rule needs or must not have.
void check_presence(const char* name, bool present, bool needed, const Invocation& call) {
  if (present != needed) {
    throw Refusal("update_rule " + (*call.fields)[kFieldUpdateRule].text + (needed ? " needs " : " takes no ") + name +
                  "; fix: rewrite the graph with kimi_deploy.engine.standard_nodes");
  }
}

KimiLinearAttentionArguments arguments_of(const Invocation& call) {
  KimiLinearAttentionArguments a = {};
  a.struct_size = sizeof(a);
  a.data_type = call.type;
  a.state_type = call.state_type;
  a.update_rule = call.integer(kFieldUpdateRule);
  a.batch = call.size(kSymbolBatch);
  a.sequence = call.size(kSymbolSequence);
  a.q_num_heads = call.size(kSymbolQNumHeads);
  a.kv_num_heads = call.size(kSymbolKvNumHeads);
  a.key_dim = quotient("query", call.size(kSymbolQuerySize), a.q_num_heads);
  a.key_num_heads = quotient("key", call.size(kSymbolKeySize), a.key_dim);
  a.value_dim = quotient("value", call.size(kSymbolValueSize), a.kv_num_heads);
  const bool gated = a.update_rule == KIMI_RULE_GATED || a.update_rule == KIMI_RULE_GATED_DELTA;
  const bool delta = a.update_rule == KIMI_RULE_DELTA || a.update_rule == KIMI_RULE_GATED_DELTA;
  check_presence("decay", call.present[kInputDecay], gated, call);
  check_presence("beta", call.present[kInputBeta], delta, call);
  const int32_t decay_size = call.size(kSymbolDecaySize), beta_size = call.size(kSymbolBetaSize);
  a.decay_per_key = gated && decay_size != a.kv_num_heads ? 1 : 0;
  if (a.decay_per_key == 1 && decay_size != a.kv_num_heads * a.key_dim) {
    throw Refusal("input decay has the wrong size on axis 2; seen: " + std::to_string(decay_size) + "; expected: " +
                  std::to_string(a.kv_num_heads) + " or " + std::to_string(a.kv_num_heads * a.key_dim));
  }
  a.beta_num_heads = delta && beta_size == 1 ? 1 : a.kv_num_heads;
  if (delta && beta_size != a.beta_num_heads) {
    throw Refusal("input beta has the wrong size on axis 2; seen: " + std::to_string(beta_size) + "; expected: 1 or " +
                  std::to_string(a.kv_num_heads));
  }
  a.scale = call.real(kFieldScale);
  a.query = call.inputs[kInputQuery];
  a.key = call.inputs[kInputKey];
  a.value = call.inputs[kInputValue];
  a.past_state = call.inputs[kInputPastState];
  a.decay = call.inputs[kInputDecay];
  a.beta = call.inputs[kInputBeta];
  a.output = call.outputs[kOutputOutput];
  a.present_state = call.outputs[kOutputPresentState];
  a.workspace = call.workspace;
  a.workspace_size = call.workspace_size;
  a.stream = call.stream;
  return a;
}

int32_t workspace(const Invocation& call, size_t* bytes) {
  const KimiLinearAttentionArguments a = arguments_of(call);
  return kimi_linear_attention_workspace(&a, bytes);
}

int32_t enqueue(const Invocation& call) {
  const KimiLinearAttentionArguments a = arguments_of(call);
  return kimi_linear_attention(&a);
}

constexpr Launcher kLauncher = {&kSpec, workspace, enqueue};

}  // namespace

const Launcher& linear_attention_launcher() { return kLauncher; }

}  // namespace kimi
