// The part of prefill that knows no state: convolution, norms, gate and the 32 x 32 products of every tile and head.
//
// Decays only ever multiply: e^{G_i - G_j} is a product of e^g of the steps between, never a quotient and never the
// exponential of a difference of sums. So every factor is at most 1, any decay is allowed, and a step that forgets
// everything leaves the digits of its neighbours alone.
//
// A thread owns two neighbouring channels of half a tile, 16 tokens, from the inputs to the operands; so a warp owns 64
// channels of a half.
#pragma once

#include "fault.cuh"
#include "hopper.cuh"
#include "kda_params.cuh"
#include "kda_tile.cuh"

namespace kimi {

constexpr int kHalf = kTile / 2;

template <int D>
struct PrepLayout {
  static constexpr int kThreads = D;
  static constexpr int kWarps = D / kWarp;
  static constexpr int kParts = D / 64;  // warps of a half
  // operands of a warp's products, a row of them for each channel: first of the half's own pairs of tokens, 8 queries,
  // 8 keys and 8 keys of columns; then of the pairs across the halves, 16 keys, or 16 queries and 16 keys. Rows are
  // padded so that matrix loads meet no bank twice.
  static constexpr int kLevelPitch = 48, kColumnsPitch = 48, kRowsPitch = 80;
  static constexpr int kColumnsBytes = 64 * kColumnsPitch, kRowsBytes = 64 * kRowsPitch;
  static constexpr int kProductPitch = 20;  // floats of a row of a [.., 16] product
  static constexpr int kProductBytes = kTile * kProductPitch * 4;
  static constexpr int kSums = 3 * kHalf;

  // the inputs lie where the operands and the record but for its values come later: q, k and v with the rows before
  static constexpr int kRawRows = kPast + kTile;
  static constexpr int kRawBytes = kRawRows * D * 2;
  static constexpr int kRawDecay = 3 * kRawBytes;

  static constexpr int kOperands = 0;
  static constexpr int kRecord = kOperands + kParts * (kColumnsBytes + kRowsBytes);
  static_assert(kRawDecay + kTile * D * 2 <= kRecord + TileRecord<D>::kValues, "");
  static constexpr int kAttention = kRecord + TileRecord<D>::kBytes;  // of each part
  static constexpr int kGram = kAttention + kParts * kProductBytes;   // likewise
  static constexpr int kMatrix = kGram + kParts * kProductBytes;      // A's diagonal blocks, transposed
  static constexpr int kInverse = kMatrix + kProductBytes;            // theirs
  static constexpr int kCross = kInverse + kProductBytes;             // A's other block
  static constexpr int kPartSums = kCross + kProductBytes / 2;        // [part][half][48]: sums of q^2, k^2 and q k
  static constexpr int kNorms = kPartSums + kParts * 2 * kSums * 4;   // [warp][32]: of q and k
  static constexpr int kDiagonal = kNorms + kWarps * 2 * kHalf * 4;   // [token]: scaled q k
  static constexpr int kBeta = kDiagonal + kTile * 4;
  static constexpr int kTotals = kBeta + kTile * 4;  // [half][channel]: decay over the half
  static constexpr int kRate = kTotals + 2 * D * 4;
  static constexpr int kSharedBytes = kRate + 16;
  static constexpr int kBlocks = 384 / D;  // of a multiprocessor: what its shared memory and registers hold
};

// The tile a block works on, the `number`-th: its sequence and its number there. False if there is none.
template <class T>
KIMI_DEVICE bool find_tile(const KdaParams<T>& p, int number, Sequence& s, int& tile) {
  int n;
  if (p.cu_seqlens == nullptr) {
    n = number / ((p.sequence + kTile - 1) / kTile);
  } else {
    // the last sequence whose first tile is not past this one
    int low = 0, high = p.batch;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (clamp(p.cu_seqlens[middle], 0, p.sequence) / kTile + middle <= number) {
        low = middle;
      } else {
        high = middle;
      }
    }
    n = low;
  }
  s = sequence_of(p, n);
  tile = static_cast<int>(number - s.first_tile);
  return tile * kTile < s.length;
}

KIMI_DEVICE void put(unsigned char* at, uint32_t x) { *reinterpret_cast<uint32_t*>(at) = x; }

