/* C ABI of the standard operator CausalConvWithState (ai.onnx, opset 27), a causal depthwise convolution over the
 * steps. What kimi_kernels.h says of memory, codes and kimi_last_error holds here too.
 *
 * With x = past_state | input along the steps:
 *   output[b, c, t] = activation(bias[c] + sum over j < width of weight[c, j] x[b, c, t + j])
 *   present_state[b, c] = the last width - 1 steps of x[b, c], to the bit
 * The sum is float32, rounded to T before the activation as the standard's definition does, and again after it.
 */
#ifndef KIMI_CAUSAL_CONV_H_
#define KIMI_CAUSAL_CONV_H_

#include "kimi_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum KimiActivation {
  KIMI_ACTIVATION_NONE = 0,
  KIMI_ACTIVATION_SILU = 1 /* the standard's "silu" and "swish" */
} KimiActivation;

/* T is data_type: any KimiDataType. Every array is dense, channels before steps, and aligned to 16 bytes. past_state
 * and present_state may be the same memory; else they must not overlap. Nothing else may overlap. With sequence = 0,
 * input and output may be NULL, and present_state is past_state; with width = 1 the states have no memory and may be
 * NULL.
 */
typedef struct KimiCausalConvArguments {
  uint32_t struct_size; /* sizeof(KimiCausalConvArguments) */
  int32_t data_type;    /* KimiDataType T */
  int32_t activation;   /* KimiActivation */
  int32_t batch;        /* at least 1 */
  int32_t channels;     /* at least 1 */
  int32_t sequence;     /* at least 0 */
  int32_t width;        /* k, taps of a filter, 1 to 1024 */

  const void* input;      /* T [batch, channels, sequence] */
  const void* weight;     /* T [channels, 1, width], newest step last */
  const void* bias;       /* T [channels]; NULL: none */
  const void* past_state; /* T [batch, channels, width - 1], newest step last; NULL: zeros */

  void* output;        /* T [batch, channels, sequence] */
  void* present_state; /* as past_state */

  void* stream; /* cudaStream_t; ignored by the emulated library */
} KimiCausalConvArguments;

/* The whole operator in one launch on `stream`, without workspace. Allocates nothing, waits for nothing; may be
 * captured in a CUDA graph. */
KIMI_API int32_t kimi_causal_conv(const KimiCausalConvArguments* arguments);

#ifdef __cplusplus
}
#endif

#endif /* KIMI_CAUSAL_CONV_H_ */
