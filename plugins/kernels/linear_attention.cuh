// The standard's LinearAttention step by step, in float32. A warp holds all key rows of a few value columns of one
// state in registers, from its one load to its one store; value columns are independent of each other, so that nothing
// but the step's key, query and decay is shared between warps.
#pragma once

#include "fault.cuh"
#include "kda_params.cuh"

namespace kimi {

template <class T>
struct LinearAttentionParams {
  const T* __restrict__ query;
  const T* __restrict__ key;
  const T* __restrict__ value;
  const T* __restrict__ decay;  // null: none
  const T* __restrict__ beta;   // null: none
  // past and present may be the same memory
  const void* past_state;  // null: zeros
  T* output;
  void* present_state;
  int sequence;
  int kv_heads, key_heads, query_heads, output_heads, beta_heads;
  int queries;  // query heads that read one state
  int key_dim, value_dim;
  int state_type;     // KimiDataType
  int staged_steps;   // steps in shared memory at once
  int column_blocks;  // blocks that the value columns of one state are split over
  bool decay_per_key;
  bool vectors;  // value_dim is a multiple of 4: four columns are aligned
  float scale;
};

// kKeys: rows a warp has room for; key_dim is at most that, the rest are zeros.
template <int kKeys>
struct LinearAttentionLayout {
  static constexpr int kLaneRows = 16;  // of four columns: 64 registers of state
  static constexpr int kKeyLanes = kKeys / kLaneRows;
  static constexpr int kColumnLanes = kWarp / kKeyLanes;
  static constexpr int kColumns = 4 * kColumnLanes;  // of a warp
  static constexpr int kMaxWarps = 4;

  // one staged step, in floats: e^decay | key | queries | value | beta
  static constexpr int kFactor = 0;
  static constexpr int kKey = kKeys;
  static constexpr int kQuery = 2 * kKeys;
  KIMI_HOST_DEVICE static int value_at(int queries) { return (2 + queries) * kKeys; }
  KIMI_HOST_DEVICE static int beta_at(int queries, int columns) { return value_at(queries) + columns; }
  KIMI_HOST_DEVICE static int step_floats(int queries, int columns) { return beta_at(queries, columns) + 4; }
};

// e^x. A slow decay acts thousands of times, so that a factor close to 1 needs its last bit, which exp2 does not give.
KIMI_DEVICE float factor_of(float x) {
  const float series = fma(x, fma(x, fma(x, fma(x, fma(x, 1.0f / 720, 1.0f / 120), 1.0f / 24), 1.0f / 6), 0.5f), 1.0f);
  return fabsf(x) < 0.25f ? fma(x, series, 1.0f) : exp2(kLog2E * x);
}

// Four neighbouring columns of which `left` exist; the others are zeros, and are not written.
template <class S>
KIMI_DEVICE Floats load_columns(const S* p, int left, bool vectors) {
  if (vectors && left >= 4) return load4(p);
  Floats x = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < left) x.f[j] = to_float(p[j]);
  }
  return x;
}
template <class S>
KIMI_DEVICE void store_columns(S* p, const Floats& x, int left, bool vectors) {
  if (vectors && left >= 4) return store4(p, x);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < left) p[j] = from_float<S>(x.f[j]);
  }
}

// Sum of each column over the lanes that share it.
template <int kColumnLanes>
KIMI_DEVICE void sum_over_keys(Floats& x) {
#pragma unroll
  for (int mask = kColumnLanes; mask < kWarp; mask *= 2) {
#pragma unroll
    for (int j = 0; j < 4; ++j) x.f[j] += shuffle_xor(x.f[j], mask);
  }
}