// Eight tokens of one channel.
template <class T>
KIMI_DEVICE void put8(unsigned char* at, const float (&x)[8]) {
  *reinterpret_cast<Words*>(at) =
      Words{{pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])}};
}

// A thread's two channels of a token, as floats.
struct Pair {
  float c[2];
};

// Brings the tile's inputs to shared memory; zeros for what lies past the sequence's end, the convolution's state for
// what lies before its start.
template <class T, int D>
KIMI_DEVICE void fetch_inputs(const KdaParams<T>& p, const Sequence& s, int tile, int h) {
  using Layout = PrepLayout<D>;
  constexpr int kPieces = D * 2 / 16, kRowsAtOnce = Layout::kThreads / kPieces;  // of a row; of a round of all threads
  const int first_row = thread_index() / kPieces, piece = thread_index() % kPieces;
  const int64_t HD = static_cast<int64_t>(p.num_heads) * D;
  const T* qkv = p.qkv + (s.first_row + tile * kTile - kPast + first_row) * 3 * HD + h * D + piece * 8;
  const T* decay = p.decay + (s.first_row + tile * kTile + first_row) * HD + h * D + piece * 8;
  unsigned char* to = shared_memory() + thread_index() * 16;
  const int past = tile > 0 ? 0 : kPast, end = s.length - tile * kTile;
#pragma unroll
  for (int i = 0; i < Layout::kRawRows; i += kRowsAtOnce) {
    const int row = first_row + i;
    if (row >= past && row < Layout::kRawRows && row < end + kPast) {
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        copy_async16(to + part * Layout::kRawBytes + i * D * 2, qkv + part * HD);
      }
    }
    qkv += kRowsAtOnce * 3 * HD;
  }
#pragma unroll
  for (int i = 0; i < kTile; i += kRowsAtOnce) {
    if (first_row + i < end) copy_async16(to + Layout::kRawDecay + i * D * 2, decay);
    decay += kRowsAtOnce * HD;
  }
  copy_async_commit();
  if (end < kTile) {
    for (int i = thread_index(); i < (kTile - end) * kPieces; i += Layout::kThreads) {
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        *reinterpret_cast<Words*>(shared_memory() + part * Layout::kRawBytes + (kPast + end) * D * 2 + i * 16) =
            Words{};
      }
      *reinterpret_cast<Words*>(shared_memory() + Layout::kRawDecay + end * D * 2 + i * 16) = Words{};
    }
  }
  if (tile == 0) {
    for (int i = thread_index(); i < 3 * D; i += Layout::kThreads) {
      const T* from = p.past_conv_state + (s.slot * 3 * HD + i / D * HD + h * D + i % D) * kPast;
#pragma unroll
      for (int j = 0; j < kPast; ++j) {
        reinterpret_cast<T*>(shared_memory() + i / D * Layout::kRawBytes)[j * D + i % D] = from[j];
      }
    }
  }
}

// log2(e) times the convolution of two channels of one part (q, k or v) over a half. `raw` is the first channel's in
// the row kPast before the half.
template <class T, int D>
KIMI_DEVICE void mix_channels(const unsigned char* raw, const Words& weights, Pair (&y)[kHalf]) {
  Floats weight[2];
#pragma unroll
  for (int j = 0; j < kConvWidth; j += 2) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint32_t word = weights.w[c * kConvWidth / 2 + j / 2];
      weight[c].f[j] = low_half<T>(word) * kLog2E;
      weight[c].f[j + 1] = high_half<T>(word) * kLog2E;
    }
  }
  Pair x[kConvWidth];
#pragma unroll
  for (int t = -kPast; t < kHalf; ++t) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(raw + (kPast + t) * D * 2);
    Pair& newest = x[(t + kPast) % kConvWidth];
    newest = {{low_half<T>(word), high_half<T>(word)}};
    if (t < 0) continue;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const Floats& w = weight[c];
      y[t].c[c] = fma(
          w.f[0], x[t % kConvWidth].c[c],
          fma(w.f[1], x[(t + 1) % kConvWidth].c[c], fma(w.f[2], x[(t + 2) % kConvWidth].c[c], w.f[3] * newest.c[c])));
    }
  }
}

// log2(e) SiLU(x) of x log2(e).
KIMI_DEVICE float scaled_silu(float x) { return x * reciprocal(1.0f + exp2(-x)); }

