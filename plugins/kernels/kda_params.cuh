// The arguments of a kernel: the C struct with its types, and where a sequence lies.
#pragma once

#include "device.cuh"
#include "kimi_kernels.h"

namespace kimi {

constexpr int kConvWidth = 4;
constexpr int kPast = kConvWidth - 1;  // columns of the convolution state
constexpr int kTile = 32;
constexpr int kSnapshot = 64;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kL2NormEps = 1e-6f;

template <class T>
struct KdaParams {
  const T* __restrict__ qkv;
  const T* __restrict__ decay;
  const T* __restrict__ beta;
  const T* __restrict__ output_gate;
  const T* __restrict__ conv_weight;
  const float* __restrict__ A_log;
  const float* __restrict__ dt_bias;
  const T* __restrict__ norm_weight;
  // past and present may be the same memory
  const T* past_conv_state;
  const float* past_recurrent_state;
  const int32_t* sequence_lengths;
  const int32_t* cu_seqlens;
  const int32_t* slots;
  T* output;
  T* present_conv_state;
  float* present_recurrent_state;
  float* state_snapshots;
  unsigned char* tiles;  // workspace: operands of every tile and head
  float* raw_output;     // workspace: [steps, H, D] before the output norm
  int64_t num_tiles;     // of one head
  int stages;            // of the chain
  int batch, sequence, num_heads, num_slots;
  int gate;
  float norm_eps, scale, gate_lower_bound;
};

// One sequence: its steps are rows first_row .. first_row + length - 1 of the inputs.
struct Sequence {
  int64_t first_row;
  int length;
  int64_t first_tile;      // of the workspace's tiles
  int64_t first_snapshot;  // of state_snapshots
  int slot;                // of the states; negative: no state, nothing to do
};

KIMI_HOST_DEVICE int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

template <class T>
KIMI_DEVICE Sequence sequence_of(const KdaParams<T>& p, int n) {
  Sequence s;
  if (p.cu_seqlens != nullptr) {
    const int start = clamp(p.cu_seqlens[n], 0, p.sequence);
    s.first_row = start;
    s.length = clamp(p.cu_seqlens[n + 1], start, p.sequence) - start;
    // a bound on the tiles before that needs no sum over the sequences
    s.first_tile = start / kTile + n;
    s.first_snapshot = start / kSnapshot;
  } else {
    s.first_row = static_cast<int64_t>(n) * p.sequence;
    s.length = p.sequence_lengths == nullptr ? p.sequence : clamp(p.sequence_lengths[n], 0, p.sequence);
    s.first_tile = static_cast<int64_t>(n) * ((p.sequence + kTile - 1) / kTile);
    s.first_snapshot = static_cast<int64_t>(n) * (p.sequence / kSnapshot);
  }
  s.slot = p.slots == nullptr ? n : p.slots[n];
  if (p.slots != nullptr && s.slot >= p.num_slots) s.slot = -1;
  if (s.slot < 0) s.length = 0;
  return s;
}

KIMI_DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2(-kLog2E * x)); }

KIMI_DEVICE float silu(float x) { return x * sigmoid(x); }

// log2(1 + y), y in [0, 1]: a minimax polynomial, relative error 4e-7 for small y too, so that slow decays keep their
// digits.
KIMI_DEVICE float log2_of_1_plus(float y) {
  float x = fma(y, -0.012319460f, 0.063607842f);
  x = fma(y, x, -0.15535170f);
  x = fma(y, x, 0.25600967f);
  x = fma(y, x, -0.35339481f);
  x = fma(y, x, 0.48006371f);
  x = fma(y, x, -0.72131008f);
  x = fma(y, x, 1.4426948f);
  return y * x;
}

// The factor e^g by which one step of one key channel decays, in [0, 1]. rate = exp(A_log).
KIMI_DEVICE float decay_factor(float x, float rate, int gate, float lower_bound) {
  if (gate == KIMI_GATE_SOFTPLUS) {
    // in log2: softplus(x) log2(e) = max(x, 0) log2(e) + log2(1 + 2^(-|x| log2(e)))
    return exp2(-rate * fma(kLog2E, fmaxf(x, 0.0f), log2_of_1_plus(exp2(-kLog2E * fabsf(x)))));
  }
  return exp2(kLog2E * lower_bound * sigmoid(rate * x));
}

}  // namespace kimi
