// Many tokens: pairs are sorted by expert, and tiles of one expert's pairs are multiplied with its weights.
#pragma once

#include "kda_tile.cuh"
#include "moe_params.cuh"

namespace kimi {

constexpr int kTileRows = 64;  // pairs of one expert

// Sum over a block of kMoeThreads, of whole numbers below 2^24; `shared` has a float for each warp.
KIMI_DEVICE int block_sum(int x, float* shared) {
  const float sum = warp_sum(static_cast<float>(x));
  sync_threads();
  if (thread_index() % kWarp == 0) shared[thread_index() / kWarp] = sum;
  sync_threads();
  float total = 0.0f;
  for (int i = 0; i < kMoeWarps; ++i) total += shared[i];
  return static_cast<int>(total);
}

// The pairs that a thread looks at: a run, so that threads in order see pairs in order.
struct Run {
  int begin, end;
};
KIMI_DEVICE Run run_of(int pairs) {
  const int size = (pairs + kMoeThreads - 1) / kMoeThreads, begin = thread_index() * size;
  return Run{begin < pairs ? begin : pairs, begin + size < pairs ? begin + size : pairs};
}

KIMI_DEVICE int count_in(const Run& run, const int* chosen, int expert) {
  int count = 0;
  for (int i = run.begin; i < run.end; ++i) count += chosen[i] == expert ? 1 : 0;
  return count;
}

// A block counts the pairs of one expert.
template <class T>
KIMI_KERNEL(kMoeThreads, 2)
moe_count(KIMI_GRID_CONSTANT MoeParams<T> p) {
  const int count =
      block_sum(count_in(run_of(p.pairs()), p.chosen, block_index()), reinterpret_cast<float*>(shared_memory()));
  if (thread_index() == 0) p.counts[block_index()] = count;
}

// A block puts the pairs of one expert where the counts of those before leave off, and says which tiles they make.
template <class T>
KIMI_KERNEL(kMoeThreads, 2)
moe_place(KIMI_GRID_CONSTANT MoeParams<T> p) {
  const int expert = block_index(), thread = thread_index();
  float* sums = reinterpret_cast<float*>(shared_memory());
  int* own = reinterpret_cast<int*>(sums + kMoeWarps);
  int before = 0, tiles_before = 0;
  for (int e = thread; e < expert; e += kMoeThreads) {
    before += p.counts[e];
    tiles_before += (p.counts[e] + kTileRows - 1) / kTileRows;
  }
  before = block_sum(before, sums);
  tiles_before = block_sum(tiles_before, sums);

  const Run run = run_of(p.pairs());
  own[thread] = count_in(run, p.chosen, expert);
  sync_threads();
  int place = before;
  for (int i = 0; i < thread; ++i) place += own[i];
  for (int i = run.begin; i < run.end; ++i) {
    if (p.chosen[i] == expert) p.sorted[place++] = i;
  }

  const int tiles = (p.counts[expert] + kTileRows - 1) / kTileRows;
  for (int i = thread; i < tiles; i += kMoeThreads) {
    p.tile_expert[tiles_before + i] = expert;
    p.tile_first[tiles_before + i] = before + i * kTileRows;
  }
  // as many tiles as there can be are launched
  if (expert == p.experts - 1) {
    for (int i = tiles_before + tiles + thread; i < p.tiles; i += kMoeThreads) {
      p.tile_expert[i] = -1;
      p.tile_first[i] = p.pairs();
    }
  }
}

// One product of a tile: rows of [., depth] with an expert's matrix [columns, depth]. kFirst: the gate and up rows with
// the hidden states of the pairs' tokens; else the output projection with what that made.
template <class T, bool kFirst>
struct ExpertProduct {
  const MoeParams<T>& p;
  const T* matrix = nullptr;
  const T* source = nullptr;
  int first = 0, rows = 0, columns, depth;

  KIMI_DEVICE ExpertProduct(const MoeParams<T>& params, int tile) : p(params) {
    const int expert = p.tile_expert[tile];
    columns = kFirst ? 2 * p.inner : p.hidden;
    depth = kFirst ? p.hidden : p.inner;
    if (expert < 0) return;
    matrix = (kFirst ? p.gate_up : p.down) + static_cast<int64_t>(expert) * columns * depth;
    source = kFirst ? p.x : p.many_hidden;
    first = p.tile_first[tile];
    // tiles follow each other, and the first without rows begins where all pairs end
    rows = (tile + 1 < p.tiles ? p.tile_first[tile + 1] : p.pairs()) - first;
  }

