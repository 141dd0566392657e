// Weights in 4 or 8 bits: rows of levels with a scale and a zero point for each block of columns, read where they lie.
//
// A chunk is a vector of 32-bit words of levels. A lane holds kLaneLevels consecutive columns, which share a scale as
// blocks are larger; inputs are put into that order once per token. Levels are never stored unpacked, but for tiles.
// With inputs in steps, blocks are looked after a vector at a time: a lane then holds what a block's scale and zero
// point make of the input's, and each chunk's lanes pick theirs.
#pragma once

#include "moe_dot4.h"
#include "moe_rows.h"

namespace kimi::cpu {
namespace {

inline Vec magnitude(Vec x) {
  const Words bits = reinterpret_cast<Words>(x) & 0x7fffffffu;
  return reinterpret_cast<Vec>(bits);
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// table[index % lanes] in every lane.
inline Vec permuted(Vec table, Words index) {
#if defined(__AVX512F__)
  // the masked form, because the plain one reads an uninitialised value by design
  return _mm512_maskz_permutexvar_ps(0xffff, reinterpret_cast<__m512i>(index), table);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(table, reinterpret_cast<__m256i>(index));
#else
  Vec value;
  for (int i = 0; i < KIMI_LANES; ++i) value[i] = table[index[i] % KIMI_LANES];
  return value;
#endif
}

// The first `count` <= kLanes floats, the rest zero.
inline Vec load_first(const float* from, int64_t count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#else
  return count == kLanes ? load(from) : load_some(from, count);
#endif
}

// One lane vector of `block` rows, `width` apart: the size of a step (127 make the largest magnitude) and its inverse.
// `poison` is NaN where the rows hold a NaN or an infinity, and zero elsewhere.
struct BlockScale {
  Vec scale, inverse, poison;
};

inline BlockScale block_scale(const float* from, int64_t width, int64_t block) {
  Vec largest{}, poison{};
  for (int64_t k = 0; k < block; ++k) {
    const Vec x = load(from + k * width);
    largest = larger(magnitude(x), largest);
    poison += x * 0.0f;
  }
  const Vec scale = largest / 127.0f;
  return {scale, scale > 0.0f ? 1.0f / scale : Vec{}, poison};
}

// Rounds every `block` rows of a strip [columns, width] to 127 steps of their largest magnitude in that lane. A block
// that holds a NaN or an infinity becomes NaN, as in the reference.
inline void round_strip(float* strip, int64_t columns, int64_t width, int64_t block) {
  for (int64_t k0 = 0; k0 < columns; k0 += block) {
    for (int64_t t = 0; t < width; t += kLanes) {
      float* from = strip + k0 * width + t;
      const auto [scale, inverse, poison] = block_scale(from, width, block);
      for (int64_t k = 0; k < block; ++k) {
        float* at = from + k * width;
        for (int64_t i = 0; i < kLanes; ++i) at[i] = __builtin_rintf(at[i] * inverse[i]);
        store(at, load(at) * scale + poison);
      }
    }
  }
}

// Steps of a strip, four to a word: words [columns / 4, width], and of each block of columns the scale and the sum of
// the steps times it, [columns / block, width].
struct StepStrip {
  uint32_t* words;
  float *scales, *sums;

  // In floats of memory.
  static int64_t size(int64_t columns, int64_t width, int64_t block) {
    return (columns / 4 + 2 * (columns / block)) * width;
  }
  StepStrip(float* memory, int64_t columns, int64_t width, int64_t block)
      : words(reinterpret_cast<uint32_t*>(memory)),
        scales(memory + columns / 4 * width),
        sums(scales + columns / block * width) {}
};

// Puts the columns [begin, end) of a strip, whole blocks, into their places. `strip` begins at column `begin`. A word
// holds every (Interleave)th column of 4 * Interleave, as the levels of a row's words do.
template <int Interleave>
inline void round_to_steps(const float* strip, int64_t begin, int64_t end, int64_t width, int64_t block,
                           const StepStrip& to) {
  for (int64_t k0 = begin; k0 < end; k0 += block) {
    for (int64_t t = 0; t < width; t += kLanes) {
      const float* from = strip + (k0 - begin) * width + t;
      const auto [scale, inverse, poison] = block_scale(from, width, block);
      Integers total{};
      for (int64_t k = 0; k < block; k += 4 * Interleave) {
        for (int64_t i = 0; i < Interleave; ++i) {
          Words word{};
          for (int64_t j = 0; j < 4; ++j) {
            float steps[KIMI_LANES];
            store(steps, load(from + (k + j * Interleave + i) * width) * inverse);
            for (float& step : steps) step = __builtin_rintf(step);
            const Integers whole = __builtin_convertvector(load(steps), Integers);
            total += whole;
            word |= (reinterpret_cast<Words>(whole) & 255u) << static_cast<uint32_t>(8 * j);
          }
          __builtin_memcpy(to.words + ((k0 + k) / 4 + i) * width + t, &word, sizeof word);
        }
      }
      const Vec finite = scale + poison;
      store(to.scales + k0 / block * width + t, finite);
      store(to.sums + k0 / block * width + t, __builtin_convertvector(total, Floats) * finite);
    }
  }
}

template <int Bits, bool Steps>
class LevelRows {
 public:
  // Strips of steps where this machine has products of bytes that are worth it.
#if defined(__AVX512VNNI__)
  static constexpr bool kStepStrips = Steps;
#elif defined(__SSSE3__)
  static constexpr bool kStepStrips = Steps && Bits == 4;
#else
  static constexpr bool kStepStrips = false;
#endif
  static constexpr bool kRounds = Steps && !kStepStrips;
  static constexpr int kInterleave = Bits == 4 ? 2 : 1;
  static constexpr int64_t kLaneLevels = 32 / Bits;
  static constexpr int64_t kChunk = kLaneLevels * kLanes;  // columns

  LevelRows(const ExpertWeights& w, int64_t expert, int64_t rows, int64_t columns, int64_t block)
      : columns_(columns), block_(block), blocks_(columns / block), zero_bytes_((blocks_ * Bits + 7) / 8) {
    levels_ = static_cast<const uint8_t*>(w.values) + expert * rows * (columns * Bits / 8);
    scales_ = w.scales + expert * rows * blocks_;
    zeros_ = w.zero_points ? w.zero_points + expert * rows * zero_bytes_ : nullptr;
    for (int i = 0; i < KIMI_LANES; ++i) {
      lane_column_[i] = static_cast<uint32_t>(i * kLaneLevels);
      lane_block_[i] = static_cast<uint32_t>(i * kLaneLevels / block);
      zero_shift_[i] = lane_block_[i] * Bits;
    }
    chunk_blocks_ = kChunk > block ? kChunk / block : 1;
    shift_ = static_cast<uint32_t>(__builtin_ctzll(static_cast<uint64_t>(block)));
  }

  // Ranges of columns that can be prepared by themselves.
  static int64_t granule(int64_t block) { return block > kChunk ? block : kChunk; }
  // Floats of a prepared input of so many columns.
  static int64_t prepared(int64_t columns) {
    const int64_t chunks = (columns + kChunk - 1) / kChunk * kChunkFloats;
    return Steps ? chunks + 2 * ((columns / kLeastBlock + kLanes - 1) / kLanes * kLanes) : chunks;
  }

  // Puts the columns [begin, end) of x, whole granules but for the end of its `columns`, into their places in `to`.
  // Chunk by chunk, the inputs in the lanes of their levels, then what becomes of the middle level in each lane. With
  // steps, after all chunks, vectors of the blocks' scales and of the sums of their steps in turn.
  static void prepare(const float* x, int64_t begin, int64_t end, int64_t columns, int64_t block, float* to) {
    for (int64_t k0 = begin; k0 < end; k0 += kChunk) {
      const int64_t count = end - k0 < kChunk ? end - k0 : kChunk;
      float values[kChunk] = {};
      copy_floats(values, x + k0, count);
      if constexpr (Steps) {
        for (int64_t k = 0; k < count; k += block) {
          // a block larger than a chunk is measured again for each: it is in the nearest cache
          const int64_t index = (k0 + k) / block, length = block < count ? block : count;
          float* const blocks = to + groups(columns) + index / kLanes * 2 * kLanes + index % kLanes;
          const float scale = to_steps(x + index * block, block, values + k, length);
          float total = (k0 + k) % block == 0 ? 0.0f : blocks[kLanes];
          for (int64_t i = 0; i < length; ++i) total += values[k + i];
          blocks[0] = scale;
          blocks[kLanes] = total;
        }
      }
      float* out = to + k0 / kChunk * kChunkFloats;
      for (int64_t i = 0; i < kLanes; ++i) {
        const float* lane = values + i * kLaneLevels;
        float total = 0.0f;
        for (int64_t s = 0; s < kLaneLevels; ++s) total += lane[s];
        if constexpr (Steps) {
          const int32_t shift = -(1 << (Bits - 1)) * static_cast<int32_t>(total);
          __builtin_memcpy(out + kInputs + i, &shift, sizeof shift);
          int8_t* bytes = reinterpret_cast<int8_t*>(out);
          // with 4 bits, words of the even levels, then of the odd
          constexpr int64_t words = kLaneLevels / 4;
          for (int64_t s = 0; s < kLaneLevels; ++s) {
            bytes[(s % words * kLanes + i) * 4 + s / words] = static_cast<int8_t>(lane[s]);
          }
        } else {
          out[kInputs + i] = total;
          for (int64_t s = 0; s < kLaneLevels; ++s) out[s * kLanes + i] = lane[s];
        }
      }
    }
  }

  // totals[m] = row `row` * x[m], prepared, added up to a vector.
  template <int M>
  void dot(int64_t row, const float* const* x, Vec* totals) const {
    const int64_t whole = columns_ / kChunk, left = columns_ - whole * kChunk;
    const uint8_t* levels = levels_ + row * (columns_ * Bits / 8);
    const float* scales = scales_ + row * blocks_;
    const uint8_t* zeros = zeros_ ? zeros_ + row * zero_bytes_ : nullptr;
    // the last chunk, whose memory may end within it
    uint8_t last_levels[4 * KIMI_LANES] = {};
    if (left > 0) {
      __builtin_memcpy(last_levels, levels + whole * kChunk * Bits / 8, static_cast<size_t>(left * Bits / 8));
    }
    Vec total[M] = {};
    if constexpr (Steps) {
      Vec scaled[M] = {};
      Words column = lane_column_;
      int64_t c = 0;
      for (int64_t b = 0; b < blocks_; b += kLanes) {
        const int64_t count = blocks_ - b < kLanes ? blocks_ - b : kLanes;
        const Vec scale = load_first(scales + b, count);
        const Vec zero = zeros ? zeros_of(zeros, b, count) : Vec{};
        for (int m = 0; m < M; ++m) {
          const float* blocks = x[m] + groups(columns_) + 2 * b;
          scaled[m] = scale * load_first(blocks, count);
          if (zeros) total[m] -= scaled[m] * (zero * load_first(blocks + kLanes, count));
        }
        const int64_t end = (b + kLanes) * block_ / kChunk < whole ? (b + kLanes) * block_ / kChunk : whole;
        for (; c < end; ++c) {
          // a page ahead these products take a tenth less: they are done sooner than memory delivers
          __builtin_prefetch(levels + c * kChunk * Bits / 8 + 4096);
          add_steps<M>(levels + c * kChunk * Bits / 8, column >> shift_, x, c, scaled, total);
          column += static_cast<uint32_t>(kChunk);
        }
      }
      if (left > 0) add_steps<M>(last_levels, column >> shift_, x, whole, scaled, total);
    } else {
      for (int64_t c = 0; c < whole; ++c) {
        const int64_t first = c * kChunk >> shift_;
        add_chunk<M>(levels + c * kChunk * Bits / 8, scales + first, zeros ? zeros + first * Bits / 8 : nullptr, first,
                     x, c, total);
      }
      if (left > 0) {
        const int64_t first = whole * kChunk >> shift_, zero = first * Bits / 8;
        uint8_t last_zeros[2] = {};
        float last_scales[kMaxBlocks] = {};
        copy_floats(last_scales, scales + first, (left + block_ - 1) / block_);
        if (zeros) __builtin_memcpy(last_zeros, zeros + zero, static_cast<size_t>(zero_bytes_ - zero));
        add_chunk<M>(last_levels, last_scales, zeros ? last_zeros : nullptr, first, x, whole, total);
      }
    }
    for (int m = 0; m < M; ++m) totals[m] = total[m];
  }

  // Rows [row, row + count) as floats, in `scratch`, and their distance.
  const float* panel(int64_t row, int64_t count, float* scratch, int64_t* stride) const {
    *stride = columns_;
    for (int64_t r = 0; r < count; ++r) {
      const uint8_t* levels = levels_ + (row + r) * (columns_ * Bits / 8);
      float* to = scratch + r * columns_;
      for (int64_t b = 0; b < blocks_; ++b) {
        const float scale = scales_[(row + r) * blocks_ + b];
        const int32_t zero = zeros_ ? zero_of(row + r, b) : 1 << (Bits - 1);
        const uint8_t* from = levels + b * block_ * Bits / 8;
        for (int64_t k = 0; k < block_ * Bits / 8; ++k) {
          if constexpr (Bits == 8) {
            to[b * block_ + k] = static_cast<float>(from[k] - zero) * scale;
          } else {
            to[b * block_ + 2 * k] = static_cast<float>((from[k] & 15) - zero) * scale;
            to[b * block_ + 2 * k + 1] = static_cast<float>((from[k] >> 4) - zero) * scale;
          }
        }
      }
    }
    return scratch;
  }

  // y[r * width + t] of rows [row, row + R) by a strip of V vectors of steps; `scratch` holds R * columns bytes.
  template <int R, int V>
  void step_tile(int64_t row, const StepStrip& strip, uint32_t* scratch, float* y) const {
    const uint32_t* levels;
    if constexpr (Bits == 4) {
      for (int64_t r = 0; r < R; ++r) unpack(levels_ + (row + r) * columns_ / 2, scratch + r * (columns_ / 4));
      levels = scratch;
    } else {
      levels = reinterpret_cast<const uint32_t*>(levels_ + row * columns_);
    }
    constexpr int64_t width = V * kLanes;
    const int64_t words = columns_ / 4, block_words = block_ / 4;
    for (int64_t b = 0; b < blocks_; ++b) {
      Integers total[R][V] = {};
      for (int64_t k = b * block_words; k < (b + 1) * block_words; ++k) {
        Words x[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) x[v] = load_words(strip.words + (k * V + v) * kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          uint32_t word;
          __builtin_memcpy(&word, levels + r * words + k, sizeof word);
          const Words w = word - Words{};
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            total[r][v] = Bits == 4 ? dot4_nibbles(total[r][v], w, x[v]) : dot4(total[r][v], w, x[v]);
          }
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const float scale = scales_[(row + r) * blocks_ + b];
        const float zero = static_cast<float>(zeros_ ? zero_of(row + r, b) : 1 << (Bits - 1));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const int64_t at = b * width + v * kLanes;
          const Vec sum = __builtin_convertvector(total[r][v], Floats) * load(strip.scales + at);
          const Vec added = (sum - zero * load(strip.sums + at)) * scale;
          float* to = y + (r * V + v) * kLanes;
          store(to, b == 0 ? added : load(to) + added);
        }
      }
    }
  }

 private:
  // Words of four levels of a row: the low halves of each word's bytes, then the high ones.
  void unpack(const uint8_t* row, uint32_t* to) const {
    for (int64_t i = 0; i < columns_ / 8; ++i) {
      uint32_t word;
      __builtin_memcpy(&word, row + 4 * i, sizeof word);
      to[2 * i] = word & 0x0f0f0f0fu;
      to[2 * i + 1] = word >> 4 & 0x0f0f0f0fu;
    }
  }

  static constexpr int64_t kMaxBlocks = kChunk / 32 > 0 ? kChunk / 32 : 1;
  static constexpr int64_t kInputs = Steps ? kLaneLevels / 4 * kLanes : kChunk;  // floats
  static constexpr int64_t kChunkFloats = kInputs + kLanes;
  static constexpr int64_t kLeastBlock = 32;

  // Floats before the blocks of a prepared input.
  static int64_t groups(int64_t columns) { return (columns + kChunk - 1) / kChunk * kChunkFloats; }

  // Steps of `length` values of `from`'s block, already in `values`, and the block's scale; NaN if that is not finite.
  static float to_steps(const float* from, int64_t block, float* values, int64_t length) {
    float largest = 0.0f, poison = 0.0f;
    for (int64_t k = 0; k < block; ++k) {
      const float size = __builtin_fabsf(from[k]);
      largest = size > largest ? size : largest;
      poison += from[k] * 0.0f;
    }
    const float scale = largest / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    if (poison != poison) {
      fill_zero(values, length);
      return poison;
    }
    for (int64_t k = 0; k < length; ++k) values[k] = __builtin_rintf(values[k] * inverse);
    return scale;
  }

  int32_t zero_of(int64_t row, int64_t block) const {
    const uint8_t* zeros = zeros_ + row * zero_bytes_;
    return Bits == 8 ? zeros[block] : zeros[block / 2] >> (block % 2 * 4) & 15;
  }

  // A block's value in each of its lanes.
  Vec scale_lanes(const float* scales) const {
    if (chunk_blocks_ == 1) return broadcast(scales[0]);
#ifdef __AVX512F__
    return permuted(load_first(scales, chunk_blocks_), lane_block_);
#else
    // two blocks at most, in words of 8 lanes or fewer
    return lane_block_ != 0u ? broadcast(scales[kMaxBlocks - 1]) : broadcast(scales[0]);
#endif
  }

  // The zero points of a chunk whose first block is `first`, less the middle level.
  Vec zero_lanes(const uint8_t* zeros, int64_t first) const {
    uint32_t bits = zeros[0];
    if (chunk_blocks_ * Bits > 8) bits |= static_cast<uint32_t>(zeros[1]) << 8;
    bits >>= first * Bits % 8;
    const Words lanes = ((bits - Words{}) >> zero_shift_) & ((1u << Bits) - 1);
    return __builtin_convertvector(reinterpret_cast<Integers>(lanes), Floats);
  }

  // The zero points of `count` blocks from `first` on, a multiple of the lanes, less the middle level.
  static Vec zeros_of(const uint8_t* zeros, int64_t first, int64_t count) {
    const uint8_t* const from = zeros + first * Bits / 8;
#if defined(__AVX512F__)
    const auto some = static_cast<__mmask16>((1u << ((count * Bits + 7) / 8)) - 1);
    const __m128i bytes = _mm_maskz_loadu_epi8(some, from);
    __m512i lanes = _mm512_maskz_cvtepu8_epi32(0xffff, bytes);
    if constexpr (Bits == 4) {
      // each byte is two blocks: word 0 in the first eight lanes, word 1 in the others
      const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
      const __m512i shift = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
      const __m512i words = _mm512_maskz_permutexvar_epi32(0xffff, half, _mm512_zextsi128_si512(bytes));
      lanes = _mm512_and_si512(_mm512_maskz_srlv_epi32(0xffff, words, shift), _mm512_set1_epi32(15));
    }
    const Integers whole = reinterpret_cast<Integers>(lanes);
#else
    Integers whole{};
    for (int64_t i = 0; i < count; ++i) whole[i] = Bits == 8 ? from[i] : from[i / 2] >> (i % 2 * 4) & 15;
#endif
    return __builtin_convertvector(whole, Floats) - static_cast<float>(1 << (Bits - 1));
  }

  // A chunk by inputs in steps; `block` has the block of each lane, `scaled` the blocks' scales by those of the inputs.
  template <int M>
  inline __attribute__((always_inline)) void add_steps(const uint8_t* levels, Words block, const float* const* x,
                                                       int64_t chunk, const Vec* scaled, Vec* total) const {
    const Words words = load_words(levels);
    const Words low = words & 0x0f0f0f0fu, high = words >> 4 & 0x0f0f0f0fu;
    for (int m = 0; m < M; ++m) {
      const float* const at = x[m] + chunk * kChunkFloats;
      Integers products = reinterpret_cast<Integers>(load_words(at + kInputs));
      if constexpr (Bits == 4)
        products = dot4_nibbles(dot4_nibbles(products, low, load_words(at)), high, load_words(at + kLanes));
      else
        products = dot4(products, words, load_words(at));
      total[m] += __builtin_convertvector(products, Floats) * permuted(scaled[m], block);
    }
  }

  // The same by inputs as they are.
  template <int M>
  inline __attribute__((always_inline)) void add_chunk(const uint8_t* levels, const float* scales, const uint8_t* zeros,
                                                       int64_t first, const float* const* x, int64_t chunk,
                                                       Vec* total) const {
    constexpr float kMiddle = 1 << (Bits - 1);
    const Words words = load_words(levels);
    const Vec scale = scale_lanes(scales);
    const float* at[M];
    for (int m = 0; m < M; ++m) at[m] = x[m] + chunk * kChunkFloats;
    Vec sums[M];
    for (int m = 0; m < M; ++m) sums[m] = Vec{};
    if (zeros) {
      const Vec shift = kMiddle - zero_lanes(zeros, first);
      for (int m = 0; m < M; ++m) sums[m] = shift * load(at[m] + kInputs);
    }
#pragma GCC unroll 8
    for (int s = 0; s < kLaneLevels; ++s) {
      const Vec values = centred(words, s);
      for (int m = 0; m < M; ++m) sums[m] += values * load(at[m] + s * kLanes);
    }
    for (int m = 0; m < M; ++m) total[m] += sums[m] * scale;
  }

  // The levels number s of every lane, less the middle one.
  static Vec centred(Words words, int s) {
#ifdef __AVX512F__
    if constexpr (Bits == 4) {
      // reads the low four bits of each index
      const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
      return permuted(table, words >> (4 * s));
    }
#endif
    const Words flipped = words ^ (Bits == 4 ? 0x88888888u : 0x80808080u);
    const Words top = flipped << (32 - Bits * (s + 1));
    return __builtin_convertvector(reinterpret_cast<Integers>(top) >> (32 - Bits), Floats);
  }

  const uint8_t* levels_;
  const float* scales_;
  const uint8_t* zeros_;
  int64_t columns_, block_, blocks_, zero_bytes_, chunk_blocks_;
  uint32_t shift_;  // of a column to its block
  Words lane_column_, lane_block_, zero_shift_;
};

}  // namespace
}  // namespace kimi::cpu
