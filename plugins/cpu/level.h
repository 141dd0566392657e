// What the kernel sources share: the instruction set they are compiled for, vectors of it, and functions that
// vectorise.
//
// CMake compiles each source once per instruction set with KIMI_CPU_LEVEL naming it; everything here has internal
// linkage.
#pragma once

#include <utility>

#include "kimi_cpu.h"

#if defined(__AVX512F__)
#define KIMI_LANES 16
#elif defined(__AVX__)
#define KIMI_LANES 8
#else
#define KIMI_LANES 4
#endif

namespace kimi::cpu {
namespace {

typedef float Vec __attribute__((vector_size(4 * KIMI_LANES)));
// Of at most 8 floats: the tail of a row whose length is a multiple of 8.
typedef float HalfVec __attribute__((vector_size(KIMI_LANES == 4 ? 16 : 32)));

inline constexpr int64_t kLanes = KIMI_LANES;

// At any address.
template <class V>
inline V load(const float* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(float* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

typedef float Quad __attribute__((vector_size(16)));

template <class V, int... Lane>
inline auto add_halves(V value, std::integer_sequence<int, Lane...>) {
  constexpr int half = sizeof...(Lane);
  return __builtin_shufflevector(value, value, Lane...) + __builtin_shufflevector(value, value, (Lane + half)...);
}

inline Quad quarter(Vec value) {
#if KIMI_LANES == 16
  return add_halves(add_halves(value, std::make_integer_sequence<int, 8>{}), std::make_integer_sequence<int, 4>{});
#elif KIMI_LANES == 8
  return add_halves(value, std::make_integer_sequence<int, 4>{});
#else
  return value;
#endif
}

// The sum of each vector's lanes, in an order that does not depend on the others.
inline Quad sum_four(Vec a, Vec b, Vec c, Vec d) {
  const Quad p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
  const Quad pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const Quad rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

inline int32_t bits_of(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(int32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// e^x to two units in the last place, over- and underflow included; NaN stays NaN. Free of branches, so that loops over
// it vectorise: x = n ln 2 + r with |r| <= ln 2 / 2, the Taylor series of e^r, and 2^n in two factors.
inline float exp_of(float x) {
  const float clamped = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
  const float shifted = clamped * 1.44269504f + 12582912.0f;
  const int32_t n = bits_of(shifted) - bits_of(12582912.0f);
  const float whole = shifted - 12582912.0f;
  const float r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float y = 1.0f / 5040;
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r * r + r + 1.0f;
  const int32_t half = n >> 1;
  return y * float_of((half + 127) << 23) * float_of((n - half + 127) << 23);
}

inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// log(1 + e^x), exact to the last bits for very negative x too, where it is e^x: a slow decay lives on values of 1e-4.
// log(1 + u) = 2 atanh(u / (2 + u)), whose argument is at most 1/3.
inline float softplus_of(float x) {
  const float u = exp_of(x < 0.0f ? x : -x);
  const float s = u / (2.0f + u), s2 = s * s;
  float series = 1.0f / 15;
  series = series * s2 + 1.0f / 13;
  series = series * s2 + 1.0f / 11;
  series = series * s2 + 1.0f / 9;
  series = series * s2 + 1.0f / 7;
  series = series * s2 + 1.0f / 5;
  series = series * s2 + 1.0f / 3;
  return (x < 0.0f ? 0.0f : x) + 2.0f * (s + s * s2 * series);
}

inline void copy_floats(float* to, const float* from, int64_t count) {
  __builtin_memmove(to, from, static_cast<size_t>(count) * sizeof(float));
}

inline void fill_zero(float* to, int64_t count) { __builtin_memset(to, 0, static_cast<size_t>(count) * sizeof(float)); }

}  // namespace
}  // namespace kimi::cpu
