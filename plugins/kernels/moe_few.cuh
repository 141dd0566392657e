// Few tokens: each pair reads its expert once, row by row, and nothing else. Bound by memory.
#pragma once

#include "moe_params.cuh"

namespace kimi {

// A warp makes one value that goes into the second product, of one pair: from a gate row and the up row after it.
template <class T>
KIMI_KERNEL(kMoeThreads, 2)
moe_few_gate_up(KIMI_GRID_CONSTANT MoeParams<T> p) {
  const int64_t value = grid_warp();
  const int lane = thread_index() % kWarp;
  if (value >= static_cast<int64_t>(p.pairs()) * p.inner) return;  // the whole warp
  const int pair = static_cast<int>(value / p.inner), i = static_cast<int>(value % p.inner);
  const T* x = p.x + static_cast<int64_t>(pair / p.top_k) * p.hidden;
  const T* gate_row = p.gate_up + (static_cast<int64_t>(p.chosen[pair]) * 2 * p.inner + 2 * i) * p.hidden;
  const T* up_row = gate_row + p.hidden;
  float gate = 0.0f, up = 0.0f;
#pragma unroll 2
  for (int c = lane * 8; c < p.hidden; c += kWarp * 8) {
    const Eight of_x = load8(x + c);
    gate = dot8(load8(gate_row + c), of_x, gate);
    up = dot8(load8(up_row + c), of_x, up);
  }
  gate = warp_sum(gate);
  up = warp_sum(up);
  if (lane == 0) p.few_hidden[value] = silu(gate) * up;
}

// A warp makes one output of one token, from that row of each of its experts.
template <class T>
KIMI_KERNEL(kMoeThreads, 2)
moe_few_down(KIMI_GRID_CONSTANT MoeParams<T> p) {
  const int64_t value = grid_warp();
  const int lane = thread_index() % kWarp;
  if (value >= static_cast<int64_t>(p.tokens) * p.hidden) return;  // the whole warp
  const int64_t token = value / p.hidden;
  const int column = static_cast<int>(value % p.hidden);
  float total = 0.0f;
  for (int k = 0; k < p.top_k; ++k) {
    const int64_t pair = token * p.top_k + k;
    const T* row = p.down + (static_cast<int64_t>(p.chosen[pair]) * p.hidden + column) * p.inner;
    const float* hidden = p.few_hidden + pair * p.inner;
    float sum = 0.0f;
#pragma unroll 4
    for (int c = lane * 8; c < p.inner; c += kWarp * 8) sum = dot8(load8(row + c), load8(hidden + c), sum);
    total = fma(p.weights[pair], sum, total);
  }
  total = warp_sum(total);
  if (lane == 0) p.output[value] = from_float<T>(total);
}

}  // namespace kimi
