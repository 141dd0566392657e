// LatentAttention, in whichever form multiplies less.
//
// Absorbed (few steps): kv_b's key rows are applied to the queries and its value rows to the attended latents, so that
// the cache itself is keys and values of every head. A task is a head; where the cache is too large to be read once per
// head, a task is a range of the cache for all heads, and their results are combined.
// Expanded (many steps): a task is a head and a block of steps, and makes keys and values of a tile of the cache at a
// time. Both keep the running maximum and sum of the softmax (Milakov and Gimelshein, arXiv 1805.02867), so that no
// score outlives its tile.
#include "product.h"

namespace kimi::cpu {
namespace {

constexpr int64_t kTile = 64;      // cached tokens at a time
constexpr int64_t kReadTile = 32;  // the same where they are read as they lie: these stay in the first cache
constexpr int64_t kFewSteps = 16;
constexpr int64_t kStepBlock = 512;        // steps of a task of the expanded form, which share its keys and values
constexpr int64_t kStepTile = 48;          // of these, steps whose scores are made at a time
constexpr int64_t kSharedBytes = 1 << 16;  // of a row's cache, from which on heads share one pass over it
constexpr int64_t kSharedRows = 256;       // heads times steps up to which they do
constexpr float kNothing = -__builtin_inff();

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Sizes {
  int64_t heads, nope, rope, value, rank, width, query;  // width of a cached row, query of one head

  explicit Sizes(const LatentAttentionArguments& a)
      : heads(a.num_heads),
        nope(a.qk_nope_head_dim),
        rope(a.qk_rope_head_dim),
        value(a.v_head_dim),
        rank(a.kv_lora_rank),
        width(rank + rope),
        query(nope + rope) {}

  // Multiplications of a head, as the reference counts them; a few steps are never worth a tile of keys.
  bool expands(int64_t steps, int64_t cached) const {
    return steps >= kFewSteps && steps * rank * (nope + value + 2 * cached) > cached * (nope + value) * (rank + steps);
  }
};

// Softmax in pieces: rows of weighted sums, each with the maximum and the sum of its weights so far.
struct Running {
  float *sums, *maximum, *total;

  void clear(int64_t rows, int64_t width) const {
    fill_zero(sums, rows * width);
    for (int64_t i = 0; i < rows; ++i) {
      maximum[i] = kNothing;
      total[i] = 0;
    }
  }
};

// Turns scores [rows, kTile] of `count` tokens into weights and makes room for them in `running`. Row i sees its first
// visible(i) tokens of the tile.
template <class Visible>
void weigh(float* scores, int64_t rows, int64_t count, int64_t width, const Running& running, const Visible& visible) {
  for (int64_t i = 0; i < rows; ++i) {
    float* const row = scores + i * kTile;
    const int64_t seen = smaller(visible(i), count);
    for (int64_t j = larger(seen, 0); j < count; ++j) row[j] = kNothing;
    float maximum = running.maximum[i];
#pragma omp simd reduction(max : maximum)
    for (int64_t j = 0; j < count; ++j) maximum = row[j] > maximum ? row[j] : maximum;
    if (maximum == kNothing) {
      // none is seen, or those that are have no number for a score: a NaN stays one
      for (int64_t j = 0; j < count; ++j) {
        row[j] = row[j] == kNothing ? 0.0f : row[j];
        running.total[i] += row[j];
      }
      continue;
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) {
      row[j] = exp_of(row[j] - maximum);
      sum += row[j];
    }
    if (maximum != running.maximum[i]) {
      const float shrink = exp_of(running.maximum[i] - maximum);
      float* const sums = running.sums + i * width;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) sums[c] *= shrink;
      running.total[i] *= shrink;
      running.maximum[i] = maximum;
    }
    running.total[i] += sum;
  }
}

class Attention {
 public:
  Attention(const LatentAttentionArguments& a, const Parallel& parallel) : a_(a), s_(a), parallel_(parallel) {
    int64_t longest = 0;
    for (int64_t row = 0; row < a_.batch; ++row) longest = larger(longest, cached(row));
    expands_ = s_.expands(a_.sequence, longest);
    shares_ = !expands_ && s_.heads * a_.sequence <= kSharedRows && longest * s_.width * 4 > kSharedBytes;
  }

