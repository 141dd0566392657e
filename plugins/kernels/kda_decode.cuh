// The whole op token by token, one block per sequence and head: made for decode, where reading and writing the
// recurrent state is all that costs. The state stays in registers from its one load to its one store.
#pragma once

#include "fault.cuh"
#include "kda_params.cuh"

namespace kimi {

template <int D>
struct DecodeLayout {
  static constexpr int kThreads = 4 * D;  // a quarter each for the channels of q, k, v and the gate
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kPartWarps = D / kWarp;
  // a warp holds 32 value columns (8 lanes of 4) of D / 4 key rows; 4 lanes share a column
  static constexpr int kValueWarps = D / 32;
  static constexpr int kKeyWarps = kWarps / kValueWarps;
  static constexpr int kLaneRows = D / kKeyWarps / 4;

  // one step's values; two of them alternate, so that no third barrier parts a step from the next
  struct Step {
    Floats keys[D];  // q and k after convolution and SiLU, and e^g, of every key channel
    float values[D];
    float gate[D];  // norm weight and output gate
    float squares[2][kPartWarps];
    float key_query[kKeyWarps];
    Floats key_state[kKeyWarps][D / 4];
    Floats query_state[kKeyWarps][D / 4];
  };
  static constexpr size_t kSharedBytes = 2 * sizeof(Step);
};

// kOneStep: for sequence = 1, with two blocks of state on a multiprocessor; a loop would cost the registers for that,
// and below sm_90 ptxas finds no way to spend so few without spilling.
#if KIMI_CUDA_ARCH >= 900
#define KIMI_ONE_STEP_THREADS 1024
#else
#define KIMI_ONE_STEP_THREADS 512
#endif

template <class T, int D, bool kOneStep>
KIMI_KERNEL(DecodeLayout<D>::kThreads, (kOneStep ? KIMI_ONE_STEP_THREADS : 512) / DecodeLayout<D>::kThreads)
kda_decode(KIMI_GRID_CONSTANT KdaParams<T> p) {
  using Layout = DecodeLayout<D>;
  using Step = typename Layout::Step;
  constexpr int kRows = Layout::kLaneRows;
  Step* steps = reinterpret_cast<Step*>(shared_memory());

  const int H = p.num_heads;
  const int n = block_index() / H, h = block_index() % H;
  const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
  const Sequence sequence = sequence_of(p, n);

  const int key_warp = warp / Layout::kValueWarps;
  const int value = (warp % Layout::kValueWarps) * 32 + lane % 8 * 4;
  const int first_key = key_warp * (D / Layout::kKeyWarps) + lane / 8;
  const int64_t state_at = ((static_cast<int64_t>(sequence.slot) * H + h) * D + first_key) * D + value;

  const int part = thread / D, channel = thread % D;
  const int HD = H * D, conv_channel = part * HD + h * D + channel;
  const int64_t conv_at = (static_cast<int64_t>(sequence.slot) * 3 * HD + conv_channel) * kPast;
  // bits, not values: a sequence without steps keeps them
  T past[kPast] = {};
  if (part < 3 && sequence.slot >= 0) {
#pragma unroll
    for (int j = 0; j < kPast; ++j) past[j] = p.past_conv_state[conv_at + j];
  }

  Floats S[kRows];
  auto read_state = [&] {
#pragma unroll
    for (int i = 0; i < kRows; ++i) S[i] = load4(p.past_recurrent_state + state_at + i * 4 * D);
  };
  auto write_state = [&] {
#pragma unroll
    for (int i = 0; i < kRows; ++i) store4(p.present_recurrent_state + state_at + i * 4 * D, S[i]);
  };
  auto write_past = [&] {
#pragma unroll
    for (int j = 0; j < kPast; ++j) p.present_conv_state[conv_at + j] = past[j];
  };

  // one step's inputs are asked for before the state: they are at work while it arrives. float32 lacks the registers.
  constexpr bool kInputsFirst = kOneStep && sizeof(T) == 2;
  if (sequence.slot >= 0 && !(kInputsFirst && sequence.length == 1)) read_state();
  for (int t = 0; t < sequence.length; ++t) {
    Step& step = steps[t % 2];
    const int64_t row = sequence.first_row + t, at = row * HD + h * D + channel;
    const T beta_logit = p.beta[row * H + h];
    T newest = {}, decay = {}, output_gate = {}, norm_weight = {};
    Floats weight = {};
    float bias = 0.0f, log_rate = 0.0f;
    if (part < 3) {
      newest = p.qkv[row * 3 * HD + conv_channel];
      weight = load4(p.conv_weight + conv_channel * kConvWidth);
    } else {
      decay = p.decay[at];
      output_gate = p.output_gate[at];
      norm_weight = p.norm_weight[channel];
      bias = p.dt_bias[h * D + channel];
      log_rate = p.A_log[h];
    }
    if (kInputsFirst) read_state();
    const float beta = sigmoid(to_float(beta_logit));
    if (part < 3) {
      const float y = silu(fma(
          weight.f[0], to_float(past[0]),
          fma(weight.f[1], to_float(past[1]), fma(weight.f[2], to_float(past[2]), weight.f[3] * to_float(newest)))));
      past[0] = past[1];
      past[1] = past[2];
      past[2] = newest;
      if (kOneStep) write_past();
      if (part < 2) {
        step.keys[channel].f[part] = y;
        const float squares = warp_sum(y * y);
        if (lane == 0) step.squares[part][warp % Layout::kPartWarps] = squares;
      } else {
        step.values[channel] = y;
      }
    } else {
      step.keys[channel].f[2] =
          decay_factor(to_float(decay) + bias, exp2(kLog2E * log_rate), p.gate, p.gate_lower_bound);
      step.gate[channel] = to_float(norm_weight) * sigmoid(to_float(output_gate));
    }
    KIMI_FAULT_BARRIER(sync_threads());

    auto norm_of = [&](int part) {
      float squares = 0.0f;
#pragma unroll
      for (int w = 0; w < Layout::kPartWarps; ++w) squares += step.squares[part][w];
      return rsqrt(squares + kL2NormEps);
    };
    const float k_norm = norm_of(1);

    // with S' = diag(e^g) S: k^T S' and q^T S' in one pass; the new state adds k delta^T, so o = q^T S' + (q.k) delta.
    // The norms of q and k multiply the sums.
    float key_state[4] = {}, query_state[4] = {}, key_query = 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Floats key = step.keys[first_key + i * 4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        S[i].f[j] *= key.f[2];
        query_state[j] = fma(key.f[0], S[i].f[j], query_state[j]);
        key_state[j] = fma(key.f[1], S[i].f[j], key_state[j]);
      }
      key_query = fma(key.f[0], key.f[1], key_query);
    }
#pragma unroll
    for (int mask = 8; mask < kWarp; mask *= 2) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        key_state[j] += shuffle_xor(key_state[j], mask);
        query_state[j] += shuffle_xor(query_state[j], mask);
      }
      key_query += shuffle_xor(key_query, mask);
    }
    if (lane < 8) {
      step.key_state[key_warp][value / 4] = Floats{{key_state[0], key_state[1], key_state[2], key_state[3]}};
      step.query_state[key_warp][value / 4] = Floats{{query_state[0], query_state[1], query_state[2], query_state[3]}};
    }
    if (warp % Layout::kValueWarps == 0 && lane == 0) step.key_query[key_warp] = key_query;
    sync_threads();

    float delta[4] = {};
