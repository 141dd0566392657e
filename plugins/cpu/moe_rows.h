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

constexpr int64_t kSumRows = 4;

// float32 weights [rows, columns]; a token's input is its row as it is.
struct FloatRows {
  const float* weights;
  int64_t columns;

  // totals[m] = weights[row] * x[m], added up to a vector. One row at a time: memory is read twice as fast in one
  // stream as in two.
  template <int M>
  void dot(int64_t row, const float* const* x, Vec* totals) const {
    // independent sums enough to hide an addition's latency
    constexpr int U = M >= 4 ? 1 : M >= 2 ? 2 : 4;
    Vec total[U][M] = {};
    const float* w = weights + row * columns;
    int64_t k = 0;
    for (; k + U * kLanes <= columns; k += U * kLanes) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const Vec value = load(w + k + u * kLanes);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) total[u][m] += value * load(x[m] + k + u * kLanes);
      }
    }
    for (; k < columns; k += kLanes) {
      const int64_t left = columns - k;
      const Vec value = left < kLanes ? load_some(w + k, left) : load(w + k);
      for (int m = 0; m < M; ++m) total[0][m] += value * (left < kLanes ? load_some(x[m] + k, left) : load(x[m] + k));
    }
    for (int m = 0; m < M; ++m) {
      totals[m] = total[0][m];
      for (int u = 1; u < U; ++u) totals[m] += total[u][m];
    }
  }
};

template <int M, class Rows, class Take>
inline void few_products_of(const Rows& rows, int64_t first, int64_t last, const float* const* x, const Take& take) {
  for (int64_t row = first; row < last; row += kSumRows) {
    const int64_t count = last - row < kSumRows ? last - row : kSumRows;
    Vec totals[kSumRows][M] = {};
    for (int64_t r = 0; r < count; ++r) rows.template dot<M>(row + r, x, totals[r]);
    for (int m = 0; m < M; ++m) {
      const Quad sums = sum_four(totals[0][m], totals[1][m], totals[2][m], totals[3][m]);
      for (int64_t r = 0; r < count; ++r) take(row + r, m, sums[r]);
    }
  }
}

// take(row, m, rows[row] . x[m]) for rows [first, last) and m below `count` <= kFewAtOnce.
template <class Rows, class Take>
inline void few_products(const Rows& rows, int64_t first, int64_t last, const float* const* x, int64_t count,
                         const Take& take) {
  switch (count) {
    case 1:
      return few_products_of<1>(rows, first, last, x, take);
    case 2:
      return few_products_of<2>(rows, first, last, x, take);
    case 3:
      return few_products_of<3>(rows, first, last, x, take);
    default:
      return few_products_of<4>(rows, first, last, x, take);
  }
}

}  // namespace
}  // namespace kimi::cpu