template <class T, int kKeys>
KIMI_KERNEL(LinearAttentionLayout<kKeys>::kMaxWarps* kWarp, 3)
linear_attention(KIMI_GRID_CONSTANT LinearAttentionParams<T> p) {
  using Layout = LinearAttentionLayout<kKeys>;
  constexpr int kQuads = Layout::kLaneRows / 4;
  float* shared = reinterpret_cast<float*>(shared_memory());

  const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
  const int columns = block_threads() / kWarp * Layout::kColumns;  // of this block
  const int state = block_index() / p.column_blocks;
  const int n = state / p.kv_heads, h = state % p.kv_heads;
  const int first_column = block_index() % p.column_blocks * columns;
  const int lane_column = warp * Layout::kColumns + lane % Layout::kColumnLanes * 4;
  const int column = first_column + lane_column, left = p.value_dim - column;
  const int key_lane = lane / Layout::kColumnLanes;
  // rows of a lane lie in quads, so that the lanes of a column read neighbouring quads of the staged step
  auto row_of = [&](int quad, int e) { return (quad * Layout::kKeyLanes + key_lane) * 4 + e; };
  const int64_t state_at = static_cast<int64_t>(state) * p.key_dim * p.value_dim + column;
  const int step_floats = Layout::step_floats(p.queries, columns);
  const int query_head = h * p.query_heads / p.kv_heads;  // the first that reads this state
  const int key_head = h * p.key_heads / p.kv_heads;

  Floats S[Layout::kLaneRows] = {};
  auto load_state = [&](auto* past) {
#pragma unroll
    for (int r = 0; r < Layout::kLaneRows; ++r) {
      const int row = row_of(r / 4, r % 4);
      if (row < p.key_dim) {
        S[r] = load_columns(past + state_at + static_cast<int64_t>(row) * p.value_dim, left, p.vectors);
      }
    }
  };
  if (p.past_state == nullptr) {
  } else if (p.state_type == KIMI_FLOAT32) {
    load_state(static_cast<const float*>(p.past_state));
  } else if (p.state_type == KIMI_FLOAT16) {
    load_state(static_cast<const Half*>(p.past_state));
  } else {
    load_state(static_cast<const BFloat16*>(p.past_state));
  }

  for (int start = 0; start < p.sequence; start += p.staged_steps) {
    const int steps = p.sequence - start < p.staged_steps ? p.sequence - start : p.staged_steps;
    const int64_t first_row = static_cast<int64_t>(n) * p.sequence + start;
    if (start > 0) sync_threads();
    for (int i = thread; i < steps * kKeys; i += block_threads()) {
      const int s = i / kKeys, c = i % kKeys;
      const bool real = c < p.key_dim;
      float* step = shared + s * step_floats;
      const int64_t row = first_row + s;
      if (p.decay != nullptr) {
        const int64_t at = row * p.kv_heads + h;
        step[Layout::kFactor + c] =
            real ? factor_of(to_float(p.decay[p.decay_per_key ? at * p.key_dim + c : at])) : 0.0f;
      }
      step[Layout::kKey + c] = real ? to_float(p.key[(row * p.key_heads + key_head) * p.key_dim + c]) : 0.0f;
      for (int q = 0; q < p.queries; ++q) {
        step[Layout::kQuery + q * kKeys + c] =
            real ? to_float(p.query[(row * p.query_heads + query_head + q) * p.key_dim + c]) : 0.0f;
      }
    }
    for (int i = thread; i < steps * columns; i += block_threads()) {
      const int s = i / columns, c = i % columns;
      const int64_t at = ((first_row + s) * p.kv_heads + h) * p.value_dim + first_column + c;
      shared[s * step_floats + Layout::value_at(p.queries) + c] =
          first_column + c < p.value_dim ? to_float(p.value[at]) : 0.0f;
    }
    for (int s = thread; s < steps && p.beta != nullptr; s += block_threads()) {
      const int64_t at = (first_row + s) * p.beta_heads + (p.beta_heads == 1 ? 0 : h);
      shared[s * step_floats + Layout::beta_at(p.queries, columns)] = to_float(p.beta[at]);
    }
    KIMI_FAULT_BARRIER(sync_threads());

    for (int s = 0; s < steps; ++s) {
      const float* step = shared + s * step_floats;
      if (p.decay != nullptr) {
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
          const Floats factor = load4(step + Layout::kFactor + row_of(quad, 0));
#pragma unroll
          for (int e = 0; e < 4; ++e) {
#pragma unroll
            for (int j = 0; j < 4; ++j) S[quad * 4 + e].f[j] *= factor.f[e];
          }
        }
      }
      // S^T of a staged vector: what this lane's rows give, then the sum over the lanes
      auto read = [&](const float* vector) {
        Floats sum = {};
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
          const Floats x = load4(vector + row_of(quad, 0));
#pragma unroll
          for (int e = 0; e < 4; ++e) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum.f[j] = fma(x.f[e], S[quad * 4 + e].f[j], sum.f[j]);
          }
        }
        sum_over_keys<Layout::kColumnLanes>(sum);
        return sum;
      };
      Floats written = load4(step + Layout::value_at(p.queries) + lane_column);
      if (p.beta != nullptr) {
        const float beta = step[Layout::beta_at(p.queries, columns)];
        const Floats retrieved = read(step + Layout::kKey);
#pragma unroll
        for (int j = 0; j < 4; ++j) written.f[j] = beta * (written.f[j] - retrieved.f[j]);
      }
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        const Floats k = load4(step + Layout::kKey + row_of(quad, 0));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int j = 0; j < 4; ++j) S[quad * 4 + e].f[j] = fma(k.f[e], written.f[j], S[quad * 4 + e].f[j]);
        }
      }
      const int output_head = p.output_heads == p.kv_heads ? h : query_head;
      for (int q = 0; q < p.queries; ++q) {
        Floats o = read(step + Layout::kQuery + q * kKeys);
#pragma unroll
        for (int j = 0; j < 4; ++j) o.f[j] *= p.scale;
        const int64_t at = ((first_row + s) * p.output_heads + output_head + q) * p.value_dim + column;
        if (key_lane == 0) store_columns(p.output + at, o, left, p.vectors);
      }
    }
  }

  auto store_state = [&](auto* present) {
#pragma unroll
    for (int r = 0; r < Layout::kLaneRows; ++r) {
      const int row = row_of(r / 4, r % 4);
      if (row < p.key_dim) {
        store_columns(present + state_at + static_cast<int64_t>(row) * p.value_dim, S[r], left, p.vectors);
      }
    }
  };
  if (p.state_type == KIMI_FLOAT32) {
    store_state(static_cast<float*>(p.present_state));
  } else if (p.state_type == KIMI_FLOAT16) {
    store_state(static_cast<Half*>(p.present_state));
  } else {
    store_state(static_cast<BFloat16*>(p.present_state));
  }
}

}  // namespace kimi
