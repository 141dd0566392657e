#include "standard_check.h"

#include <cmath>

#include "refusal.h"

namespace kimi {

namespace {

constexpr int kMaxHeads = 4096;
constexpr int kMaxKeyDim = 512;
constexpr int kMaxWidth = 1024;
constexpr int64_t kMaxQueryFloats = 80 * 1024 / sizeof(float);  // of one step, in the shared memory of every GPU

}  // namespace

int queries_of_state(const KimiLinearAttentionArguments& a) {
  return a.q_num_heads > a.kv_num_heads ? a.q_num_heads / a.kv_num_heads : 1;
}

int rows_for(int key_dim) {
  int rows = 64;
  while (rows < key_dim) rows *= 2;
  return rows;
}

KimiStatus check_sizes(const KimiLinearAttentionArguments* arguments, std::string& message) {
  if (arguments == nullptr) return refuse(KIMI_ERROR_ARGUMENT, message, "arguments is null");
  const KimiLinearAttentionArguments& a = *arguments;
  KimiStatus status = check_struct(a.struct_size, sizeof a, message);
  if (status == KIMI_OK) status = check_type("data_type", a.data_type, message);
  if (status == KIMI_OK) status = check_type("state_type", a.state_type, message);
  if (status != KIMI_OK) return status;
  if (a.update_rule < KIMI_RULE_LINEAR || a.update_rule > KIMI_RULE_GATED_DELTA) {
    return refuse(
        KIMI_ERROR_ARGUMENT, message,
        "update_rule is " + number(a.update_rule) + "; expected 0 (linear), 1 (gated), 2 (delta) or 3 (gated_delta)");
  }
  if (a.batch < 1 || a.sequence < 0 || a.value_dim < 1) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  "batch " + number(a.batch) + ", sequence " + number(a.sequence) + ", value_dim " +
                      number(a.value_dim) + "; expected at least 1, 0 and 1");
  }
  if (a.key_dim < 1 || a.key_dim > kMaxKeyDim) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  "key_dim is " + number(a.key_dim) + "; the kernels are built for 1 to " + number(kMaxKeyDim));
  }
  if (a.kv_num_heads < 1 || a.q_num_heads < 1 ||
      !(divides(a.kv_num_heads, a.q_num_heads) || divides(a.q_num_heads, a.kv_num_heads)) ||
      !divides(a.key_num_heads, a.kv_num_heads)) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  "q_num_heads is " + number(a.q_num_heads) + ", kv_num_heads " + number(a.kv_num_heads) +
                      ", key_num_heads " + number(a.key_num_heads) +
                      "; q_num_heads must be a multiple or a divisor of kv_num_heads, key_num_heads a divisor");
  }
  if (a.q_num_heads > kMaxHeads || a.kv_num_heads > kMaxHeads) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  "q_num_heads is " + number(a.q_num_heads) + ", kv_num_heads " + number(a.kv_num_heads) +
                      "; at most " + number(kMaxHeads));
  }
  if (a.decay_per_key != 0 && a.decay_per_key != 1) {
    return refuse(KIMI_ERROR_ARGUMENT, message,
                  "decay_per_key is " + number(a.decay_per_key) + "; expected 0 (per head) or 1 (per key channel)");
  }
  const bool has_beta = a.update_rule == KIMI_RULE_DELTA || a.update_rule == KIMI_RULE_GATED_DELTA;
  if (has_beta && a.beta_num_heads != 1 && a.beta_num_heads != a.kv_num_heads) {
    return refuse(
        KIMI_ERROR_SHAPE, message,
        "beta_num_heads is " + number(a.beta_num_heads) + "; expected 1 or kv_num_heads, " + number(a.kv_num_heads));
  }
  if (!std::isfinite(a.scale)) {
    return refuse(KIMI_ERROR_ARGUMENT, message, "scale is " + std::to_string(a.scale) + "; it must be finite");
  }
  const int64_t queries = queries_of_state(a);
  if ((queries + 2) * rows_for(a.key_dim) > kMaxQueryFloats) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  number(queries) + " query heads of " + number(a.key_dim) +
                      " read one state; the kernels take at most " + number(kMaxQueryFloats / rows_for(a.key_dim) - 2));
  }
  // a block has at least four value columns of one state
  const int64_t column_blocks = (static_cast<int64_t>(a.value_dim) + 3) / 4;
  const int64_t states = static_cast<int64_t>(a.batch) * a.kv_num_heads;
  if (states > kMaxBlocks || states * column_blocks > kMaxBlocks || a.value_dim > kMaxBlocks - 1024) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  "batch " + number(a.batch) + " of " + number(a.kv_num_heads) + " heads with " + number(a.value_dim) +
                      " values is more than one grid holds");
  }
  return KIMI_OK;
}