  KIMI_DEVICE const T* row(int index) const {
    const int place = first + (index < rows ? index : rows - 1);
    return source + static_cast<int64_t>(kFirst ? p.sorted[place] / p.top_k : place) * depth;
  }
  KIMI_DEVICE const T* column(int index) const {
    return matrix + static_cast<int64_t>(index < columns ? index : columns - 1) * depth;
  }
  // Takes columns `index` and the next of a row; index is even.
  KIMI_DEVICE void finish(int index_row, int index, float left, float right) const {
    if (index_row >= rows || index >= columns) return;
    const int64_t place = first + index_row;
    if (kFirst) {
      p.many_hidden[place * p.inner + index / 2] = from_float<T>(silu(left) * right);
    } else {
      T* to = p.many_output + static_cast<int64_t>(p.sorted[place]) * p.hidden + index;
      to[0] = from_float<T>(left);
      to[1] = from_float<T>(right);
    }
  }
};

// 16-bit data on the matrix units: [64, 128] of a block, [32, 64] of a warp, 64 deep pieces in kStages buffers.
struct ExpertTile16 {
  static constexpr int kColumns = 128, kThreads = 128, kDepth = kWidePitch / 2, kStages = 3;
  static constexpr int kRowBytes = kTileRows * kWidePitch, kStageBytes = kRowBytes + kColumns * kWidePitch;
  static constexpr int kBytes = kStages * kStageBytes;
};

template <class T, bool kFirst>
KIMI_KERNEL(ExpertTile16::kThreads, 2)
moe_product_16(KIMI_GRID_CONSTANT MoeParams<T> p) {
  using Tile = ExpertTile16;
  const int column_tiles = ((kFirst ? 2 * p.inner : p.hidden) + Tile::kColumns - 1) / Tile::kColumns;
  const ExpertProduct<T, kFirst> product(p, block_index() / column_tiles);
  if (product.rows == 0) return;
  const int first_column = block_index() % column_tiles * Tile::kColumns;
  unsigned char* shared = shared_memory();
  const int thread = thread_index(), lane = thread % kWarp, warp = thread / kWarp;

  // a thread brings 16 bytes of every 16th row
  constexpr int kPieces = kWidePitch / 16, kStep = Tile::kThreads / kPieces;
  const int piece = thread % kPieces, line = thread / kPieces;
  const T* rows[kTileRows / kStep];
  const T* columns[Tile::kColumns / kStep];
#pragma unroll
  for (int i = 0; i < kTileRows / kStep; ++i) rows[i] = product.row(line + i * kStep) + piece * 8;
#pragma unroll
  for (int i = 0; i < Tile::kColumns / kStep; ++i) {
    columns[i] = product.column(first_column + line + i * kStep) + piece * 8;
  }
  const int steps = (product.depth + Tile::kDepth - 1) / Tile::kDepth;
  auto bring = [&](int step) {
    if (step < steps) {
      unsigned char* stage = shared + step % Tile::kStages * Tile::kStageBytes;
      const int at = step * Tile::kDepth;
      const bool inside = at + piece * 8 < product.depth;
      auto copy = [&](unsigned char* to, const T* from) {
        if (inside) {
          copy_async16(to, from + at);
        } else {
          *reinterpret_cast<Words*>(to) = Words{};
        }
      };
#pragma unroll
      for (int i = 0; i < kTileRows / kStep; ++i) {
        copy(stage + swizzled<kWidePitch>((line + i * kStep) * kWidePitch + piece * 16), rows[i]);
      }
#pragma unroll
      for (int i = 0; i < Tile::kColumns / kStep; ++i) {
        copy(stage + Tile::kRowBytes + swizzled<kWidePitch>((line + i * kStep) * kWidePitch + piece * 16), columns[i]);
      }
    }
    copy_async_commit();  // an empty group keeps the count
  };

  float sums[2][8][4] = {};
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 64;
  for (int step = 0; step < Tile::kStages - 1; ++step) bring(step);
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<Tile::kStages - 2>();
    sync_threads();  // this step's piece is there, and everybody is done with the one before, which is overwritten next
    bring(step + Tile::kStages - 1);
    const unsigned char* stage = shared + step % Tile::kStages * Tile::kStageBytes;
#pragma unroll
    for (int k = 0; k < Tile::kDepth / 16; ++k) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = (warp_row + i * 16 + lane % 16) * kWidePitch + k * 32 + lane / 16 * 16;
        const Words x = load_matrices(stage + swizzled<kWidePitch>(at));
#pragma unroll
        for (int j = 0; j < 4; ++j) a[i][j] = x.w[j];
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const int at = (warp_column + j * 8 + lane / 16 * 8 + lane % 8) * kWidePitch + k * 32 + lane / 8 % 2 * 16;
        const Words x = load_matrices(stage + Tile::kRowBytes + swizzled<kWidePitch>(at));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma<T>(sums[i][j], a[i], x.w[0], x.w[1]);
          mma<T>(sums[i][j + 1], a[i], x.w[2], x.w[3]);
        }
      }
    }
  }
  copy_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int row = warp_row + i * 16 + lane / 4, column = first_column + warp_column + j * 8 + lane % 4 * 2;
      product.finish(row, column, sums[i][j][0], sums[i][j][1]);
      product.finish(row + 8, column, sums[i][j][2], sums[i][j][3]);
    }
  }
}

