// The record that prep writes for a tile of 32 tokens of one head, and chain reads: operands of the matrix units, laid
// out in memory as they lie in shared memory. Offsets in bytes.
//
// Every operand is a matrix of 16-bit values in rows of 128 or 64 bytes, whose 16-byte pieces change places by the row:
// so eight rows of one column of pieces meet every bank once, and Hopper's matrix units read them as they are.
#pragma once

#include "kda_params.cuh"

namespace kimi {

constexpr int kWidePitch = 128, kNarrowPitch = kTile * 2;
static_assert(kNarrowPitch == 64, "the swizzle of the narrow rows");

// Where byte `at` of a matrix of rows of `kPitch` bytes lies.
template <int kPitch>
KIMI_HOST_DEVICE int swizzled(int at) {
  static_assert(kPitch == kWidePitch || kPitch == kNarrowPitch, "");
  return at ^ (at >> 7 & (kPitch == kWidePitch ? 7 : 3)) << 4;
}

template <int D>
struct TileRecord {
  static constexpr int kSteps = D / 16;            // along the keys
  static constexpr int kKeyBytes = kTile * D * 2;  // tokens times keys
  static constexpr int kSquareBytes = kTile * kTile * 2;
  static constexpr int kValueBytes = 16 * kTile * 2;  // of 16 values, a warp's share
  // [D / 64][token][64 keys]; keys are negated, so that v - k S is a sum
  static constexpr int kKeys = 0;                        // -k_i e^{G_i}
  static constexpr int kQueries = kKeys + kKeyBytes;     // scale q_i e^{G_i}
  static constexpr int kEndKeys = kQueries + kKeyBytes;  // [key][token]: k_i e^{G_31 - G_i}
  static constexpr int kInverse = kEndKeys + kKeyBytes;  // [i][j]: ((I + A)^-1 diag(beta))_ij
  // what rounding took from it: tokens nearly alike add up its errors, while what they add up to is small
  static constexpr int kInverseRest = kInverse + kSquareBytes;
  static constexpr int kAttention = kInverseRest + kSquareBytes;  // [i][j]: scale q_i diag(e^{G_i - G_j}) k_j, j <= i
  static constexpr int kEndDecay = kAttention + kSquareBytes;     // float32 e^{G_31}, as the lanes need them
  static constexpr int kValues = kEndDecay + D * 4;               // [value][token]: v_i
  static constexpr int kBytes = kValues + D / 16 * kValueBytes;

  // Byte offset of element (token, key) of kKeys and kQueries.
  KIMI_HOST_DEVICE static int token_key(int token, int key) {
    return key / 64 * (kTile * kWidePitch) + swizzled<kWidePitch>(token * kWidePitch + key % 64 * 2);
  }
  // Of element (row, token) of kEndKeys, kValues, kInverse, kInverseRest and kAttention.
  KIMI_HOST_DEVICE static int row_token(int row, int token) {
    return swizzled<kNarrowPitch>(row * kNarrowPitch + token * 2);
  }
  // Of key's entry of kEndDecay: the four that one lane needs for 16 keys lie together.
  KIMI_HOST_DEVICE static int end_decay(int key) {
    return (key / 16 * 16 + key % 8 / 2 * 4 + key % 16 / 8 * 2 + key % 2) * 4;
  }
};

}  // namespace kimi
