// The end of prefill: gated RMSNorm of the chain's output, D / 4 lanes for every step and head.
#pragma once

#include "kda_params.cuh"

namespace kimi {

constexpr int kOutputThreads = 256;

// Whether step `row` of the padded or packed layout counts; false and `write` false if its output stays untouched.
template <class T>
KIMI_DEVICE bool counts(const KdaParams<T>& p, int row, bool& write) {
  write = true;
  if (p.cu_seqlens == nullptr) {
    const int n = row / p.sequence;
    return row - n * p.sequence < sequence_of(p, n).length;
  }
  write = row >= p.cu_seqlens[0] && row < p.cu_seqlens[p.batch];
  if (!write || p.slots == nullptr) return write;
  int low = 0, high = p.batch;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.cu_seqlens[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return sequence_of(p, low).length > 0;
}

template <class T, int D>
KIMI_KERNEL(kOutputThreads, 1)
kda_output(KIMI_GRID_CONSTANT KdaParams<T> p) {
  constexpr int kLanes = D / 4;  // of a row
  const int lane = thread_index() % kLanes;
  // the call's checks keep this inside 31 bits
  const int item = block_index() * (kOutputThreads / kLanes) + thread_index() / kLanes;
  const int rows = (p.cu_seqlens == nullptr ? p.batch : 1) * p.sequence;
  // the last rows first: they may still be in the cache
  const int row = rows - 1 - item / p.num_heads, head = item % p.num_heads;
  bool write = false;
  const bool valid = row >= 0 && counts(p, row, write);
  const int64_t at = (static_cast<int64_t>(row) * p.num_heads + head) * D + lane * 4;
  Floats o = {}, gate = {};
  if (valid) {
    o = load4(p.raw_output + at);
    gate = load4(p.output_gate + at);
  }
  const Floats weight = load4(p.norm_weight + lane * 4);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) squares = fma(o.f[i], o.f[i], squares);
  const float norm = rsqrt(lanes_sum<kLanes>(squares) * (1.0f / D) + p.norm_eps);
  // a step that does not count has o = 0; norm_eps may be 0 and its norm infinite
#pragma unroll
  for (int i = 0; i < 4; ++i) o.f[i] = valid ? o.f[i] * norm * weight.f[i] * sigmoid(gate.f[i]) : 0.0f;
  if (write) store4(p.output + at, o);
}

}  // namespace kimi
