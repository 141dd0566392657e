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
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) sum[i][j] = kAdd ? load<V>(c + i * ldc + j * lanes) : V{};
  }
  for (int64_t p = 0; p < k; ++p) {
    V row[N];
    for (int j = 0; j < N; ++j) row[j] = load<V>(b + p * ldb + j * lanes);
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < N; ++j) sum[i][j] += a[i * lda + p] * row[j];
    }
  }
  for (int i = 0; i < M; ++i) {
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
  typedef float Four __attribute__((vector_size(16)));
  for (; j + 4 <= n; j += 4) product_columns<kAdd, 1, Four>(m, k, a, lda, b + j, ldb, c + j, ldc);
  for (; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      float sum = kAdd ? c[i * ldc + j] : 0.0f;
      for (int64_t p = 0; p < k; ++p) sum += a[i * lda + p] * b[p * ldb + j];
      c[i * ldc + j] = sum;
    }
  }
}

inline float sum_of(Vec v) {
  float lanes[kLanes];
  store<Vec>(lanes, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <int M, int N>
void dots_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
  Vec sum[M][N] = {};
  int64_t p = 0;
  for (; p + kLanes <= k; p += kLanes) {
    Vec rows[N];
    for (int j = 0; j < N; ++j) rows[j] = load<Vec>(b + j * ldb + p);
    for (int i = 0; i < M; ++i) {
      const Vec row = load<Vec>(a + i * lda + p);
      for (int j = 0; j < N; ++j) sum[i][j] += row * rows[j];
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      float total = sum_of(sum[i][j]);
      for (int64_t rest = p; rest < k; ++rest) total += a[i * lda + rest] * b[j * ldb + rest];
      c[i * ldc + j] = total;
    }
  }
}

// c [m, n] = a [m, k] b^T, b [n, k]: dot products of rows, for where transposing b would take longer.
inline void dots(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) dots_tile<4, 4>(k, a + i * lda, lda, b + j * ldb, ldb, c + i * ldc + j, ldc);
    for (; i < m; ++i) dots_tile<1, 4>(k, a + i * lda, lda, b + j * ldb, ldb, c + i * ldc + j, ldc);
  }
  for (; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) dots_tile<1, 1>(k, a + i * lda, lda, b + j * ldb, ldb, c + i * ldc + j, ldc);
  }
}

}  // namespace
}  // namespace kimi::cpu