// float32: [64, 64] of a block, [4, 4] of a thread, 16 deep pieces.
struct ExpertTile32 {
  static constexpr int kColumns = 64, kThreads = 256, kDepth = 16;
  static constexpr int kPitch = kTileRows + 4;  // floats: a thread's four stay aligned
  static constexpr int kBytes = 2 * kDepth * kPitch * static_cast<int>(sizeof(float));
};

template <class T, bool kFirst>
KIMI_KERNEL(ExpertTile32::kThreads, 2)
moe_product_32(KIMI_GRID_CONSTANT MoeParams<T> p) {
  using Tile = ExpertTile32;
  const int column_tiles = ((kFirst ? 2 * p.inner : p.hidden) + Tile::kColumns - 1) / Tile::kColumns;
  const ExpertProduct<T, kFirst> product(p, block_index() / column_tiles);
  if (product.rows == 0) return;
  const int first_column = block_index() % column_tiles * Tile::kColumns;
  // transposed: [depth][row] and [depth][column]
  float* rows = reinterpret_cast<float*>(shared_memory());
  float* columns = rows + Tile::kDepth * Tile::kPitch;
  const int thread = thread_index(), piece = thread % 4, line = thread / 4;
  const int row = thread / 16 * 4, column = thread % 16 * 4;
  const float* row_source = product.row(line);
  const float* column_source = product.column(first_column + line);
  float sums[4][4] = {};
  for (int at = 0; at < product.depth; at += Tile::kDepth) {
    const bool inside = at + piece * 4 < product.depth;
    const Floats of_row = inside ? load4(row_source + at + piece * 4) : Floats{};
    const Floats of_column = inside ? load4(column_source + at + piece * 4) : Floats{};
    sync_threads();  // everybody is done with the piece before
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rows[(piece * 4 + i) * Tile::kPitch + line] = of_row.f[i];
      columns[(piece * 4 + i) * Tile::kPitch + line] = of_column.f[i];
    }
    sync_threads();
#pragma unroll
    for (int k = 0; k < Tile::kDepth; ++k) {
      const Floats a = load4(rows + k * Tile::kPitch + row), b = load4(columns + k * Tile::kPitch + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = fma(a.f[i], b.f[j], sums[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    product.finish(row + i, first_column + column, sums[i][0], sums[i][1]);
    product.finish(row + i, first_column + column + 2, sums[i][2], sums[i][3]);
  }
}

// A thread adds up four neighbouring outputs of a token over its experts, in the order of their scores.
template <class T>
KIMI_KERNEL(kMoeThreads, 4)
moe_sum(KIMI_GRID_CONSTANT MoeParams<T> p) {
  const int64_t value = (static_cast<int64_t>(block_index()) * kMoeThreads + thread_index()) * 4;
  if (value >= static_cast<int64_t>(p.tokens) * p.hidden) return;
  const int64_t token = value / p.hidden, column = value % p.hidden;
  Floats sum = {};
  for (int k = 0; k < p.top_k; ++k) {
    const int64_t pair = token * p.top_k + k;
    const Floats x = load4(p.many_output + pair * p.hidden + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.f[i] = fma(p.weights[pair], x.f[i], sum.f[i]);
  }
  store4(p.output + value, sum);
}

}  // namespace kimi
