// Products of many tokens: a strip of tokens lies transposed, [columns, width], so that each lane is a token and rows
// of weights are read as they lie, one value for all lanes.
#pragma once

#include <type_traits>
#include <utility>

#include "moe_rows.h"

namespace kimi::cpu {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileVecs = KIMI_LANES == 16 ? 4 : 2;  // as many sums as registers hold
constexpr int64_t kStrip = kTileVecs * kLanes;       // tokens of a full strip

// Exchanges blocks of S lanes between rows S apart; all S in turn are a transposition.
template <int S, int... Lane>
inline void exchange(Vec* rows, std::integer_sequence<int, Lane...> lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < KIMI_LANES; ++i) {
    if (i & S) continue;
    const Vec a = rows[i], b = rows[i + S];
    rows[i] = __builtin_shufflevector(a, b, (Lane & S ? KIMI_LANES + Lane - S : Lane)...);
    rows[i + S] = __builtin_shufflevector(a, b, (Lane & S ? KIMI_LANES + Lane : Lane + S)...);
  }
  if constexpr (S > 1) exchange<S / 2>(rows, lanes);
}

inline void transpose(Vec* rows) { exchange<KIMI_LANES / 2>(rows, std::make_integer_sequence<int, KIMI_LANES>{}); }

// strip[k * width + t] = x[t][k]; zero for the lanes beyond `count`.
inline void pack_strip(const float* const* x, int64_t count, int64_t width, int64_t columns, float* strip) {
  for (int64_t t = 0; t < width; t += kLanes) {
    for (int64_t k = 0; k < columns; k += kLanes) {
      const int64_t left = columns - k;
      Vec rows[KIMI_LANES];
      for (int i = 0; i < KIMI_LANES; ++i) {
        if (t + i >= count)
          rows[i] = Vec{};
        else
          rows[i] = left < kLanes ? load_some(x[t + i] + k, left) : load(x[t + i] + k);
      }
      transpose(rows);
      for (int64_t i = 0; i < (left < kLanes ? left : kLanes); ++i) store(strip + (k + i) * width + t, rows[i]);
    }
  }
}

// y[r * width + t] = sum over k of weights[r * stride + k] * strip[k * width + t], width = V vectors.
template <int R, int V>
inline void tile(const float* weights, int64_t stride, const float* strip, int64_t columns, float* y) {
  Vec total[R][V] = {};
  for (int64_t k = 0; k < columns; ++k) {
    Vec x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(strip + (k * V + v) * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Vec w = broadcast(weights[r * stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[r][v] += w * x[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(y + (r * V + v) * kLanes, total[r][v]);
  }
}

template <int R, class Tile>
inline void tile_of(int64_t row, int64_t vecs, const Tile& tile) {
  constexpr std::integral_constant<int, R> rows{};
  if constexpr (kTileVecs == 4) {
    if (vecs == 4) return tile(row, rows, std::integral_constant<int, 4>{});
    if (vecs == 3) return tile(row, rows, std::integral_constant<int, 3>{});
  }
  if (vecs == 2) return tile(row, rows, std::integral_constant<int, 2>{});
  return tile(row, rows, std::integral_constant<int, 1>{});
}

// tile(row, R, V) for all of `count` rows, R at a time, of a strip of V = `vecs` vectors.
template <class Tile>
inline void tile_rows(int64_t count, int64_t vecs, const Tile& tile) {
  int64_t row = 0;
  for (; row + 6 <= count; row += 6) tile_of<6>(row, vecs, tile);
  for (; row + 4 <= count; row += 4) tile_of<4>(row, vecs, tile);
  for (; row + 2 <= count; row += 2) tile_of<2>(row, vecs, tile);
  for (; row < count; ++row) tile_of<1>(row, vecs, tile);
}

// take(t, to, value, left): the first `left` <= kLanes of `value` belong at to = output[t] + n, which is y[n * width +
// t], for n below `rows` and tokens t below `count`.
template <class Take>
inline void each_transposed(const float* y, int64_t width, int64_t rows, int64_t count, float* const* output,
                            const Take& take) {
  for (int64_t n = 0; n < rows; n += kLanes) {
    const int64_t left = rows - n < kLanes ? rows - n : kLanes;
    for (int64_t t = 0; t < count; t += kLanes) {
      Vec block[KIMI_LANES];
      for (int i = 0; i < KIMI_LANES; ++i) block[i] = i < left ? load(y + (n + i) * width + t) : Vec{};
      transpose(block);
      for (int64_t i = 0; i < kLanes && t + i < count; ++i) take(t + i, output[t + i] + n, block[i], left);
    }
  }
}

// output[t][n] += weight[t] * y[n * width + t].
inline void add_transposed(const float* y, int64_t width, int64_t rows, int64_t count, const float* weights,
                           float* const* output) {
  each_transposed(y, width, rows, count, output, [&](int64_t t, float* to, Vec block, int64_t left) {
    const Vec value = block * weights[t];
    if (left == kLanes)
      store(to, load(to) + value);
    else
      for (int64_t j = 0; j < left; ++j) to[j] += value[j];
  });
}

// output[t][n] = y[n * width + t].
inline void store_transposed(const float* y, int64_t width, int64_t rows, int64_t count, float* const* output) {
  each_transposed(y, width, rows, count, output, [](int64_t, float* to, Vec value, int64_t left) {
    __builtin_memcpy(to, &value, static_cast<size_t>(left) * sizeof(float));
  });
}

}  // namespace
}  // namespace kimi::cpu
