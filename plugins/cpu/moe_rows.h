// Products of a few tokens: rows of weights are read once, where they lie, and summed along the row.
#pragma once

#include "level.h"

namespace kimi::cpu {
namespace {

constexpr int64_t kFewAtOnce = 4;  // tokens that share a reading of a row

inline Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof value); }

inline Vec broadcast(float value) { return value - Vec{}; }

// `count` < kLanes floats, the rest zero.
inline Vec load_some(const float* from, int64_t count) {
  Vec value{};
  __builtin_memcpy(&value, from, static_cast<size_t>(count) * sizeof(float));
  return value;
}

// The lanes added in halves: always the same order.
inline float sum(Vec value) {
  float lanes[KIMI_LANES];
  store(lanes, value);
  for (int half = KIMI_LANES / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// float32 weights [rows, columns]; a token's input is its row as it is.
struct FloatRows {
  const float* weights;
  int64_t columns;

  // sums[r * M + m] = weights[row + r] . x[m]
  template <int R, int M>
  void dot(int64_t row, const float* const* x, float* sums) const {
    // independent sums enough to hide an addition's latency
    constexpr int U = R * M >= 8 ? 1 : R * M >= 4 ? 2 : 4;
    Vec total[U][R][M] = {};
    const float* w = weights + row * columns;
    int64_t k = 0;
    for (; k + U * kLanes <= columns; k += U * kLanes) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const float* from = w + r * columns + k + u * kLanes;
          __builtin_prefetch(from + R * columns);
          const Vec value = load(from);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) total[u][r][m] += value * load(x[m] + k + u * kLanes);
        }
      }
    }
    for (; k < columns; k += kLanes) {
      const int64_t left = columns - k;
      for (int r = 0; r < R; ++r) {
        const float* from = w + r * columns + k;
        const Vec value = left < kLanes ? load_some(from, left) : load(from);
        for (int m = 0; m < M; ++m) {
          total[0][r][m] += value * (left < kLanes ? load_some(x[m] + k, left) : load(x[m] + k));
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int m = 0; m < M; ++m) {
        Vec all = total[0][r][m];
        for (int u = 1; u < U; ++u) all += total[u][r][m];
        sums[r * M + m] = sum(all);
      }
    }
  }
};

template <int M, class Rows, class Take>
inline void few_products_of(const Rows& rows, int64_t first, int64_t last, const float* const* x, int64_t m0,
                            const Take& take) {
  constexpr int R = M == 1 && KIMI_LANES < 16 ? 2 : M <= 2 ? 2 : KIMI_LANES == 16 ? 4 : 2;
  float sums[R * M];
  int64_t row = first;
  for (; row + R <= last; row += R) {
    rows.template dot<R, M>(row, x + m0, sums);
    for (int r = 0; r < R; ++r) {
      for (int m = 0; m < M; ++m) take(row + r, m0 + m, sums[r * M + m]);
    }
  }
  for (; row < last; ++row) {
    rows.template dot<1, M>(row, x + m0, sums);
    for (int m = 0; m < M; ++m) take(row, m0 + m, sums[m]);
  }
}

// take(row, m, rows[row] . x[m]) for rows [first, last) and m below `count` <= kFewAtOnce.
template <class Rows, class Take>
inline void few_products(const Rows& rows, int64_t first, int64_t last, const float* const* x, int64_t count,
                         const Take& take) {
  switch (count) {
    case 1:
      return few_products_of<1>(rows, first, last, x, 0, take);
    case 2:
      return few_products_of<2>(rows, first, last, x, 0, take);
    case 3:
      return few_products_of<3>(rows, first, last, x, 0, take);
    default:
      return few_products_of<4>(rows, first, last, x, 0, take);
  }
}

}  // namespace
}  // namespace kimi::cpu