  // Floats of workspace.
  size_t floats() const {
    const int64_t rows = s_.heads * a_.sequence, heads = a_.batch * s_.heads;
    const int64_t count = expands_  ? parallel_.slots(heads * step_blocks()) * expanded_floats()
                          : shares_ ? rows * s_.width + parts() * (part_floats(rows) + rows * kTile)
                                    : parallel_.slots(heads) * absorbed_floats();
    return static_cast<size_t>(count);
  }

  void run() const {
    parallel_.each(a_.batch, [&](int64_t row, int64_t) { write(row); });
    const int64_t heads = a_.batch * s_.heads, blocks = step_blocks();
    if (expands_) {
      parallel_.each(heads * blocks, [&](int64_t index, int64_t slot) {
        // the last steps see the most: they begin
        const int64_t block = blocks - 1 - index / heads, of_block = index % heads;
        expanded(of_block / s_.heads, of_block % s_.heads, block * kStepBlock, floats_of(slot, expanded_floats()));
      });
    } else if (shares_) {
      for (int64_t row = 0; row < a_.batch; ++row) absorbed_shared(row);
    } else {
      parallel_.each(heads, [&](int64_t index, int64_t slot) {
        absorbed(index / s_.heads, index % s_.heads, floats_of(slot, absorbed_floats()));
      });
    }
    clear_padding();
  }

 private:
  float* floats_of(int64_t slot, int64_t count) const { return static_cast<float*>(a_.workspace) + slot * count; }
  int64_t step_blocks() const { return (a_.sequence + kStepBlock - 1) / kStepBlock; }
  int64_t parts() const { return larger(1, 2 * parallel_.threads); }
  int64_t part_floats(int64_t rows) const { return rows * (s_.rank + 2); }
  int64_t absorbed_floats() const { return a_.sequence * (s_.width + kTile) + part_floats(a_.sequence); }
  int64_t expanded_floats() const {
    const int64_t steps = smaller(a_.sequence, kStepBlock);
    return steps * (s_.query + s_.value + 2) + kTile * (s_.query + s_.width + s_.value + kStepTile) +
           s_.rank * s_.value;
  }

  int64_t steps(int64_t row) const { return a_.sequence_lengths ? a_.sequence_lengths[row] : a_.sequence; }
  int64_t past(int64_t row) const { return a_.past_lengths[row]; }
  int64_t cached(int64_t row) const { return past(row) + steps(row); }
  const float* cache(int64_t row) const { return a_.present_latent + row * a_.capacity * s_.width; }
  const float* key_weight(int64_t head) const { return a_.kv_b_weight + head * (s_.nope + s_.value) * s_.rank; }
  const float* value_weight(int64_t head) const { return key_weight(head) + s_.nope * s_.rank; }
  const float* query(int64_t row, int64_t step, int64_t head) const {
    return a_.query + ((row * a_.sequence + step) * s_.heads + head) * s_.query;
  }
  float* output(int64_t row, int64_t step, int64_t head) const {
    return a_.output + ((row * a_.sequence + step) * s_.heads + head) * s_.value;
  }

  void write(int64_t row) const {
    float* const present = a_.present_latent + row * a_.capacity * s_.width;
    const float* const before = a_.past_latent + row * a_.capacity * s_.width;
    if (present != before) {
      const int64_t end = cached(row);
      copy_floats(present, before, past(row) * s_.width);
      copy_floats(present + end * s_.width, before + end * s_.width, (a_.capacity - end) * s_.width);
    }
    copy_floats(present + past(row) * s_.width, a_.latent + row * a_.sequence * s_.width, steps(row) * s_.width);
  }

  void clear_padding() const {
    for (int64_t row = 0; row < a_.batch; ++row) {
      if (steps(row) < a_.sequence) {
        fill_zero(output(row, steps(row), 0), (a_.sequence - steps(row)) * s_.heads * s_.value);
      }
    }
  }

