// What the kernels need of a device, on a GPU (nvcc) and on a CPU (any C++17 compiler, through ../emulation).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define KIMI_CUDA 1
#ifdef __CUDA_ARCH__
#define KIMI_CUDA_ARCH __CUDA_ARCH__
#else
#define KIMI_CUDA_ARCH 0
#endif
#define KIMI_DEVICE __device__ __forceinline__
#define KIMI_HOST_DEVICE __host__ __device__ __forceinline__
#define KIMI_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define KIMI_GRID_CONSTANT const __grid_constant__
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define KIMI_HOPPER 1
#else
#define KIMI_HOPPER 0
#endif
#else
#include "../emulation/emulator.h"
#define KIMI_CUDA 0
#define KIMI_CUDA_ARCH 0
#define KIMI_DEVICE inline
#define KIMI_HOST_DEVICE inline
#define KIMI_KERNEL(max_threads, min_blocks) void
#define KIMI_GRID_CONSTANT const
#define KIMI_HOPPER 0
#endif

namespace kimi {

constexpr int kWarp = 32;

// 16 bytes, moved by one instruction.
struct alignas(16) Words {
  uint32_t w[4];
};
struct alignas(16) Floats {
  float f[4];
};
struct alignas(8) HalfWords {
  uint32_t w[2];
};

// 16-bit data as bits; arithmetic is float32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

KIMI_HOST_DEVICE uint32_t bits_of(float x) {
#if KIMI_CUDA && defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
#endif
}

KIMI_HOST_DEVICE float float_of(uint32_t u) {
#if KIMI_CUDA && defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
#endif
}

KIMI_DEVICE float to_float(float x) { return x; }
KIMI_DEVICE float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

#if KIMI_CUDA

KIMI_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
KIMI_DEVICE T from_float(float x);
template <>
KIMI_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
KIMI_DEVICE Half from_float<Half>(float x) {
  return Half{__half_as_ushort(__float2half_rn(x))};
}
template <>
KIMI_DEVICE BFloat16 from_float<BFloat16>(float x) {
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// Two 16-bit values in one word, `low` in the low half.
template <class T>
KIMI_DEVICE uint32_t pack(float low, float high);
template <>
KIMI_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
KIMI_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Relative error about 2^-22; subnormal results are 0.
KIMI_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Absolute error about 2^-22 on [1, 2].
KIMI_DEVICE float log2(float x) { return __log2f(x); }
KIMI_DEVICE float rsqrt(float x) { return ::rsqrtf(x); }
KIMI_DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }
KIMI_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

#else

inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1Fu, mantissa = x.bits & 0x3FFu;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
  if (exponent == 31) return float_of(sign | 0x7F800000u | (mantissa << 13));
  return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Half from_float<Half>(float x) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7FFFFFFFu;
  const auto sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  if (magnitude > 0x7F800000u) return Half{static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return Half{static_cast<uint16_t>(sign | 0x7C00u)};
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return Half{static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return Half{static_cast<uint16_t>(sign | (rounded >> 13))};
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return BFloat16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  return BFloat16{static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | (static_cast<uint32_t>(from_float<T>(high).bits) << 16);
}

inline float exp2(float x) { return std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }

#endif

template <class T>
KIMI_DEVICE float low_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word & 0xFFFFu)});
}
template <class T>
KIMI_DEVICE float high_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}

// Four neighbours of any data type in float32; the address is aligned to all four.
KIMI_DEVICE Floats load4(const float* p) { return *reinterpret_cast<const Floats*>(p); }
KIMI_DEVICE void store4(float* p, const Floats& x) { *reinterpret_cast<Floats*>(p) = x; }
template <class T>
KIMI_DEVICE Floats load4(const T* p) {
  const HalfWords x = *reinterpret_cast<const HalfWords*>(p);
  return Floats{{low_half<T>(x.w[0]), high_half<T>(x.w[0]), low_half<T>(x.w[1]), high_half<T>(x.w[1])}};
}
template <class T>
KIMI_DEVICE void store4(T* p, const Floats& x) {
  *reinterpret_cast<HalfWords*>(p) = HalfWords{{pack<T>(x.f[0], x.f[1]), pack<T>(x.f[2], x.f[3])}};
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads

#if KIMI_CUDA

KIMI_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
KIMI_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
KIMI_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
KIMI_DEVICE void sync_threads() { __syncthreads(); }
KIMI_DEVICE void sync_warp() { __syncwarp(); }
KIMI_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }

// Aligned as the matrix units of Hopper want their tiles.
KIMI_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char kimi_shared[];
  return kimi_shared;
}

KIMI_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8 x 8 matrices of 16-bit values from shared memory: lane 8 i + r brings the address of row r of the i-th, 16
// bytes, and gets words[i]: columns 2 (lane % 4) + {0, 1} of row lane / 4. Transposed: the two rows of that column.
KIMI_DEVICE Words load_matrices(const void* row) {
  Words x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
               : "r"(shared_address(row))
               : "memory");
  return x;
}
KIMI_DEVICE Words load_matrices_transposed(const void* row) {
  Words x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
               : "r"(shared_address(row))
               : "memory");
  return x;
}

KIMI_DEVICE void copy_async16(void* destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(destination)), "l"(source) : "memory");
}
KIMI_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewestGroupsLeft>
KIMI_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewestGroupsLeft) : "memory");
}

