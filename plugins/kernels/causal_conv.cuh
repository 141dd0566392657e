// The standard's CausalConvWithState: a depthwise convolution over the steps, with the last steps carried in a state.
#pragma once

#include "kda_params.cuh"

namespace kimi {

template <class T>
struct CausalConvParams {
  const T* __restrict__ input;
  const T* __restrict__ weight;
  const T* __restrict__ bias;  // null: none
  // past and present may be the same memory
  const T* past_state;  // null: zeros
  T* output;
  T* present_state;
  int64_t rows;  // batch * channels
  int channels, sequence, width;
  bool silu;
};

constexpr int kConvThreads = 256;

// kLanes neighbouring threads serve one channel of one sequence: one for decode, where neighbouring channels are
// neighbours in memory, or a warp over the steps, which then are at least width - 1. kWidth: 4, or 0 for any.
template <class T, int kLanes, int kWidth>
KIMI_KERNEL(kConvThreads, 2)
causal_conv(KIMI_GRID_CONSTANT CausalConvParams<T> p) {
  const int width = kWidth > 0 ? kWidth : p.width, kept = width - 1;
  const int64_t row = (static_cast<int64_t>(block_index()) * kConvThreads + thread_index()) / kLanes;
  const int lane = thread_index() % kLanes;
  const bool real = row < p.rows;
  const int channel = static_cast<int>(row % p.channels);
  const T* input = p.input + row * p.sequence;
  const T* weight = p.weight + static_cast<int64_t>(channel) * width;
  // the bits of step t, the past's are negative: a state is carried, not computed
  auto step = [&](int t) {
    if (t >= 0) return input[t];
    return p.past_state == nullptr ? T{} : p.past_state[row * kept + kept + t];
  };
  if (real) {
    const float bias = p.bias == nullptr ? 0.0f : to_float(p.bias[channel]);
    for (int t = lane; t < p.sequence; t += kLanes) {
      float sum = bias;
#pragma unroll(kWidth > 0 ? kWidth : 1)
      for (int j = 0; j < width; ++j) sum = fma(to_float(weight[j]), to_float(step(t - kept + j)), sum);
      T y = from_float<T>(sum);
      if (p.silu) y = from_float<T>(silu(to_float(y)));
      p.output[row * p.sequence + t] = y;
    }
  }
  if (kLanes > 1) sync_threads();  // every lane has read the past before any writes the present over it
  if (real) {
    // one lane goes upwards: it reads what lies `sequence` above what it has written
    for (int j = lane; j < kept; j += kLanes) p.present_state[row * kept + j] = step(p.sequence - kept + j);
  }
}

}  // namespace kimi