// Sums the 16 values over the warp: lane l gets the sum of x[l % 16]. x is used up.
template <int kCount = kHalf / 2>
KIMI_DEVICE float half_sums(float (&x)[kHalf], int lane) {
  const bool upper = (lane & kCount) != 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float sent = upper ? x[i] : x[i + kCount], kept = upper ? x[i + kCount] : x[i];
    x[i] = kept + shuffle_xor(sent, kCount);
  }
  if constexpr (kCount > 1) {
    return half_sums<kCount / 2>(x, lane);
  } else {
    return x[0] + shuffle_xor(x[0], kHalf);
  }
}

// One level of the products of a half's tokens, over a warp's channels. Every pair j < i of tokens lies in exactly one
// level: in a block of 2 kSpan tokens, i in its second half and j in its first, 8 rows by 8 columns in all. The decay
// between them is split at the middle of the block.
template <class T, int D, int kSpan>
KIMI_DEVICE void level_products(const Pair (&q)[kHalf], const Pair (&k)[kHalf], const Pair (&factor)[kHalf],
                                unsigned char* operands, float* attention, float* gram) {
  using Layout = PrepLayout<D>;
  const int lane = thread_index() % kWarp;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float queries[8], keys[8], columns[8];
#pragma unroll
    for (int block = 0; block < 8 / kSpan; ++block) {
      float since_middle = 1.0f, to_middle = 1.0f;
#pragma unroll
      for (int j = 0; j < kSpan; ++j) {
        const int i = block * 2 * kSpan + kSpan + j, r = block * kSpan + j;
        since_middle = j == 0 ? factor[i].c[c] : since_middle * factor[i].c[c];
        queries[r] = q[i].c[c] * since_middle;
        keys[r] = k[i].c[c] * since_middle;
      }
#pragma unroll
      for (int j = kSpan - 1; j >= 0; --j) {
        const int i = block * 2 * kSpan + j;
        columns[block * kSpan + j] = j == kSpan - 1 ? k[i].c[c] : k[i].c[c] * to_middle;
        to_middle = j == kSpan - 1 ? factor[i].c[c] : to_middle * factor[i].c[c];
      }
    }
    // the order of the channels does not matter to their sum; in this one no bank is met twice
    unsigned char* row = operands + (c * kWarp + lane) * Layout::kLevelPitch;
    put8<T>(row, queries);
    put8<T>(row + 16, keys);
    put8<T>(row + 32, columns);
  }
  sync_warp();
  float product[4] = {};
#pragma unroll
  for (int step = 0; step < 4; step += 2) {
    const unsigned char* rows = operands + step * 16 * Layout::kLevelPitch;
    const Words columns = load_matrices_transposed(rows + lane * Layout::kLevelPitch + 32);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Words a = load_matrices_transposed(rows + (i * 16 + lane / 16 * 8 + lane % 8) * Layout::kLevelPitch +
                                               lane / 8 % 2 * 16);
      mma<T>(product, a.w, columns.w[2 * i], columns.w[2 * i + 1]);
    }
  }
  const int row = lane / 4, i = row / kSpan * 2 * kSpan + kSpan + row % kSpan;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int column = lane % 4 * 2 + c, j = column / kSpan * 2 * kSpan + column % kSpan;
    if (column / kSpan == row / kSpan) {
      attention[i * Layout::kProductPitch + j] = product[c];
      gram[i * Layout::kProductPitch + j] = product[2 + c];
    }
  }
  sync_warp();  // before the next operands take the place of these
}

// The 16-bit parts of two floats: x = high + low but for the last 2^-16 (bfloat16) or 2^-22 (float16) of it.
template <class T>
KIMI_DEVICE void split(float x, float y, uint32_t& high, uint32_t& low) {
  high = pack<T>(x, y);
  low = pack<T>(x - low_half<T>(high), y - high_half<T>(high));
}

// d += a b with both in two 16-bit parts.
template <class T>
KIMI_DEVICE void mma_split(float (&d)[4], const uint32_t (&high)[4], const uint32_t (&low)[4], const Floats& b) {
  uint32_t b_high[2], b_low[2];
  split<T>(b.f[0], b.f[1], b_high[0], b_low[0]);
  split<T>(b.f[2], b.f[3], b_high[1], b_low[1]);
  mma<T>(d, low, b_high[0], b_high[1]);
  mma<T>(d, high, b_low[0], b_low[1]);
  mma<T>(d, high, b_high[0], b_high[1]);
}

