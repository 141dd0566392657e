// KimiDeltaAttention: a task is a head of a row, from its convolution to its gated norm. Steps go in blocks whose
// operands are prepared together; then the state passes over them once per step, a slice of values at a time.
#include "level.h"

namespace kimi::cpu {
namespace {

constexpr int64_t kBlock = 32;       // steps prepared together: their operands stay in the second cache
constexpr float kL2NormEps = 1e-6f;  // as the op has it

// Operands of the steps of a block, [kBlock, head_dim] each: per step the state is S = diag(decay) S, S += key delta^T,
// where delta = beta (value - S^T key); decayed_key and decayed_query meet the state before its decay.
struct Workspace {
  float *filters, *columns;  // [width, 3*dim], [width-1, 3*dim]: newest last
  float* mixed;              // [kBlock, 3*dim]
  float *key, *decay, *decayed_key, *decayed_query, *value, *output;
  float *beta, *query_key;  // [kBlock]
  float* slice;             // [dim, 4 vectors]: part of the state, for many steps

  static size_t floats(const KdaArguments& a) {
    const int64_t dim = a.head_dim;
    return static_cast<size_t>((2 * a.conv_width - 1) * 3 * dim + kBlock * (9 * dim + 2) + dim * 4 * kLanes);
  }

  Workspace(const KdaArguments& a, float* memory) {
    const int64_t dim = a.head_dim;
    auto take = [&](int64_t count) {
      float* const begin = memory;
      memory += count;
      return begin;
    };
    slice = take(dim * 4 * kLanes);
    filters = take(a.conv_width * 3 * dim);
    columns = take((a.conv_width - 1) * 3 * dim);
    mixed = take(kBlock * 3 * dim);
    key = take(kBlock * dim);
    decay = take(kBlock * dim);
    decayed_key = take(kBlock * dim);
    decayed_query = take(kBlock * dim);
    value = take(kBlock * dim);
    output = take(kBlock * dim);
    beta = take(kBlock);
    query_key = take(kBlock);
  }
};

// One head of one row.
class Head {
 public:
  Head(const KdaArguments& a, int64_t row, int64_t head, int64_t steps, const Workspace& w)
      : a_(a), w_(w), row_(row), head_(head), steps_(steps), dim_(a.head_dim), features_(a.num_heads * a.head_dim) {}

  void run() {
    float* const state = a_.present_recurrent_state + state_offset();
    const float* past = a_.past_recurrent_state + state_offset();
    if (steps_ == 0) {
      if (past != state) copy_floats(state, past, dim_ * dim_);
      for (int64_t part = 0; part < 3; ++part) {
        float* const to = a_.present_conv_state + column_offset(part, 0);
        const float* const from = a_.past_conv_state + column_offset(part, 0);
        if (to != from) copy_floats(to, from, dim_ * (a_.conv_width - 1));
      }
    } else {
      load_filters();
    }
    for (int64_t first = 0; first < steps_; first += kBlock) {
      const int64_t count = steps_ - first < kBlock ? steps_ - first : kBlock;
      convolve(first, count);
      for (int64_t i = 0; i < count; ++i) prepare(first + i, i);
      advance(past, state, count);
      past = state;
      for (int64_t i = 0; i < count; ++i) finish(first + i, i);
    }
    for (int64_t step = steps_; step < a_.sequence; ++step) {
      fill_zero(a_.output + (row_ * a_.sequence + step) * features_ + head_ * dim_, dim_);
    }
    if (steps_ > 0) store_columns();
  }

 private:
  int64_t state_offset() const { return (row_ * a_.num_heads + head_) * dim_ * dim_; }

  int64_t column_offset(int64_t part, int64_t channel) const {
    return ((row_ * 3 + part) * features_ + head_ * dim_ + channel) * (a_.conv_width - 1);
  }

  const float* input(const float* tensor, int64_t step) const {
    return tensor + (row_ * a_.sequence + step) * features_ + head_ * dim_;
  }

  const float* column(int64_t step, int64_t part) const {
    return step >= 0 ? a_.qkv + ((row_ * a_.sequence + step) * 3 + part) * features_ + head_ * dim_
                     : w_.columns + ((step + a_.conv_width - 1) * 3 + part) * dim_;
  }

  // Filters and past columns with the channels of this head side by side.
  void load_filters() {
    const int64_t width = a_.conv_width;
    for (int64_t part = 0; part < 3; ++part) {
      split(a_.conv_weight + (part * features_ + head_ * dim_) * width, width, w_.filters + part * dim_);
      split(a_.past_conv_state + column_offset(part, 0), width - 1, w_.columns + part * dim_);
    }
  }

