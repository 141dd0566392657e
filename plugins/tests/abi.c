/* Prints the layout of the argument structs, one "struct.field offset" per line: what a binding must agree with. */
#include <stdio.h>

#include "../kernels/kimi_causal_conv.h"
#include "../kernels/kimi_kernels.h"
#include "../kernels/kimi_linear_attention.h"
#include "../kernels/kimi_moe.h"

#define SIZE(type) printf(#type ".sizeof %zu\n", sizeof(type))
#define FIELD(type, name) printf(#type "." #name " %zu\n", offsetof(type, name))

int main(void) {
  printf("version %d\n", KIMI_ABI_VERSION);

  SIZE(KimiKdaArguments);
  FIELD(KimiKdaArguments, struct_size);
  FIELD(KimiKdaArguments, data_type);
  FIELD(KimiKdaArguments, state_type);
  FIELD(KimiKdaArguments, gate);
  FIELD(KimiKdaArguments, batch);
  FIELD(KimiKdaArguments, sequence);
  FIELD(KimiKdaArguments, num_heads);
  FIELD(KimiKdaArguments, head_dim);
  FIELD(KimiKdaArguments, conv_width);
  FIELD(KimiKdaArguments, num_slots);
  FIELD(KimiKdaArguments, norm_eps);
  FIELD(KimiKdaArguments, scale);
  FIELD(KimiKdaArguments, gate_lower_bound);
  FIELD(KimiKdaArguments, value_splits);
  FIELD(KimiKdaArguments, qkv);
  FIELD(KimiKdaArguments, decay);
  FIELD(KimiKdaArguments, beta);
  FIELD(KimiKdaArguments, output_gate);
  FIELD(KimiKdaArguments, conv_weight);
  FIELD(KimiKdaArguments, A_log);
  FIELD(KimiKdaArguments, dt_bias);
  FIELD(KimiKdaArguments, norm_weight);
  FIELD(KimiKdaArguments, past_conv_state);
  FIELD(KimiKdaArguments, past_recurrent_state);
  FIELD(KimiKdaArguments, sequence_lengths);
  FIELD(KimiKdaArguments, cu_seqlens);
  FIELD(KimiKdaArguments, slots);
  FIELD(KimiKdaArguments, output);
  FIELD(KimiKdaArguments, present_conv_state);
  FIELD(KimiKdaArguments, present_recurrent_state);
  FIELD(KimiKdaArguments, state_snapshots);
  FIELD(KimiKdaArguments, workspace);
  FIELD(KimiKdaArguments, workspace_size);
  FIELD(KimiKdaArguments, stream);

  SIZE(KimiLinearAttentionArguments);
  FIELD(KimiLinearAttentionArguments, struct_size);
  FIELD(KimiLinearAttentionArguments, data_type);
  FIELD(KimiLinearAttentionArguments, state_type);
  FIELD(KimiLinearAttentionArguments, update_rule);
  FIELD(KimiLinearAttentionArguments, batch);
  FIELD(KimiLinearAttentionArguments, sequence);
  FIELD(KimiLinearAttentionArguments, q_num_heads);
  FIELD(KimiLinearAttentionArguments, kv_num_heads);
  FIELD(KimiLinearAttentionArguments, key_num_heads);
  FIELD(KimiLinearAttentionArguments, key_dim);
  FIELD(KimiLinearAttentionArguments, value_dim);
  FIELD(KimiLinearAttentionArguments, decay_per_key);
  FIELD(KimiLinearAttentionArguments, beta_num_heads);
  FIELD(KimiLinearAttentionArguments, scale);
  FIELD(KimiLinearAttentionArguments, query);
  FIELD(KimiLinearAttentionArguments, key);
  FIELD(KimiLinearAttentionArguments, value);
  FIELD(KimiLinearAttentionArguments, past_state);
  FIELD(KimiLinearAttentionArguments, decay);
  FIELD(KimiLinearAttentionArguments, beta);
  FIELD(KimiLinearAttentionArguments, output);
  FIELD(KimiLinearAttentionArguments, present_state);
  FIELD(KimiLinearAttentionArguments, workspace);
  FIELD(KimiLinearAttentionArguments, workspace_size);
  FIELD(KimiLinearAttentionArguments, stream);

  SIZE(KimiCausalConvArguments);
  FIELD(KimiCausalConvArguments, struct_size);
  FIELD(KimiCausalConvArguments, data_type);
  FIELD(KimiCausalConvArguments, activation);
  FIELD(KimiCausalConvArguments, batch);
  FIELD(KimiCausalConvArguments, channels);
  FIELD(KimiCausalConvArguments, sequence);
  FIELD(KimiCausalConvArguments, width);
  FIELD(KimiCausalConvArguments, input);
  FIELD(KimiCausalConvArguments, weight);
  FIELD(KimiCausalConvArguments, bias);
  FIELD(KimiCausalConvArguments, past_state);
  FIELD(KimiCausalConvArguments, output);
  FIELD(KimiCausalConvArguments, present_state);
  FIELD(KimiCausalConvArguments, stream);

  SIZE(KimiMoeArguments);
  FIELD(KimiMoeArguments, struct_size);
  FIELD(KimiMoeArguments, data_type);
  FIELD(KimiMoeArguments, tokens);
  FIELD(KimiMoeArguments, hidden);
  FIELD(KimiMoeArguments, num_experts);
  FIELD(KimiMoeArguments, intermediate);
  FIELD(KimiMoeArguments, top_k);
  FIELD(KimiMoeArguments, n_group);
  FIELD(KimiMoeArguments, topk_group);
  FIELD(KimiMoeArguments, renormalize);
  FIELD(KimiMoeArguments, routed_scaling_factor);
  FIELD(KimiMoeArguments, hidden_states);
  FIELD(KimiMoeArguments, router_weight);
  FIELD(KimiMoeArguments, router_bias);
  FIELD(KimiMoeArguments, gate_up_weight);
  FIELD(KimiMoeArguments, down_weight);
  FIELD(KimiMoeArguments, output);
  FIELD(KimiMoeArguments, workspace);
  FIELD(KimiMoeArguments, workspace_size);
  FIELD(KimiMoeArguments, stream);
  return 0;
}
