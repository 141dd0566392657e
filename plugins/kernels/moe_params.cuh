// What the kernels of MixtureOfExperts are given, and what they share.
//
// A pair is a token with one of its experts: pair p = token p / top_k with its choice p % top_k.
#pragma once

#include "kda_params.cuh"

namespace kimi {

template <class T>
struct MoeParams {
  const T* __restrict__ x;              // [tokens, hidden]
  const T* __restrict__ router_weight;  // [experts, hidden]
  const float* __restrict__ router_bias;
  const T* __restrict__ gate_up;  // [experts, 2 inner, hidden]
  const T* __restrict__ down;     // [experts, hidden, inner]
  T* output;                      // [tokens, hidden]
  int tokens, hidden, experts, inner, top_k, groups, kept_groups;
  bool renormalize;
  float factor;

  // workspace, as moe_check.h lays it out
  float* scores;      // [tokens, experts]
  int* chosen;        // [pairs]
  float* weights;     // [pairs]
  float* few_hidden;  // [pairs, inner]; few tokens
  int* counts;        // [experts]: pairs of each; many tokens, as all that follows
  int* sorted;        // [pairs]: pair numbers, expert after expert
  int* tile_expert;   // [tiles]: -1 for a tile without rows
  int* tile_first;    // [tiles]: place in `sorted` of its first row
  T* many_hidden;     // [pairs, inner], in the order of `sorted`
  T* many_output;     // [pairs, hidden], in the order of pair numbers
  int tiles;

  KIMI_HOST_DEVICE int pairs() const { return tokens * top_k; }
};

constexpr int kMoeThreads = 256, kMoeWarps = kMoeThreads / kWarp;

struct Eight {
  float f[8];
};

// Eight neighbours in float32; the address is aligned to 16 bytes.
KIMI_DEVICE Eight load8(const float* p) {
  const Floats a = load4(p), b = load4(p + 4);
  return Eight{{a.f[0], a.f[1], a.f[2], a.f[3], b.f[0], b.f[1], b.f[2], b.f[3]}};
}
template <class T>
KIMI_DEVICE Eight load8(const T* p) {
  const Words x = *reinterpret_cast<const Words*>(p);
  Eight y;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y.f[2 * i] = low_half<T>(x.w[i]);
    y.f[2 * i + 1] = high_half<T>(x.w[i]);
  }
  return y;
}

KIMI_DEVICE float dot8(const Eight& a, const Eight& b, float sum) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fma(a.f[i], b.f[i], sum);
  return sum;
}

// The running warp's number in the grid, of `kMoeWarps` a block.
KIMI_DEVICE int64_t grid_warp() { return static_cast<int64_t>(block_index()) * kMoeWarps + thread_index() / kWarp; }

}  // namespace kimi