  // [channel, tap] to [tap, channel], taps 3 * dim apart; the widths that models have are unrolled.
  void split(const float* from, int64_t taps, float* to) const {
    switch (taps) {
      case 3:
        return split_taps<3>(from, to);
      case 4:
        return split_taps<4>(from, to);
      default:
        for (int64_t tap = 0; tap < taps; ++tap) {
          for (int64_t c = 0; c < dim_; ++c) to[tap * 3 * dim_ + c] = from[c * taps + tap];
        }
    }
  }

  template <int kTaps>
  void split_taps(const float* from, float* to) const {
#pragma omp simd
    for (int64_t c = 0; c < dim_; ++c) {
      for (int tap = 0; tap < kTaps; ++tap) to[tap * 3 * dim_ + c] = from[c * kTaps + tap];
    }
  }

  void store_columns() {
    const int64_t kept = a_.conv_width - 1;
    for (int64_t part = 0; part < 3; ++part) {
      float* const to = a_.present_conv_state + column_offset(part, 0);
      if (kept == 3) {
        const float *const first = column(steps_ - 3, part), *const second = column(steps_ - 2, part);
        const float* const third = column(steps_ - 1, part);
#pragma omp simd
        for (int64_t c = 0; c < dim_; ++c) {
          to[3 * c] = first[c];
          to[3 * c + 1] = second[c];
          to[3 * c + 2] = third[c];
        }
        continue;
      }
      for (int64_t tap = 0; tap < kept; ++tap) {
        const float* const from = column(steps_ - kept + tap, part);
        for (int64_t c = 0; c < dim_; ++c) to[c * kept + tap] = from[c];
      }
    }
  }

  // SiLU of the convolution of a block's steps, into mixed [step, q | k | v].
  void convolve(int64_t first, int64_t count) {
    const int64_t width = a_.conv_width;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t part = 0; part < 3; ++part) {
        float* const sum = w_.mixed + (i * 3 + part) * dim_;
        const float* x = column(first + i, part);
        const float* filter = w_.filters + ((width - 1) * 3 + part) * dim_;
#pragma omp simd
        for (int64_t c = 0; c < dim_; ++c) sum[c] = filter[c] * x[c];
        for (int64_t tap = width - 2; tap >= 0; --tap) {
          x = column(first + i - (width - 1) + tap, part);
          filter = w_.filters + (tap * 3 + part) * dim_;
#pragma omp simd
          for (int64_t c = 0; c < dim_; ++c) sum[c] += filter[c] * x[c];
        }
#pragma omp simd
        for (int64_t c = 0; c < dim_; ++c) sum[c] *= sigmoid_of(sum[c]);
      }
    }
  }

  static float inverse_norm(const float* x, int64_t count, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < count; ++c) sum += x[c] * x[c];
    return 1.0f / __builtin_sqrtf(sum + eps);
  }

  void prepare(int64_t step, int64_t i) {
    const float *const q = w_.mixed + i * 3 * dim_, *const k = q + dim_, *const v = k + dim_;
    const float *const logits = input(a_.decay, step), *const bias = a_.dt_bias + head_ * dim_;
    float *const key = w_.key + i * dim_, *const decay = w_.decay + i * dim_;
    float *const decayed_key = w_.decayed_key + i * dim_, *const decayed_query = w_.decayed_query + i * dim_;
    float* const value = w_.value + i * dim_;
    const float rate = exp_of(a_.A_log[head_]);
    if (a_.bounded_gate) {
      const float bound = a_.gate_lower_bound;
#pragma omp simd
      for (int64_t c = 0; c < dim_; ++c) decay[c] = exp_of(bound * sigmoid_of(rate * (logits[c] + bias[c])));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < dim_; ++c) decay[c] = exp_of(-rate * softplus_of(logits[c] + bias[c]));
    }
    const float of_q = inverse_norm(q, dim_, kL2NormEps) * a_.scale, of_k = inverse_norm(k, dim_, kL2NormEps);
    float query_key = 0;