// d += a b: a [16, 16], b [16, 8], fragments as in the PTX manual's mma.m16n8k16.
template <class T>
KIMI_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
KIMI_DEVICE void mma<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
KIMI_DEVICE void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Launches kernel(arguments) and returns why that failed, or an empty string.
template <class Arguments>
std::string launch(void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, int threads,
                   size_t shared_bytes, void* stream) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes,
             static_cast<cudaStream_t>(stream)>>>(arguments);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? std::string() : std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

// An attribute of the current device; 1 if there is none, for the launch that follows reports what is wrong.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  return known ? value : 1;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline bool is_hopper() { return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9; }

#else

inline int thread_index() { return static_cast<int>(emulation::current.thread); }
inline int block_index() { return static_cast<int>(emulation::current.block); }
inline int block_threads() { return static_cast<int>(emulation::current.block_threads); }
inline void sync_threads() { emulation::barrier(); }
inline unsigned char* shared_memory() { return emulation::shared_memory(); }

inline float shuffle_xor(float x, int mask) {
  const uint32_t words[2] = {bits_of(x), static_cast<uint32_t>(mask)};
  return float_of(*emulation::warp_exchange("shuffle_xor", words, 2, [](emulation::WarpExchange& warp) {
    uint32_t brought[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) brought[lane] = warp.words[lane][0];
    for (int lane = 0; lane < kWarp; ++lane)
      warp.words[lane][0] = brought[lane ^ static_cast<int>(warp.words[lane][1])];
  }));
}

inline void sync_warp() {
  const uint32_t nothing = 0;
  emulation::warp_exchange("sync_warp", &nothing, 1, [](emulation::WarpExchange&) {});
}

template <bool kTransposed>
Words exchange_matrices(const void* row) {
  uint32_t words[2];
  std::memcpy(words, &row, sizeof row);
  const uint32_t* result = emulation::warp_exchange("load_matrices", words, 2, [](emulation::WarpExchange& warp) {
    const unsigned char* rows[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      std::memcpy(&rows[lane], warp.words[lane], sizeof rows[lane]);
      if (reinterpret_cast<uintptr_t>(rows[lane]) % 16 != 0) *static_cast<volatile int*>(nullptr) = 0;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j) {
          const int r = kTransposed ? lane % 4 * 2 + j : lane / 4, c = kTransposed ? lane / 4 : lane % 4 * 2 + j;
          std::memcpy(&pair[j], rows[8 * i + r] + 2 * c, 2);
        }
        warp.words[lane][i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
  });
  return Words{{result[0], result[1], result[2], result[3]}};
}
inline Words load_matrices(const void* row) { return exchange_matrices<false>(row); }
inline Words load_matrices_transposed(const void* row) { return exchange_matrices<true>(row); }

inline void copy_async16(void* destination, const void* source) {
  if ((reinterpret_cast<uintptr_t>(destination) | reinterpret_cast<uintptr_t>(source)) % 16 != 0) {
    *static_cast<volatile int*>(nullptr) = 0;  // as on a GPU: a fault
  }
  emulation::copy_async(destination, source, 16);
}
inline void copy_async_commit() { emulation::copy_async_commit(); }
template <int kNewestGroupsLeft>
void copy_async_wait() {
  emulation::copy_async_wait(kNewestGroupsLeft);
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[10] = {a[0], a[1],          a[2],          a[3],          b0,
                              b1,   bits_of(d[0]), bits_of(d[1]), bits_of(d[2]), bits_of(d[3])};
  const uint32_t* result = emulation::warp_exchange("mma", words, 10, [](emulation::WarpExchange& warp) {
    // lane = 4 group + member; a: rows group, group + 8, columns 2 member + {0, 1} and 8 more; b: rows as a's columns,
    // column group; d: rows as a's, columns 2 member + {0, 1}
    float a_rows[16][16], b_columns[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const uint32_t* w = warp.words[lane];
      const int group = lane / 4, column = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        float* to = &a_rows[group + i % 2 * 8][column + i / 2 * 8];
        to[0] = low_half<T>(w[i]);
        to[1] = high_half<T>(w[i]);
      }
      for (int i = 0; i < 2; ++i) {
        b_columns[column + i * 8][group] = low_half<T>(w[4 + i]);
        b_columns[column + i * 8 + 1][group] = high_half<T>(w[4 + i]);
      }
    }
    float product[16][8] = {};
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) product[m][n] += a_rows[m][k] * b_columns[k][n];
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      uint32_t* w = warp.words[lane];
      for (int i = 0; i < 4; ++i) {
        w[i] = bits_of(float_of(w[6 + i]) + product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
      }
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = float_of(result[i]);
}

template <class Arguments>
std::string launch(void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, int threads,
                   size_t shared_bytes, void*) {
  struct Call {
    void (*kernel)(Arguments);
    const Arguments* arguments;
  } call{kernel, &arguments};
  return emulation::launch(
      [](const void* c) { static_cast<const Call*>(c)->kernel(*static_cast<const Call*>(c)->arguments); }, &call,
      static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes);
}

// As an H200: so that the choices made for it are the ones tested.
inline int multiprocessors() { return 132; }
inline bool is_hopper() { return false; }

#endif

// Sum over kLanes neighbouring lanes, kLanes a power of two; every lane of the warp takes part.
template <int kLanes>
KIMI_DEVICE float lanes_sum(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
KIMI_DEVICE float warp_sum(float x) { return lanes_sum<kWarp>(x); }

}  // namespace kimi