KimiStatus check(const KimiLinearAttentionArguments* arguments, std::string& message) {
  const KimiStatus status = check_sizes(arguments, message);
  if (status != KIMI_OK) return status;
  const KimiLinearAttentionArguments& a = *arguments;
  const bool empty = a.sequence == 0;
  const bool takes_decay = a.update_rule == KIMI_RULE_GATED || a.update_rule == KIMI_RULE_GATED_DELTA;
  const bool takes_beta = a.update_rule == KIMI_RULE_DELTA || a.update_rule == KIMI_RULE_GATED_DELTA;
  if (a.decay != nullptr && !takes_decay) {
    return refuse(KIMI_ERROR_ARGUMENT, message, "decay is given, but the rules linear and delta take none");
  }
  if (a.beta != nullptr && !takes_beta) {
    return refuse(KIMI_ERROR_ARGUMENT, message, "beta is given, but the rules linear and gated take none");
  }
  const Pointer pointers[] = {
      {"query", a.query, empty},
      {"key", a.key, empty},
      {"value", a.value, empty},
      {"past_state", a.past_state, true},
      {"decay", a.decay, empty || !takes_decay},
      {"beta", a.beta, empty || !takes_beta},
      {"output", a.output, empty},
      {"present_state", a.present_state, false},
      {"workspace", a.workspace, true},
  };
  return check_pointers(pointers, message);
}

KimiStatus check(const KimiCausalConvArguments* arguments, std::string& message) {
  if (arguments == nullptr) return refuse(KIMI_ERROR_ARGUMENT, message, "arguments is null");
  const KimiCausalConvArguments& a = *arguments;
  KimiStatus status = check_struct(a.struct_size, sizeof a, message);
  if (status == KIMI_OK) status = check_type("data_type", a.data_type, message);
  if (status != KIMI_OK) return status;
  if (a.activation != KIMI_ACTIVATION_NONE && a.activation != KIMI_ACTIVATION_SILU) {
    return refuse(KIMI_ERROR_ARGUMENT, message,
                  "activation is " + number(a.activation) + "; expected 0 (none) or 1 (silu)");
  }
  if (a.batch < 1 || a.channels < 1 || a.sequence < 0) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  "batch " + number(a.batch) + ", channels " + number(a.channels) + ", sequence " + number(a.sequence) +
                      "; expected at least 1, 1 and 0");
  }
  if (a.width < 1 || a.width > kMaxWidth) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  "width is " + number(a.width) + "; the kernels take 1 to " + number(kMaxWidth));
  }
  if (static_cast<int64_t>(a.batch) * a.channels > kMaxBlocks || a.sequence > kMaxBlocks - 1024) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  "batch " + number(a.batch) + " of " + number(a.channels) + " channels and " + number(a.sequence) +
                      " steps is more than one grid holds");
  }
  const bool empty = a.sequence == 0;
  const Pointer pointers[] = {
      {"input", a.input, empty},          {"weight", a.weight, false}, {"bias", a.bias, true},
      {"past_state", a.past_state, true}, {"output", a.output, empty}, {"present_state", a.present_state, a.width == 1},
  };
  return check_pointers(pointers, message);
}

}  // namespace kimi
