// The serial part of prefill: the recurrent state goes from tile to tile in float32 registers.
//
// A warp owns 16 value rows of the transposed state [value, key]. In the accumulator layout of the matrix unit two
// neighbouring fragments of it are, rounded, the operand of the next product: the state never leaves its registers.
// The value rows of a head may be split over blocks, so that few heads fill the chip.
#pragma once

#include "fault.cuh"
#include "kda_params.cuh"
#include "kda_product.cuh"
#include "kda_tile.cuh"

namespace kimi {

// Tiles in shared memory, of a portable block: what the smallest GPUs have room for.
constexpr int kChainStages = 2;

template <int D>
struct ChainLayout {
  static constexpr int kMaxWarps = D / 16;
  // a stage: the record but for the values, then the values of the block's warps
  KIMI_HOST_DEVICE static constexpr int stage_bytes(int warps) {
    return TileRecord<D>::kValues + warps * TileRecord<D>::kValueBytes;
  }
  // from stage to stage; in the rest of the first lie the barriers of the copies
  KIMI_HOST_DEVICE static constexpr int stage_pitch(int warps) { return (stage_bytes(warps) / 1024 + 1) * 1024; }
  KIMI_HOST_DEVICE static constexpr int shared_bytes(int warps, int stages) {
    return (stages - 1) * stage_pitch(warps) + stage_bytes(warps);
  }
};

// The last columns of the convolution's input become its state; by one block of each sequence and head.
template <class T, int D>
KIMI_DEVICE void keep_columns(const KdaParams<T>& p, const Sequence& s, int h) {
  const int64_t HD = static_cast<int64_t>(p.num_heads) * D;
  for (int i = thread_index(); i < 3 * D; i += block_threads()) {
    const int64_t channel = i / D * HD + h * D + i % D;
    const int64_t at = (s.slot * 3 * HD + channel) * kPast;
    T column[kPast];
#pragma unroll
    for (int j = 0; j < kPast; ++j) {
      const int token = s.length - kPast + j;
      column[j] = token < 0 ? p.past_conv_state[at + kPast + token] : p.qkv[(s.first_row + token) * 3 * HD + channel];
    }
#pragma unroll
    for (int j = 0; j < kPast; ++j) p.present_conv_state[at + j] = column[j];
  }
}

template <class T, int D>
KIMI_KERNEL(ChainLayout<D>::kMaxWarps* kWarp, 1)
kda_chain(KIMI_GRID_CONSTANT KdaParams<T> p) {
  using Record = TileRecord<D>;
  using Layout = ChainLayout<D>;

  const int H = p.num_heads, warps = block_threads() / kWarp, splits = Layout::kMaxWarps / warps;
  const int split = block_index() % splits, h = block_index() / splits % H, n = block_index() / splits / H;
  const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
  const int group = lane / 4, member = lane % 4;
  const Sequence s = sequence_of(p, n);
  if (s.slot < 0) return;

  if (split == 0) keep_columns<T, D>(p, s, h);

  // state[i]: values first_value + {0, 8}, keys 8 i + 2 member + {0, 1}
  const int first_value = (split * warps + warp) * 16 + group;
  auto state_at = [&](int64_t entry) { return ((entry * H + h) * D + member * 2) * D + first_value; };
  float state[D / 8][4];
  {
    const float* past = p.past_recurrent_state + state_at(s.slot);
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) state[i][j] = past[(i * 8 + j % 2) * D + j / 2 * 8];
    }
  }
  auto write_state = [&](float* to) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) to[(i * 8 + j % 2) * D + j / 2 * 8] = state[i][j];
    }
  };

  const int tiles = (s.length + kTile - 1) / kTile;
#if KIMI_HOPPER
  const int stages = p.stages;
#else
  constexpr int stages = kChainStages;
#endif
  const int stage_pitch = Layout::stage_pitch(warps);
  const unsigned char* records = p.tiles + (static_cast<int64_t>(h) * p.num_tiles + s.first_tile) * Record::kBytes;
#if KIMI_HOPPER
  auto* arrived = reinterpret_cast<uint64_t*>(shared_memory() + Layout::stage_bytes(warps));
  if (thread == 0) {
    for (int i = 0; i < stages; ++i) init_copy_barrier(arrived + i);
    publish_copy_barriers();
  }
  sync_threads();