  // Queries of a head that meet cached rows as they are, [steps, width], scaled.
  void absorb(int64_t row, int64_t head, float* queries) const {
    const int64_t count = steps(row);
    product<false>(count, s_.rank, s_.nope, query(row, 0, head), s_.heads * s_.query, key_weight(head), s_.rank,
                   queries, s_.width);
    for (int64_t i = 0; i < count; ++i) {
      float* const to = queries + i * s_.width;
      const float* const rope = query(row, i, head) + s_.nope;
#pragma omp simd
      for (int64_t c = 0; c < s_.rope; ++c) to[s_.rank + c] = rope[c];
#pragma omp simd
      for (int64_t c = 0; c < s_.width; ++c) to[c] *= a_.scale;
    }
  }

  // Absorbed queries [rows, width] over cached tokens first .. last; row i is step i % count of the call.
  void attend(int64_t row, const float* queries, int64_t rows, int64_t first, int64_t last, float* scores,
              const Running& running) const {
    const int64_t count = steps(row), begin = past(row);
    running.clear(rows, s_.rank);
    for (int64_t tile = first; tile < last; tile += kReadTile) {
      const int64_t tokens = smaller(kReadTile, last - tile);
      const float* const latents = cache(row) + tile * s_.width;
      dots(rows, tokens, s_.width, queries, s_.width, latents, s_.width, scores, kTile);
      weigh(scores, rows, tokens, s_.rank, running, [&](int64_t i) { return begin + i % count + 1 - tile; });
      product<true>(rows, s_.rank, tokens, scores, kTile, latents, s_.width, running.sums, s_.rank);
    }
  }

  // The value rows of kv_b, applied to a head's attended latents [steps, rank].
  void project(int64_t row, int64_t head, const Running& running) const {
    const int64_t count = steps(row);
    for (int64_t i = 0; i < count; ++i) {
      float* const sums = running.sums + i * s_.rank;
      const float inverse = 1.0f / running.total[i];
#pragma omp simd
      for (int64_t c = 0; c < s_.rank; ++c) sums[c] *= inverse;
    }
    dots(count, s_.value, s_.rank, running.sums, s_.rank, value_weight(head), s_.rank, output(row, 0, head),
         s_.heads * s_.value);
  }

  void absorbed(int64_t row, int64_t head, float* memory) const {
    const int64_t count = steps(row);
    if (count == 0) return;
    float *const queries = memory, *const scores = queries + count * s_.width;
    float* const rest = scores + count * kTile;
    const Running running = running_at(rest, count);
    absorb(row, head, queries);
    attend(row, queries, count, 0, cached(row), scores, running);
    project(row, head, running);
  }

  Running running_at(float* memory, int64_t rows) const {
    return {memory, memory + rows * s_.rank, memory + rows * (s_.rank + 1)};
  }

  void absorbed_shared(int64_t row) const {
    const int64_t count = steps(row), rows = s_.heads * count;
    if (count == 0) return;
    const int64_t tiles = (cached(row) + kTile - 1) / kTile, ranges = smaller(parts(), tiles);
    float* const queries = static_cast<float*>(a_.workspace);
    float* const partial = queries + rows * s_.width;
    const int64_t stride = part_floats(rows) + rows * kTile;
    parallel_.each(s_.heads, [&](int64_t head, int64_t) { absorb(row, head, queries + head * count * s_.width); });
    parallel_.each(ranges, [&](int64_t range, int64_t) {
      float* const memory = partial + range * stride;
      const int64_t first = tiles * range / ranges * kTile, last = tiles * (range + 1) / ranges * kTile;
      attend(row, queries, rows, first, smaller(last, cached(row)), memory + part_floats(rows),
             running_at(memory, rows));
    });
    parallel_.each(s_.heads, [&](int64_t head, int64_t) {
      Running all = running_at(partial, rows);
      for (int64_t i = head * count; i < (head + 1) * count; ++i) {
        for (int64_t range = 1; range < ranges; ++range) merge(running_at(partial + range * stride, rows), all, i);
      }
      all.sums += head * count * s_.rank;
      all.total += head * count;
      project(row, head, all);
    });
  }