// (I + A)^-1 diag(beta) of a tile, by one warp: the diagonal blocks by substitution, exact for keys of any correlation,
// a row a lane, and X_10 = -X_11 A_10 X_00 with operands of twice 16 bits. `matrix` has the diagonal blocks of A
// transposed, `cross` A_10; `inverse` is scratch.
template <class T, int D>
KIMI_DEVICE void invert(const float* matrix, const float* cross, const float* beta, float* inverse,
                        unsigned char* record) {
  using Record = TileRecord<D>;
  constexpr int kPitch = PrepLayout<D>::kProductPitch;
  const int lane = thread_index() % kWarp, half = lane / kHalf, row = lane % kHalf;
  {
    // X (I + A) = I, from the last column to the first
    float x[kHalf];
#pragma unroll
    for (int column = kHalf - 1; column >= 0; --column) {
      float sum = column == row ? 1.0f : 0.0f;
#pragma unroll
      for (int j = kHalf - 4; j > column - 4; j -= 4) {
        const Floats a = load4(matrix + (half * kHalf + column) * kPitch + j);
#pragma unroll
        for (int m = 3; m >= 0; --m) {
          if (j + m > column) sum = fma(-a.f[m], x[j + m], sum);
        }
      }
      x[column] = sum;
    }
#pragma unroll
    for (int j = 0; j < kHalf; j += 4) {
      store4(inverse + lane * kPitch + j, Floats{{x[j], x[j + 1], x[j + 2], x[j + 3]}});
      const Floats scale = load4(beta + half * kHalf + j);
#pragma unroll
      for (int m = 0; m < 4; ++m) x[j + m] *= scale.f[m];
    }
#pragma unroll
    for (int j = 0; j < kHalf; j += 8) {
      Words high, low;
#pragma unroll
      for (int m = 0; m < 4; ++m) split<T>(x[j + 2 * m], x[j + 2 * m + 1], high.w[m], low.w[m]);
      const int at = Record::row_token(lane, half * kHalf + j), above = Record::row_token(lane, kHalf + j);
      *reinterpret_cast<Words*>(record + Record::kInverse + at) = high;
      *reinterpret_cast<Words*>(record + Record::kInverseRest + at) = low;
      if (half == 0) {
        *reinterpret_cast<Words*>(record + Record::kInverse + above) = Words{};
        *reinterpret_cast<Words*>(record + Record::kInverseRest + above) = Words{};
      }
    }
  }
  sync_warp();
  const int group = lane / 4, member = lane % 4;
  // of row `row` of a matrix: the columns that a lane holds
  auto columns = [member](const float* row) {
    return Floats{{row[2 * member], row[2 * member + 1], row[2 * member + 8], row[2 * member + 9]}};
  };
  // transposed: Y = X_00^T A_10^T, then X_10^T = -Y X_11^T
  uint32_t high[4], low[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* column = inverse + 2 * member * kPitch + group + 8 * i;
    split<T>(column[0], column[kPitch], high[i], low[i]);
    split<T>(column[8 * kPitch], column[9 * kPitch], high[2 + i], low[2 + i]);
  }
  float product[2][4] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) mma_split<T>(product[i], high, low, columns(cross + (i * 8 + group) * kPitch));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    split<T>(-product[i][0], -product[i][1], high[2 * i], low[2 * i]);
    split<T>(-product[i][2], -product[i][3], high[2 * i + 1], low[2 * i + 1]);
  }
  const float scales[2] = {beta[group], beta[group + 8]};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float block[4] = {};
    mma_split<T>(block, high, low, columns(inverse + (kHalf + i * 8 + group) * kPitch));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = Record::row_token(kHalf + i * 8 + member * 2 + j % 2, group + j / 2 * 8);
      const float x = block[j] * scales[j / 2];
      const T rounded = from_float<T>(x);
      *reinterpret_cast<T*>(record + Record::kInverse + at) = rounded;
      *reinterpret_cast<T*>(record + Record::kInverseRest + at) = from_float<T>(x - to_float(rounded));
    }
  }
}

