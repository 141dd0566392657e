/* C ABI of the standard operator LinearAttention (ai.onnx, opset 27): what kimi_kernels.h says of memory, codes and
 * kimi_last_error holds here too.
 *
 * For every row, and state head h, from the state S [key_dim, value_dim] of past_state, step by step:
 *   S = diag(exp(decay)) S                           rules gated and gated_delta
 *   S = S + key (x) value                            rules linear and gated
 *   S = S + key (x) beta (value - S^T key)           rules delta and gated_delta
 *   output = scale S^T query                         of every query head that reads h
 * All of it in float32, whatever the data types; output and present_state are rounded once.
 */
#ifndef KIMI_LINEAR_ATTENTION_H_
#define KIMI_LINEAR_ATTENTION_H_

#include "kimi_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum KimiUpdateRule {
  KIMI_RULE_LINEAR = 0,
  KIMI_RULE_GATED = 1,
  KIMI_RULE_DELTA = 2,
  KIMI_RULE_GATED_DELTA = 3
} KimiUpdateRule;

/* T is data_type, S is state_type: each any KimiDataType.
 *
 * Heads. kv_num_heads states, each with one value head. Standard: key_num_heads = kv_num_heads, and q_num_heads is a
 * multiple of kv_num_heads; query head i reads state i / (q_num_heads / kv_num_heads), and output_heads is q_num_heads.
 * Also taken, as com.microsoft.LinearAttention does: key_num_heads and q_num_heads that divide kv_num_heads; a key or
 * query head then serves neighbouring states, and output_heads is kv_num_heads.
 *
 * Every array is dense and aligned to 16 bytes. past_state and present_state may be the same memory; else they must not
 * overlap. Nothing else may overlap. With sequence = 0 the pointers of step tensors may be NULL, and present_state is
 * past_state.
 */
typedef struct KimiLinearAttentionArguments {
  uint32_t struct_size; /* sizeof(KimiLinearAttentionArguments) */
  int32_t data_type;    /* KimiDataType T */
  int32_t state_type;   /* KimiDataType S; the standard has S = T where past_state is absent, but this takes any */
  int32_t update_rule;  /* KimiUpdateRule */
  int32_t batch;        /* at least 1 */
  int32_t sequence;     /* at least 0 */
  int32_t q_num_heads;
  int32_t kv_num_heads;
  int32_t key_num_heads;  /* kv_num_heads in the standard */
  int32_t key_dim;        /* of a head, 1 to 512 */
  int32_t value_dim;      /* of a head, at least 1 */
  int32_t decay_per_key;  /* 1: decay has a value for every key channel; 0: one for every head */
  int32_t beta_num_heads; /* kv_num_heads, or 1 for one value that all heads share */
  float scale;            /* 0: key_dim ** -0.5 */

  const void* query;      /* T [batch, sequence, q_num_heads key_dim] */
  const void* key;        /* T [batch, sequence, key_num_heads key_dim] */
  const void* value;      /* T [batch, sequence, kv_num_heads value_dim] */
  const void* past_state; /* S [batch, kv_num_heads, key_dim, value_dim]; NULL: zeros */
  const void* decay;      /* T, natural log: [batch, sequence, kv_num_heads key_dim] or [batch, sequence, kv_num_heads];
                             NULL for the rules linear and delta, and for no other */
  const void* beta;       /* T [batch, sequence, beta_num_heads]; NULL for the rules linear and gated, and for no
                             other */

  void* output;        /* T [batch, sequence, output_heads value_dim] */
  void* present_state; /* as past_state */

  void* workspace;       /* any content; may be NULL where kimi_linear_attention_workspace says 0 */
  size_t workspace_size; /* bytes */
  void* stream;          /* cudaStream_t; ignored by the emulated library */
} KimiLinearAttentionArguments;

/* Bytes of workspace for these sizes; never more for fewer rows or steps. Pointers are not looked at. */
KIMI_API int32_t kimi_linear_attention_workspace(const KimiLinearAttentionArguments* arguments, size_t* bytes);

/* The whole operator. Launches on `stream`, allocates nothing, waits for nothing; may be captured in a CUDA graph. */
KIMI_API int32_t kimi_linear_attention(const KimiLinearAttentionArguments* arguments);

#ifdef __cplusplus
}
#endif

#endif /* KIMI_LINEAR_ATTENTION_H_ */