  // Adds row i of `part` to that of `all`.
  void merge(const Running& part, const Running& all, int64_t i) const {
    const float maximum = part.maximum[i] > all.maximum[i] ? part.maximum[i] : all.maximum[i];
    const float of_part = exp_of(part.maximum[i] - maximum), of_all = exp_of(all.maximum[i] - maximum);
    const float* const from = part.sums + i * s_.rank;
    float* const to = all.sums + i * s_.rank;
#pragma omp simd
    for (int64_t c = 0; c < s_.rank; ++c) to[c] = to[c] * of_all + from[c] * of_part;
    all.total[i] = all.total[i] * of_all + part.total[i] * of_part;
    all.maximum[i] = maximum;
  }

  void expanded(int64_t row, int64_t head, int64_t first, float* memory) const {
    const int64_t count = smaller(steps(row) - first, kStepBlock), begin = past(row) + first;
    if (count <= 0) return;
    auto take = [&](int64_t floats) {
      float* const at = memory;
      memory += floats;
      return at;
    };
    float *const queries = take(count * s_.query), *const scores = take(kStepTile * kTile);
    float *const latents = take(s_.width * kTile), *const keys = take(s_.query * kTile);
    float *const values = take(kTile * s_.value), *const weight = take(s_.rank * s_.value);
    const Running running = {take(count * s_.value), take(count), take(count)};
    running.clear(count, s_.value);
    for (int64_t i = 0; i < count; ++i) {
      const float* const from = query(row, first + i, head);
#pragma omp simd
      for (int64_t c = 0; c < s_.query; ++c) queries[i * s_.query + c] = from[c] * a_.scale;
    }
    transpose(s_.value, s_.rank, value_weight(head), s_.rank, weight, s_.value);
    for (int64_t tile = 0; tile < begin + count; tile += kTile) {
      const int64_t tokens = smaller(kTile, begin + count - tile);
      const float* const rows = cache(row) + tile * s_.width;
      // tokens side by side: what keys and scores are summed over
      transpose(tokens, s_.width, rows, s_.width, latents, kTile);
      product<false>(s_.nope, tokens, s_.rank, key_weight(head), s_.rank, latents, kTile, keys, kTile);
      copy_floats(keys + s_.nope * kTile, latents + s_.rank * kTile, s_.rope * kTile);
      product<false>(tokens, s_.value, s_.rank, rows, s_.width, weight, s_.value, values, s_.value);
      // steps before the tile see none of it
      for (int64_t i = larger(0, tile - begin); i < count; i += kStepTile) {
        const int64_t these = smaller(kStepTile, count - i);
        product<false>(these, tokens, s_.query, queries + i * s_.query, s_.query, keys, kTile, scores, kTile);
        const Running own = {running.sums + i * s_.value, running.maximum + i, running.total + i};
        weigh(scores, these, tokens, s_.value, own, [&](int64_t j) { return begin + i + j + 1 - tile; });
        product<true>(these, s_.value, tokens, scores, kTile, values, s_.value, own.sums, s_.value);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      float* const to = output(row, first + i, head);
      const float* const sums = running.sums + i * s_.value;
      const float inverse = 1.0f / running.total[i];
#pragma omp simd
      for (int64_t v = 0; v < s_.value; ++v) to[v] = sums[v] * inverse;
    }
  }

  const LatentAttentionArguments& a_;
  const Sizes s_;
  const Parallel& parallel_;
  bool expands_, shares_;
};

}  // namespace

namespace KIMI_CPU_LEVEL {

size_t latent_attention_workspace(const LatentAttentionArguments& a, const Parallel& parallel) {
  return Attention(a, parallel).floats() * sizeof(float);
}

Status latent_attention(const LatentAttentionArguments& a, const Parallel& parallel) {
  for (int64_t row = 0; row < a.batch; ++row) {
    const int64_t steps = a.sequence_lengths ? a.sequence_lengths[row] : a.sequence, past = a.past_lengths[row];
    if (steps < 0 || steps > a.sequence) return {Fault::kSequenceLength, row, steps, a.sequence};
    if (past < 0) return {Fault::kPastLength, row, past, 0};
    if (past + a.sequence > a.capacity) return {Fault::kCapacity, row, past + a.sequence, a.capacity};
  }
  Attention(a, parallel).run();
  return {};
}

}  // namespace KIMI_CPU_LEVEL
}  // namespace kimi::cpu