template <class T, int D>
KIMI_KERNEL(PrepLayout<D>::kThreads, PrepLayout<D>::kBlocks)
kda_prep(KIMI_GRID_CONSTANT KdaParams<T> p) {
  using Layout = PrepLayout<D>;
  using Record = TileRecord<D>;
  constexpr int kPitch = Layout::kProductPitch;
  unsigned char* record = shared_memory() + Layout::kRecord;
  auto floats = [](int at) { return reinterpret_cast<float*>(shared_memory() + at); };
  float* beta = floats(Layout::kBeta);

  const int H = p.num_heads;
  const int h = block_index() % H;
  Sequence s;
  int tile;
  if (!find_tile(p, block_index() / H, s, tile)) return;
  const int HD = H * D;
  const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
  const int half = warp / Layout::kParts, part = warp % Layout::kParts;
  const int channel = part * 64 + lane * 2;
  const int first = tile * kTile + half * kHalf;  // token of the sequence
  const int valid = s.length - first;
  unsigned char* operands =
      shared_memory() + Layout::kOperands +
      (half == 0 ? part * Layout::kColumnsBytes : Layout::kParts * Layout::kColumnsBytes + part * Layout::kRowsBytes);
  float* totals = floats(Layout::kTotals);

  fetch_inputs<T, D>(p, s, tile, h);
  // everything else that comes from memory, while the inputs are on their way
  for (int i = thread; i < kTile; i += Layout::kThreads) {
    const int token = tile * kTile + i;
    beta[i] = token < s.length ? sigmoid(to_float(p.beta[(s.first_row + token) * H + h])) : 0.0f;
  }
  Words weights[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    weights[i] = *reinterpret_cast<const Words*>(p.conv_weight + (i * HD + h * D + channel) * kConvWidth);
  }
  // in shared memory until they are used
  if (thread == 0) floats(Layout::kRate)[0] = exp2(kLog2E * p.A_log[h]);
  totals[half * D + channel] = p.dt_bias[h * D + channel];
  totals[half * D + channel + 1] = p.dt_bias[h * D + channel + 1];
  copy_async_wait<0>();
  sync_threads();

  const unsigned char* raw = shared_memory() + (half * kHalf * D + channel) * 2;
  Pair q[kHalf], k[kHalf], factor[kHalf];
  {
    Pair v[kHalf];
    mix_channels<T, D>(raw + 2 * Layout::kRawBytes, weights[2], v);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int t = 0; t < kHalf; t += 8) {
        float tokens[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) tokens[i] = scaled_silu(v[t + i].c[c]) * (1.0f / kLog2E);
        put8<T>(record + Record::kValues + Record::row_token(channel + c, half * kHalf + t), tokens);
      }
    }
  }
  {
    // q and k are log2(e) times what they are, until their norms are 1
    float* sums = floats(Layout::kPartSums) + (part * 2 + half) * Layout::kSums + lane % kHalf;
    auto activate = [](Pair(&x)[kHalf]) {
#pragma unroll
      for (int t = 0; t < kHalf; ++t) x[t] = {{scaled_silu(x[t].c[0]), scaled_silu(x[t].c[1])}};
    };
    float x[kHalf];
    mix_channels<T, D>(raw, weights[0], q);
    activate(q);
#pragma unroll
    for (int t = 0; t < kHalf; ++t) x[t] = fma(q[t].c[0], q[t].c[0], q[t].c[1] * q[t].c[1]);
    sums[0] = half_sums(x, lane);
    mix_channels<T, D>(raw + Layout::kRawBytes, weights[1], k);
    activate(k);
#pragma unroll
    for (int t = 0; t < kHalf; ++t) x[t] = fma(k[t].c[0], k[t].c[0], k[t].c[1] * k[t].c[1]);
    sums[kHalf] = half_sums(x, lane);
#pragma unroll
    for (int t = 0; t < kHalf; ++t) x[t] = fma(q[t].c[0], k[t].c[0], q[t].c[1] * k[t].c[1]);
    sums[2 * kHalf] = half_sums(x, lane);
  }
  {
    const float rate = floats(Layout::kRate)[0];
    const float bias[2] = {totals[half * D + channel], totals[half * D + channel + 1]};
#pragma unroll
    for (int t = 0; t < kHalf; ++t) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(raw + Layout::kRawDecay + t * D * 2);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float x = c == 0 ? low_half<T>(word) : high_half<T>(word);
        const float f = decay_factor(x + bias[c], rate, p.gate, p.gate_lower_bound);
        factor[t].c[c] = t < valid ? f : 1.0f;
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      // in an order of its own: the partial products of another use would only take registers until then
      float total = factor[0].c[c] * factor[8].c[c];
#pragma unroll
      for (int t = 1; t < 8; ++t) total *= factor[t].c[c] * factor[t + 8].c[c];
      totals[half * D + channel + c] = total;
    }
  }
  sync_threads();

  {
    // lane l: of q of token l, then of k of token l - 16
    float sum = 0.0f, product = 0.0f;
#pragma unroll
    for (int i = 0; i < Layout::kParts; ++i) {
      const float* sums = floats(Layout::kPartSums) + (i * 2 + half) * Layout::kSums;
      sum += sums[lane];
      product += sums[2 * kHalf + lane % kHalf];
    }
    // a token past the end has no query and no key
    const float norm =
        lane % kHalf < valid ? rsqrt(sum + kL2NormEps * kLog2E * kLog2E) * (lane < kHalf ? p.scale : 1.0f) : 0.0f;
    const float diagonal = product * norm * shuffle_xor(norm, kHalf);
    float* norms = floats(Layout::kNorms) + warp * 2 * kHalf;
    norms[lane] = norm;
    if (part == 0 && lane < kHalf) floats(Layout::kDiagonal)[half * kHalf + lane] = diagonal;
    sync_warp();
#pragma unroll
    for (int t = 0; t < kHalf; t += 4) {
      const Floats of_q = load4(norms + t), of_k = load4(norms + kHalf + t);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          q[t + i].c[c] *= of_q.f[i];
          k[t + i].c[c] *= of_k.f[i];
        }
      }
    }
  }

  {
    float* attention = floats(Layout::kAttention + part * Layout::kProductBytes) + half * kHalf * kPitch;
    float* gram = floats(Layout::kGram + part * Layout::kProductBytes) + half * kHalf * kPitch;
    level_products<T, D, 8>(q, k, factor, operands, attention, gram);
    level_products<T, D, 4>(q, k, factor, operands, attention, gram);
    level_products<T, D, 2>(q, k, factor, operands, attention, gram);
    level_products<T, D, 1>(q, k, factor, operands, attention, gram);
  }

  // across the halves: the decay is split between them
  {
    const float other[2] = {totals[(1 - half) * D + channel], totals[(1 - half) * D + channel + 1]};
    Pair to_end = {{1.0f, 1.0f}};
    if (half == 0) {
      *reinterpret_cast<float*>(record + Record::kEndDecay + Record::end_decay(channel)) = totals[channel] * other[0];
      *reinterpret_cast<float*>(record + Record::kEndDecay + Record::end_decay(channel + 1)) =
          totals[channel + 1] * other[1];
    }
#pragma unroll
    for (int t = kHalf - 8; t >= 0; t -= 8) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float keys[8];
#pragma unroll
        for (int i = 7; i >= 0; --i) {
          keys[i] = k[t + i].c[c] * to_end.c[c];
          to_end.c[c] *= factor[t + i].c[c];
        }
        if (half == 0) {
          put8<T>(operands + (c * kWarp + lane) * Layout::kColumnsPitch + t * 2, keys);
#pragma unroll
          for (int i = 0; i < 8; ++i) keys[i] *= other[c];
        }
        put8<T>(record + Record::kEndKeys + Record::row_token(channel + c, half * kHalf + t), keys);
      }
    }
    Pair since = {{1.0f, 1.0f}};
