/* C ABI of the Kimi Delta Attention kernels: pointers, sizes, a stream. No TensorRT, PyTorch or CUDA header is needed.
 *
 * Ports, layouts and meaning are those of the op `kimi::KimiDeltaAttention`. Every pointer leads to memory of the
 * library's backend (see kimi_backend): device memory for "cuda", host memory for "emulated". A call that returns
 * anything but KIMI_OK has launched nothing, unless the code is KIMI_ERROR_LAUNCH; kimi_last_error says why, per
 * thread.
 */
#ifndef KIMI_KERNELS_H_
#define KIMI_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define KIMI_API __attribute__((visibility("default")))
#else
#define KIMI_API
#endif

/* Raised whenever a field changes its meaning. New fields at the end of the struct do not raise it. */
#define KIMI_ABI_VERSION 1

typedef enum KimiStatus {
  KIMI_OK = 0,
  KIMI_ERROR_ABI = 1,       /* the struct is not of a size this library knows */
  KIMI_ERROR_ARGUMENT = 2,  /* null or misaligned pointer, or a value out of range */
  KIMI_ERROR_SHAPE = 3,     /* a size these kernels are not built for */
  KIMI_ERROR_DTYPE = 4,     /* a data type these kernels are not built for */
  KIMI_ERROR_WORKSPACE = 5, /* the workspace is missing or too small */
  KIMI_ERROR_LAUNCH = 6     /* the device refused the launch, or the emulator found a fault */
} KimiStatus;

typedef enum KimiDataType { KIMI_FLOAT32 = 0, KIMI_FLOAT16 = 1, KIMI_BFLOAT16 = 2 } KimiDataType;

typedef enum KimiGate {
  KIMI_GATE_SOFTPLUS = 0, /* -exp(A_log) softplus(decay + dt_bias) */
  KIMI_GATE_BOUNDED = 1   /* gate_lower_bound sigmoid(exp(A_log) (decay + dt_bias)) */
} KimiGate;

/* Arguments of both calls. H heads of D, W = conv_width. Data (T) has `data_type`.
 *
 * Two layouts of the steps:
 *   padded  cu_seqlens is NULL: `batch` rows of `sequence` steps; sequence_lengths (may be NULL) says how many count.
 *   packed  cu_seqlens[batch + 1]: one row of `sequence` steps in all, sequence n is steps cu_seqlens[n] to
 *           cu_seqlens[n + 1]; sequence_lengths must be NULL.
 * Steps that do not count are never read; their output is 0 (padded) or untouched (packed, past the last sequence).
 * A sequence without steps keeps both its states to the bit. Lengths on the device are clamped to what fits.
 *
 * slots[batch] (may be NULL): sequence n reads and writes entry slots[n] of the state tensors, which then have
 * num_slots entries; a slot outside 0 .. num_slots - 1 idles its sequence: no state, output 0. Slots must differ.
 * Past and present state pointers may be equal; else they must not overlap.
 */
typedef struct KimiKdaArguments {
  uint32_t struct_size; /* sizeof(KimiKdaArguments) */
  int32_t data_type;    /* KimiDataType */
  int32_t state_type;   /* KimiDataType of the recurrent states: KIMI_FLOAT32 */
  int32_t gate;         /* KimiGate */
  int32_t batch;
  int32_t sequence;
  int32_t num_heads;
  int32_t head_dim;   /* 64 or 128 */
  int32_t conv_width; /* 4 */
  int32_t num_slots;  /* entries of the state pool; read with slots only */
  float norm_eps;
  float scale;
  float gate_lower_bound; /* in [-5, 0) for KIMI_GATE_BOUNDED */
  int32_t value_splits;   /* blocks a head's values are split over in prefill: 1, 2, 4 (or 8 if D = 128); 0 = chosen.
                             Compute capability 9.0 takes at most D / 64. */

  const void* qkv;                  /* T [batch, sequence, 3 H D], before the convolution */
  const void* decay;                /* T [batch, sequence, H D], before bias and gate */
  const void* beta;                 /* T [batch, sequence, H], logits */
  const void* output_gate;          /* T [batch, sequence, H D], logits */
  const void* conv_weight;          /* T [3 H D, W], newest step last */
  const float* A_log;               /* [H] */
  const float* dt_bias;             /* [H D] */
  const void* norm_weight;          /* T [D] */
  const void* past_conv_state;      /* T [batch, 3 H D, W - 1], newest last */
  const void* past_recurrent_state; /* state_type [batch, H, D, D], key before value */
  const int32_t* sequence_lengths;  /* [batch] or NULL */
  const int32_t* cu_seqlens;        /* [batch + 1] or NULL */
  const int32_t* slots;             /* [batch] or NULL */

  void* output;                  /* T [batch, sequence, H D] */
  void* present_conv_state;      /* as past_conv_state */
  void* present_recurrent_state; /* as past_recurrent_state */

  /* Prefill only, or NULL: the recurrent state after every 64 steps, state_type [rows, H, D, D]. Sequence n has
   * floor(length / 64) of them, from row n * floor(sequence / 64) (padded) or floor(cu_seqlens[n] / 64) (packed);
   * rows = batch * floor(sequence / 64), or floor(sequence / 64). Other rows stay untouched. */
  void* state_snapshots;

  void* workspace;       /* prefill only; any content */
  size_t workspace_size; /* bytes */
  void* stream;          /* cudaStream_t; ignored by the emulated library */
} KimiKdaArguments;

/* KIMI_ABI_VERSION of the library. */
KIMI_API uint32_t kimi_abi_version(void);

/* "cuda" or "emulated". */
KIMI_API const char* kimi_backend(void);

/* Why the last call of this thread did not return KIMI_OK; empty if it did. Valid until the thread's next call. */
KIMI_API const char* kimi_last_error(void);

/* The whole op, token by token in one launch, the recurrent state read once and written once: made for decode steps
 * (sequence = 1) and short runs of them. Padded layout; float16, bfloat16 and float32 data. */
KIMI_API int32_t kimi_kda_decode(const KimiKdaArguments* arguments);

/* Bytes of workspace kimi_kda_prefill needs for these sizes. Pointers are not looked at, except whether cu_seqlens is
 * NULL. */
KIMI_API int32_t kimi_kda_prefill_workspace(const KimiKdaArguments* arguments, size_t* bytes);

/* The whole op on many tokens: tiles of 32 on the matrix units, three launches. float16 and bfloat16 data. */
KIMI_API int32_t kimi_kda_prefill(const KimiKdaArguments* arguments);

/* The whole op by the kernel made for these sizes: what a caller uses who has no reason to choose. kimi_kda_workspace
 * gives its bytes, 0 where it decodes; never more for fewer rows or steps of a padded batch. */
KIMI_API int32_t kimi_kda_workspace(const KimiKdaArguments* arguments, size_t* bytes);
KIMI_API int32_t kimi_kda(const KimiKdaArguments* arguments);

#ifdef __cplusplus
}
#endif

#endif /* KIMI_KERNELS_H_ */
