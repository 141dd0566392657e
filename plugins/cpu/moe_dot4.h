// Products of bytes: four of each 32-bit lane at a time, unsigned levels by signed steps.
#pragma once

#include "level.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kimi::cpu {
namespace {

typedef uint32_t Words __attribute__((vector_size(4 * KIMI_LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * KIMI_LANES)));
typedef float Floats __attribute__((vector_size(4 * KIMI_LANES)));

inline Words load_words(const void* from) {
  Words value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

// total + sum over the four bytes of each lane of a (0 .. 15) by b (-127 .. 127).
inline Integers dot4_nibbles(Integers total, Words a, Words b) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Integers>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(total), reinterpret_cast<__m512i>(a),
                                                        reinterpret_cast<__m512i>(b)));
#elif defined(__AVX512BW__)
  // pairs stay below 2^15
  const __m512i pairs = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
  return total + reinterpret_cast<Integers>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  return total + reinterpret_cast<Integers>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__SSSE3__)
  const __m128i pairs = _mm_maddubs_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b));
  return total + reinterpret_cast<Integers>(_mm_madd_epi16(pairs, _mm_set1_epi16(1)));
#else
  const auto* left = reinterpret_cast<const uint8_t*>(&a);
  const auto* right = reinterpret_cast<const int8_t*>(&b);
  for (int i = 0; i < KIMI_LANES; ++i) {
    for (int j = 0; j < 4; ++j) total[i] += left[4 * i + j] * right[4 * i + j];
  }
  return total;
#endif
}

// The same for a of 0 .. 255.
inline Integers dot4(Integers total, Words a, Words b) {
#if defined(__AVX512VNNI__) || !defined(__SSSE3__)
  return dot4_nibbles(total, a, b);
#else
  // pairs of whole bytes could pass 2^15
  const Integers high = dot4_nibbles(Integers{}, a >> 4 & 0x0f0f0f0fu, b);
  return dot4_nibbles(total, a & 0x0f0f0f0fu, b) + (high << 4);
#endif
}

}  // namespace
}  // namespace kimi::cpu