#pragma omp simd reduction(+ : query_key)
    for (int64_t c = 0; c < dim_; ++c) {
      const float unit_q = q[c] * of_q, unit_k = k[c] * of_k;
      query_key += unit_q * unit_k;
      key[c] = unit_k;
      decayed_key[c] = unit_k * decay[c];
      decayed_query[c] = unit_q * decay[c];
      value[c] = v[c];
    }
    w_.query_key[i] = query_key;
    w_.beta[i] = sigmoid_of(a_.beta[(row_ * a_.sequence + step) * a_.num_heads + head_]);
  }

  // The steps of a block on `past`, the result in `present`, which may be the same.
  void advance(const float* past, float* present, int64_t count) {
    int64_t begin = 0;
    for (; begin + 4 * kLanes <= dim_; begin += 4 * kLanes) advance_slice<Vec, 4>(past, present, begin, count);
    for (; begin + kLanes <= dim_; begin += kLanes) advance_slice<Vec, 1>(past, present, begin, count);
    constexpr int64_t half = sizeof(HalfVec) / sizeof(float);
    for (; begin < dim_; begin += half) advance_slice<HalfVec, 1>(past, present, begin, count);
  }

  // Values begin .. begin + N vectors of the state. The state is read once and written once per step: while a step
  // writes it, the sums over keys of the next step are taken.
  template <class V, int N>
  void advance_slice(const float* past, float* present, int64_t begin, int64_t count) {
    constexpr int64_t lanes = sizeof(V) / sizeof(float), width = N * lanes;
    // rows of a wide state lie a power of two apart, too many for the sets of the first cache
    const bool apart = count > 4 && dim_ > width;
    float* const state = apart ? w_.slice : present + begin;
    const int64_t stride = apart ? width : dim_;
    V from_key[N] = {}, from_query[N] = {};
    {
      const float *const decayed_key = w_.decayed_key, *const decayed_query = w_.decayed_query;
      for (int64_t row = 0; row < dim_; ++row) {
        for (int j = 0; j < N; ++j) {
          const V s = load<V>(past + row * dim_ + begin + j * lanes);
          if (apart) store<V>(state + row * stride + j * lanes, s);
          from_key[j] += decayed_key[row] * s;
          from_query[j] += decayed_query[row] * s;
        }
      }
    }
    const float* source = apart ? state : past + begin;
    for (int64_t i = 0; i < count; ++i) {
      const float beta = w_.beta[i], query_key = w_.query_key[i];
      const float *const key = w_.key + i * dim_, *const decay = w_.decay + i * dim_;
      V delta[N];
      for (int j = 0; j < N; ++j) {
        delta[j] = beta * (load<V>(w_.value + i * dim_ + begin + j * lanes) - from_key[j]);
        store<V>(w_.output + i * dim_ + begin + j * lanes, from_query[j] + query_key * delta[j]);
        from_key[j] = from_query[j] = V{};
      }
      if (i + 1 < count) {
        const float *const next_key = w_.decayed_key + (i + 1) * dim_, *const next_query =
                                                                           w_.decayed_query + (i + 1) * dim_;
        for (int64_t row = 0; row < dim_; ++row) {
          for (int j = 0; j < N; ++j) {
            const V s = decay[row] * load<V>(source + row * stride + j * lanes) + key[row] * delta[j];
            store<V>(state + row * stride + j * lanes, s);
            from_key[j] += next_key[row] * s;
            from_query[j] += next_query[row] * s;
          }
        }
      } else {
        for (int64_t row = 0; row < dim_; ++row) {
          for (int j = 0; j < N; ++j) {
            const V s = decay[row] * load<V>(source + row * stride + j * lanes) + key[row] * delta[j];
            store<V>(present + row * dim_ + begin + j * lanes, s);
          }
        }
      }
      source = state;
    }
  }

  void finish(int64_t step, int64_t i) {
    const float *const o = w_.output + i * dim_, *const gate = input(a_.output_gate, step);
    float* const to = a_.output + (row_ * a_.sequence + step) * features_ + head_ * dim_;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < dim_; ++c) squares += o[c] * o[c];
    const float inverse = 1.0f / __builtin_sqrtf(squares / static_cast<float>(dim_) + a_.norm_eps);
#pragma omp simd
    for (int64_t c = 0; c < dim_; ++c) to[c] = o[c] * inverse * a_.norm_weight[c] * sigmoid_of(gate[c]);
  }

  const KdaArguments& a_;
  const Workspace& w_;
  const int64_t row_, head_, steps_, dim_, features_;
};

}  // namespace

namespace KIMI_CPU_LEVEL {

size_t kda_workspace(const KdaArguments& a, const Parallel& parallel) {
  return static_cast<size_t>(parallel.slots(a.batch * a.num_heads)) * Workspace::floats(a) * sizeof(float);
}

Status kda(const KdaArguments& a, const Parallel& parallel) {
  // the state is passed over in whole vectors
  if (a.head_dim % 8 != 0) return {Fault::kHeadDim, 0, a.head_dim, 8};
  for (int64_t row = 0; row < a.batch && a.sequence_lengths != nullptr; ++row) {
    const int64_t steps = a.sequence_lengths[row];
    if (steps < 0 || steps > a.sequence) return {Fault::kSequenceLength, row, steps, a.sequence};
  }
  parallel.each(a.batch * a.num_heads, [&](int64_t index, int64_t slot) {
    const Workspace workspace(a, static_cast<float*>(a.workspace) + slot * static_cast<int64_t>(Workspace::floats(a)));
    const int64_t row = index / a.num_heads;
    Head(a, row, index % a.num_heads, a.sequence_lengths ? a.sequence_lengths[row] : a.sequence, workspace).run();
  });
  return {};
}

}  // namespace KIMI_CPU_LEVEL
}  // namespace kimi::cpu