#pragma unroll 1  // all at once would take the registers of the state
    for (int w = 0; w < Layout::kKeyWarps; ++w) {
      const Floats x = step.key_state[w][value / 4];
#pragma unroll
      for (int j = 0; j < 4; ++j) delta[j] += x.f[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) delta[j] = (step.values[value + j] - delta[j] * k_norm) * beta * k_norm;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float k = step.keys[first_key + i * 4].f[1];
#pragma unroll
      for (int j = 0; j < 4; ++j) S[i].f[j] = fma(k, delta[j], S[i].f[j]);
    }

    if (kOneStep) write_state();

    if (warp == Layout::kWarps - 1) {
      const float q_norm = norm_of(0) * p.scale;
      float key_query_sum = 0.0f;
#pragma unroll
      for (int w = 0; w < Layout::kKeyWarps; ++w) key_query_sum += step.key_query[w];
      const float written = key_query_sum * q_norm * k_norm * beta;
      float o[D / kWarp], squares = 0.0f;
#pragma unroll
      for (int j = 0; j < D / kWarp; ++j) {
        const int column = j * kWarp + lane;
        float from_key = 0.0f, from_query = 0.0f;
#pragma unroll
        for (int w = 0; w < Layout::kKeyWarps; ++w) {
          from_key += step.key_state[w][column / 4].f[column % 4];
          from_query += step.query_state[w][column / 4].f[column % 4];
        }
        o[j] = fma(written, step.values[column] - from_key * k_norm, from_query * q_norm);
        squares = fma(o[j], o[j], squares);
      }
      const float norm = rsqrt(warp_sum(squares) * (1.0f / D) + p.norm_eps);
#pragma unroll
      for (int j = 0; j < D / kWarp; ++j) {
        const int column = j * kWarp + lane;
        p.output[row * HD + h * D + column] = from_float<T>(o[j] * norm * step.gate[column]);
      }
    }
    if (kOneStep) break;
  }

  for (int t = sequence.length; t < p.sequence; ++t) {
    const int64_t row = static_cast<int64_t>(n) * p.sequence + t;
    if (thread < D) p.output[row * HD + h * D + thread] = from_float<T>(0.0f);
  }
  if (sequence.slot < 0) return;
  if (kOneStep && sequence.length == 1) return;
  write_state();
  if (part < 3) write_past();
}

}  // namespace kimi
