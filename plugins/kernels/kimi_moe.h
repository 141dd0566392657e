/* C ABI of the op `kimi::MixtureOfExperts`: what kimi_kernels.h says of memory, codes and kimi_last_error holds here
 * too.
 *
 * For every token, with x its hidden state:
 *   scores = sigmoid(x router_weight^T), biased = scores + router_bias
 *   groups: the topk_group best of n_group, by the sum of their two best biased scores, keep their experts
 *   experts: the top_k best biased scores of those; of equal ones the lower index
 *   weights = scores of the chosen / (their sum + 1e-20 if renormalize, else 1) * routed_scaling_factor
 *   output = sum of weight * down_weight[e] (silu(gate) * up), gate and up being rows 2 i and 2 i + 1 of
 *            gate_up_weight[e] x
 * Routing is float32, whatever T is. Products add up in float32. Few tokens: only the result is rounded to T. Many
 * tokens: what goes into the second product and what comes out of it are too.
 */
#ifndef KIMI_MOE_H_
#define KIMI_MOE_H_

#include "kimi_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* T is data_type: any KimiDataType. Every array is dense and aligned to 16 bytes; none may overlap. */
typedef struct KimiMoeArguments {
  uint32_t struct_size; /* sizeof(KimiMoeArguments) */
  int32_t data_type;    /* KimiDataType T */
  int32_t tokens;       /* at least 0; with 0 nothing is read or written */
  int32_t hidden;       /* a multiple of 8 */
  int32_t num_experts;  /* 1 to 1024 */
  int32_t intermediate; /* a multiple of 8 */
  int32_t top_k;        /* 1 to 32, and no more than the kept groups have experts */
  int32_t n_group;      /* divides num_experts */
  int32_t topk_group;   /* 1 to n_group */
  int32_t renormalize;  /* 0 or 1 */
  float routed_scaling_factor;

  const void* hidden_states;  /* T [tokens, hidden] */
  const void* router_weight;  /* T [num_experts, hidden] */
  const float* router_bias;   /* [num_experts] */
  const void* gate_up_weight; /* T [num_experts, 2 intermediate, hidden], gate and up interleaved */
  const void* down_weight;    /* T [num_experts, hidden, intermediate] */

  void* output; /* T [tokens, hidden] */

  void* workspace;       /* any content */
  size_t workspace_size; /* bytes */
  void* stream;          /* cudaStream_t; ignored by the emulated library */
} KimiMoeArguments;

/* Bytes of workspace for these sizes; never more for fewer tokens. Pointers are not looked at. */
KIMI_API int32_t kimi_moe_workspace(const KimiMoeArguments* arguments, size_t* bytes);

/* The whole op. Launches on `stream`, allocates nothing, waits for nothing; may be captured in a CUDA graph. */
KIMI_API int32_t kimi_moe(const KimiMoeArguments* arguments);

#ifdef __cplusplus
}
#endif

#endif /* KIMI_MOE_H_ */
