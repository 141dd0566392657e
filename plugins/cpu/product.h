// Matrix products of sizes that stay in the caches, for kernels that make and use their operands there.
#pragma once

#include "level.h"

namespace kimi::cpu {
namespace {

// Rows and vectors of a tile of results: what fits into the registers.
constexpr int64_t kTileRows = 6;
constexpr int kTileVectors = KIMI_LANES == 16 ? 4 : 2;

// c [M, N vectors] (+)= a [M, k] b [k, N vectors]; rows lie lda, ldb, ldc apart.
template <bool kAdd, int M, int N, class V>
void product_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  V sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j] = kAdd ? load<V>(c + i * ldc + j * lanes) : V{};
  }
  for (int64_t p = 0; p < k; ++p) {
    V row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) row[j] = load<V>(b + p * ldb + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] += a[i * lda + p] * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store<V>(c + i * ldc + j * lanes, sum[i][j]);
  }
}

template <bool kAdd, int N, class V>
void product_columns(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                     int64_t ldc) {
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows) {
    product_tile<kAdd, kTileRows, N, V>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc);
  }
  a += i * lda;
  c += i * ldc;
  switch (m - i) {
    case 5:
      return product_tile<kAdd, 5, N, V>(k, a, lda, b, ldb, c, ldc);
    case 4:
      return product_tile<kAdd, 4, N, V>(k, a, lda, b, ldb, c, ldc);
    case 3:
      return product_tile<kAdd, 3, N, V>(k, a, lda, b, ldb, c, ldc);
    case 2:
      return product_tile<kAdd, 2, N, V>(k, a, lda, b, ldb, c, ldc);
    case 1:
      return product_tile<kAdd, 1, N, V>(k, a, lda, b, ldb, c, ldc);
    default:
      return;
  }
}

// c [m, n] (+)= a [m, k] b [k, n]; rows lie lda, ldb, ldc apart.
template <bool kAdd>
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc) {
  int64_t j = 0;
  for (; j + kTileVectors * kLanes <= n; j += kTileVectors * kLanes) {
    product_columns<kAdd, kTileVectors, Vec>(m, k, a, lda, b + j, ldb, c + j, ldc);
  }
  for (; j + kLanes <= n; j += kLanes) product_columns<kAdd, 1, Vec>(m, k, a, lda, b + j, ldb, c + j, ldc);
  for (; j + 4 <= n; j += 4) product_columns<kAdd, 1, Quad>(m, k, a, lda, b + j, ldb, c + j, ldc);
  for (; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      float sum = kAdd ? c[i * ldc + j] : 0.0f;
      for (int64_t p = 0; p < k; ++p) sum += a[i * lda + p] * b[p * ldb + j];
      c[i * ldc + j] = sum;
    }
  }
}

// c [M, 4] = a [M, k] b^T, b [4, k].
template <int M>
void dots_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
  Vec sum[M][4] = {};
  int64_t p = 0;
  for (; p + kLanes <= k; p += kLanes) {
    Vec rows[4];
#pragma GCC unroll 8
    for (int j = 0; j < 4; ++j) rows[j] = load<Vec>(b + j * ldb + p);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec row = load<Vec>(a + i * lda + p);
#pragma GCC unroll 8
      for (int j = 0; j < 4; ++j) sum[i][j] += row * rows[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    Quad totals = sum_four(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    for (int64_t rest = p; rest < k; ++rest) {
#pragma GCC unroll 8
      for (int j = 0; j < 4; ++j) totals[j] += a[i * lda + rest] * b[j * ldb + rest];
    }
    store<Quad>(c + i * ldc, totals);
  }
}

// c [m, n] = a [m, k] b^T, b [n, k]: dot products of rows, for where transposing b would take longer.
inline void dots(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) dots_tile<4>(k, a + i * lda, lda, b + j * ldb, ldb, c + i * ldc + j, ldc);
    for (; i < m; ++i) dots_tile<1>(k, a + i * lda, lda, b + j * ldb, ldb, c + i * ldc + j, ldc);
  }
  for (; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t p = 0; p < k; ++p) sum += a[i * lda + p] * b[j * ldb + p];
      c[i * ldc + j] = sum;
    }
  }
}

// to [columns, rows] = from [rows, columns]^T; rows lie from_stride, to_stride apart.
inline void transpose(int64_t rows, int64_t columns, const float* from, int64_t from_stride, float* to,
                      int64_t to_stride) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    const float* const begin = from + i * from_stride;
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      const Quad p = load<Quad>(begin + c), q = load<Quad>(begin + from_stride + c);
      const Quad r = load<Quad>(begin + 2 * from_stride + c), s = load<Quad>(begin + 3 * from_stride + c);
      const Quad pq_low = __builtin_shufflevector(p, q, 0, 4, 1, 5), rs_low = __builtin_shufflevector(r, s, 0, 4, 1, 5);
      const Quad pq_high = __builtin_shufflevector(p, q, 2, 6, 3, 7),
                 rs_high = __builtin_shufflevector(r, s, 2, 6, 3, 7);
      store<Quad>(to + c * to_stride + i, __builtin_shufflevector(pq_low, rs_low, 0, 1, 4, 5));
      store<Quad>(to + (c + 1) * to_stride + i, __builtin_shufflevector(pq_low, rs_low, 2, 3, 6, 7));
      store<Quad>(to + (c + 2) * to_stride + i, __builtin_shufflevector(pq_high, rs_high, 0, 1, 4, 5));
      store<Quad>(to + (c + 3) * to_stride + i, __builtin_shufflevector(pq_high, rs_high, 2, 3, 6, 7));
    }
    for (; c < columns; ++c) {
      for (int64_t j = 0; j < 4; ++j) to[c * to_stride + i + j] = begin[j * from_stride + c];
    }
  }
  for (; i < rows; ++i) {
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + i] = from[i * from_stride + c];
  }
}

}  // namespace
}  // namespace kimi::cpu
