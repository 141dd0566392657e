// Products of a warp's accumulators: d += a b, with a in registers and b in shared memory.
//
// Portable: matrix loads and mma.sync, warp by warp. Hopper: wgmma, which the four warps of a group start together and
// which runs while they go on; so the accumulators are not to be read before `wait_products`.
#pragma once

#include "hopper.cuh"
#include "kda_tile.cuh"

namespace kimi {

// The a operand [16, 16] of a warp, from two neighbouring accumulators [16, 8].
template <class T>
KIMI_DEVICE void operand_of(const float (&left)[4], const float (&right)[4], uint32_t (&a)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// d [16, kColumns] += a b, b [16, kColumns] being rows 16 step .. of a matrix in shared memory that is stored column by
// column: [kColumns][16 steps..] in pieces of kPitch bytes a column, swizzled. Without `accumulate` d = a b.
template <class T, int kPitch, int kColumns>
KIMI_DEVICE void multiply(float (&d)[kColumns / 8][4], const uint32_t (&a)[4], const unsigned char* b, int step,
                          bool accumulate = true) {
  constexpr int kPieceSteps = kPitch / 32;  // of 16 rows, in a piece of a column
  const unsigned char* piece = b + step / kPieceSteps * (kColumns * kPitch);
  const int offset = step % kPieceSteps * 32;
#if KIMI_HOPPER
  wgmma<T, kColumns>(d, a, matrix_descriptor<kPitch>(piece) + offset / 16, accumulate);
#else
  const int lane = thread_index() % kWarp;
  if (!accumulate) {
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) d[i][j] = 0.0f;
    }
  }
#pragma unroll
  for (int column = 0; column < kColumns; column += 16) {
    const int at = (column + lane / 16 * 8 + lane % 8) * kPitch + offset + lane / 8 % 2 * 16;
    const Words x = load_matrices(piece + swizzled<kPitch>(at));
    mma<T>(d[column / 8], a, x.w[0], x.w[1]);
    mma<T>(d[column / 8 + 1], a, x.w[2], x.w[3]);
  }
#endif
}

// Around the products of a phase: `begin_products` before the first, once registers and shared memory are as they
// should be; `end_products` after the last of a group; `wait_products<n>` until all groups but the last n are done,
// and `use` on what they made.
KIMI_DEVICE void begin_products() {
#if KIMI_HOPPER
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
KIMI_DEVICE void end_products() {
#if KIMI_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kNewestGroupsLeft>
KIMI_DEVICE void wait_products() {
#if KIMI_HOPPER
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewestGroupsLeft) : "memory");
#endif
}
// Tells the compiler that d changed here.
template <int kCount>
KIMI_DEVICE void use(float (&d)[kCount][4]) {
#if KIMI_HOPPER
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
  }
#else
  (void)d;
#endif
}

}  // namespace kimi