#pragma unroll
    for (int t = 0; t < kHalf; t += 8) {
      float rows[2][2][8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          since.c[c] *= factor[t + i].c[c];
          rows[0][c][i] = q[t + i].c[c] * since.c[c];
          rows[1][c][i] = k[t + i].c[c] * since.c[c];
        }
      }
      if (half == 1) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          unsigned char* row = operands + (c * kWarp + lane) * Layout::kRowsPitch + t * 2;
          put8<T>(row, rows[0][c]);
          put8<T>(row + 2 * kHalf, rows[1][c]);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            rows[0][c][i] *= other[c];
            rows[1][c][i] *= other[c];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int at = Record::token_key(half * kHalf + t + i, channel);
        put(record + Record::kQueries + at, pack<T>(rows[0][0][i], rows[0][1][i]));
        put(record + Record::kKeys + at, pack<T>(-rows[1][0][i], -rows[1][1][i]));
      }
    }
  }
#if KIMI_HOPPER
  publish_to_copies();
#endif
  KIMI_FAULT_BARRIER(sync_threads());

  unsigned char* to = p.tiles + (h * p.num_tiles + s.first_tile + tile) * Record::kBytes;
#if KIMI_HOPPER
  if (thread == 0) {
    bulk_store(to, record, Record::kInverse);
    bulk_store(to + Record::kEndDecay, record + Record::kEndDecay, Record::kBytes - Record::kEndDecay);
  }