#endif
  // starts to copy a tile to its stage
  auto fetch = [&](int tile, int stage) {
    const unsigned char* from = records + static_cast<int64_t>(tile) * Record::kBytes;
    unsigned char* to = shared_memory() + stage * stage_pitch;
    const int skipped = split * warps * Record::kValueBytes;
#if KIMI_HOPPER
    if (thread == 0 && tile < tiles) {
      expect_copies(arrived + stage, Layout::stage_bytes(warps));
      bulk_load(to, from, Record::kValues, arrived + stage);
      bulk_load(to + Record::kValues, from + Record::kValues + skipped, warps * Record::kValueBytes, arrived + stage);
    }
#else
    if (tile < tiles) {
      const int bytes = KIMI_FAULT_OVERRUN(Layout::stage_bytes(warps));
      for (int at = thread * 16; at < bytes; at += block_threads() * 16) {
        copy_async16(to + at, from + at + (at < Record::kValues ? 0 : skipped));
      }
    }
    copy_async_commit();
#endif
  };
  for (int i = 0; i < stages - 1; ++i) fetch(i, i);

  int stage = 0, parity = 0, free_stage = stages - 1;
  for (int tile = 0; tile < tiles; ++tile) {
#if KIMI_HOPPER
    wait_copies(arrived + stage, parity);
#else
    copy_async_wait<stages - 2>();
#endif
    sync_threads();
    fetch(tile + stages - 1, free_stage);  // over the tile that the barrier says everyone is done with
    const unsigned char* at = shared_memory() + stage * stage_pitch;
    free_stage = stage;
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }

    // all transposed, [value, token]: u = v - k S
    uint32_t operands[Record::kSteps][4];
#pragma unroll
    for (int step = 0; step < Record::kSteps; ++step) {
      operand_of<T>(state[2 * step], state[2 * step + 1], operands[step]);
    }
    float u[kTile / 8][4];
#pragma unroll
    for (int i = 0; i < kTile / 8; i += 2) {
      const int row = lane % 16, piece = i + lane / 16;
      const Words v = load_matrices(at + Record::kValues + Record::row_token(warp * 16 + row, piece * 8));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        u[i + j / 2][j % 2 * 2] = low_half<T>(v.w[j]);
        u[i + j / 2][j % 2 * 2 + 1] = high_half<T>(v.w[j]);
      }
    }
    // the compiler lets nothing touch the state between the start of products and their wait
#pragma unroll
    for (int step = 0; step < Record::kSteps; ++step) {
      const Floats decay =
          *reinterpret_cast<const Floats*>(at + Record::kEndDecay + (step * 16 + KIMI_FAULT_SWAP(member) * 4) * 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) state[2 * step + i][j] *= decay.f[2 * i + j % 2];
      }
    }
    use(u);
    begin_products();
#pragma unroll
    for (int step = 0; step < Record::kSteps; ++step) {
      multiply<T, kWidePitch, kTile>(u, operands[step], at + Record::kKeys, step);
    }
    end_products();

    // w = (I + A)^-1 diag(beta) u, o = q S
    wait_products<0>();
    use(u);
    uint32_t a[kTile / 16][4];
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) operand_of<T>(u[2 * i], u[2 * i + 1], a[i]);
    float w[kTile / 8][4], o[kTile / 8][4];
    begin_products();
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
      multiply<T, kNarrowPitch, kTile>(w, a[i], at + Record::kInverse, i, i > 0);
      multiply<T, kNarrowPitch, kTile>(w, a[i], at + Record::kInverseRest, i);
    }
    end_products();
#pragma unroll
    for (int step = 0; step < Record::kSteps; ++step) {
      multiply<T, kWidePitch, kTile>(o, operands[step], at + Record::kQueries, step, step > 0);
    }
    end_products();

    // o += attention w, S = diag(e^G) S + k w
    wait_products<1>();
    use(w);
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) operand_of<T>(w[2 * i], w[2 * i + 1], a[i]);
    use(state);
    begin_products();
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) multiply<T, kNarrowPitch, kTile>(o, a[i], at + Record::kAttention, i);
    end_products();
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) multiply<T, kNarrowPitch, D>(state, a[i], at + Record::kEndKeys, i);
    end_products();
    wait_products<1>();
    use(o);
    {
      const int first = tile * kTile + member * 2, valid = s.length - first;
      float* to = p.raw_output + ((s.first_row + first) * H + h) * D + first_value;
#pragma unroll
      for (int i = 0; i < kTile / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int token = i * 8 + j % 2;
          if (token < valid) to[static_cast<int64_t>(token) * H * D + j / 2 * 8] = o[i][j];
        }
      }
    }
    wait_products<0>();
    use(state);

    const int done = (tile + 1) * kTile;
    if (p.state_snapshots != nullptr && done % kSnapshot == 0 && done <= s.length) {
      write_state(p.state_snapshots + state_at(s.first_snapshot + done / kSnapshot - 1));
    }
  }
  write_state(p.present_recurrent_state + state_at(s.slot));
}

}  // namespace kimi