#endif

  // the diagonal blocks: the parts' sums, the attention's diagonal and its zeros
  for (int i = thread; i < kTile * 4; i += Layout::kThreads) {
    const int row = i / 4, column = i % 4 * 4, r = row % kHalf;
    Floats attention = {}, gram = {};
#pragma unroll
    for (int n = 0; n < Layout::kParts; ++n) {
      const Floats a = load4(floats(Layout::kAttention + n * Layout::kProductBytes) + row * kPitch + column);
      const Floats g = load4(floats(Layout::kGram + n * Layout::kProductBytes) + row * kPitch + column);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        attention.f[c] += a.f[c];
        gram.f[c] += g.f[c];
      }
    }
    const float diagonal = floats(Layout::kDiagonal)[row];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      attention.f[c] = column + c < r ? attention.f[c] : column + c == r ? diagonal : 0.0f;
      gram.f[c] *= beta[row];
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      floats(Layout::kMatrix)[(row / kHalf * kHalf + column + c) * kPitch + r] = gram.f[c];
    }
    unsigned char* at = record + Record::kAttention;
    store4(reinterpret_cast<T*>(at + Record::row_token(row, row / kHalf * kHalf + column)), attention);
    if (row < kHalf) store4(reinterpret_cast<T*>(at + Record::row_token(row, kHalf + column)), Floats{});
  }
  // the block below them: queries or keys of the second half with keys of the first, 8 of them a warp
#pragma unroll
  for (int i = warp; i < 4; i += Layout::kWarps) {
    const int rows = i / 2 * 2 * kHalf, columns = i % 2 * 16;  // bytes in an operand's row
    float product[4] = {};
#pragma unroll
    for (int step = 0; step < Record::kSteps; step += 2) {
      const unsigned char* at = shared_memory() + Layout::kOperands;
      const Words b = load_matrices_transposed(at + (step * 16 + lane) * Layout::kColumnsPitch + columns);
      at += Layout::kParts * Layout::kColumnsBytes;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = (step + j) * 16 + lane / 16 * 8 + lane % 8;
        const Words a = load_matrices_transposed(at + row * Layout::kRowsPitch + rows + lane / 8 % 2 * 16);
        mma<T>(product, a.w, b.w[2 * j], b.w[2 * j + 1]);
      }
    }
    const int row = lane / 4, column = i % 2 * 8 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int r = row + j * 8;
      if (rows == 0) {
        put(record + Record::kAttention + Record::row_token(kHalf + r, column),
            pack<T>(product[2 * j], product[2 * j + 1]));
      } else {
        float* cross = floats(Layout::kCross) + r * kPitch + column;
        cross[0] = product[2 * j] * beta[kHalf + r];
        cross[1] = product[2 * j + 1] * beta[kHalf + r];
      }
    }
  }
  sync_threads();

  if (warp == 0) {
    invert<T, D>(floats(Layout::kMatrix), floats(Layout::kCross), beta, floats(Layout::kInverse), record);
  }
#if KIMI_HOPPER
  if (warp == 0) {
    publish_to_copies();
    sync_warp();
    if (lane == 0) {
      bulk_store(to + Record::kInverse, record + Record::kInverse, Record::kEndDecay - Record::kInverse);
      wait_bulk_stores();
    }
  }
#else
  sync_threads();
  for (int i = thread * 16; i < Record::kBytes; i += Layout::kThreads * 16) {
    *reinterpret_cast<Words*>(to + i) = *reinterpret_cast<const Words*>(record + i);
  }
#endif
}

}  // namespace kimi
