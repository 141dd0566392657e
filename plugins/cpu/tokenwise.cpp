// A run of layers that treat every token by itself: norms, sums, gates and products with weights, as one kernel.
//
// Values are computed in stages: what needs no product of the stage, token by token, then its products. Few tokens are
// rounded or copied once per product's input and multiplied with rows of weights where they lie; many are taken in
// strips, one token to a lane, so many at a time that what they leave behind stays in the caches.
#include <type_traits>

#include "team.h"
#include "weight_rows.h"

namespace kimi::cpu {
namespace {

constexpr int64_t kFew = kLanes / 2 > 4 ? kLanes / 2 : 4;  // tokens up to which rows of weights are summed along
constexpr int64_t kFewSteps = 4;                           // the same where strips multiply bytes
constexpr int64_t kStrips = 8;                             // of a pass over the weights
constexpr int64_t kPieceRows = 48;                         // of weights, of a piece of a strip's product
constexpr int64_t kWarmBytes = 1 << 14;                    // of the weights that a waiting thread will read first

using Value = TokenwiseValue;

// Of a product whose inputs have been prepared for strips.
template <class Rows>
int64_t strip_floats(const Value& product, int64_t columns) {
  return Rows::kStepStrips ? StepStrip::size(columns, kStrip, product.block_size) : columns * kStrip;
}

class Tokenwise {
 public:
  Tokenwise(const TokenwiseArguments& a, const Parallel& parallel) : a_(a), parallel_(parallel) {
    rows_ = least(a.rows, kStrips * kStrip);
    passes_ = rows_ == 0 ? 0 : ceil_div(a.rows, rows_);
    bool few = true;
    for (int32_t i = 0; i < a.count; ++i) {
      const Value& v = a.values[i];
      stages_ = v.stage >= stages_ ? v.stage + 1 : stages_;
      if (v.kind != TokenwiseKind::kProduct) continue;
      with_rows(v.bits, v.int8_activations, [&](auto* rows) {
        few = few && a.rows <= (std::remove_pointer_t<decltype(rows)>::kStepStrips ? kFewSteps : kFew);
        return 0;
      });
    }
    few_ = few;
    lay_out();
  }

  size_t bytes() const { return bytes_; }

  void run() {
    if (a_.rows == 0) return;
    Team::run(parallel_, phases_, 2 * stages_ * passes_, [&](Team& team, int64_t slot) {
      float* scratch = scratch_ + slot * scratch_floats_;
      for (int64_t first = 0; first < a_.rows; first += rows_) {
        const int64_t rows = least(rows_, a_.rows - first);
        for (int32_t stage = 0; stage < stages_; ++stage) {
          if (few_) {
            few_stage(team, stage, rows);
          } else {
            const int64_t strips = ceil_div(rows, kStrip);
            team.each(strips, [&](int64_t s) { strip_elements(stage, first, rows, s, scratch); });
            strip_stage(team, stage, first, rows, strips, scratch);
          }
        }
      }
    });
  }

 private:
  // The workspace, in order: values that are no output, prepared inputs, scratch of each thread, phases.
  void lay_out() {
    const auto start = reinterpret_cast<uintptr_t>(a_.workspace);
    uintptr_t at = start;
    auto take = [&at](int64_t floats) {
      at = (at + 63) & ~uintptr_t{63};
      float* const pointer = reinterpret_cast<float*>(at);
      at += static_cast<size_t>(floats) * sizeof(float);
      return pointer;
    };
    for (int32_t i = 0; i < a_.count; ++i) {
      const Value& v = a_.values[i];
      const bool elsewhere = v.kind == TokenwiseKind::kInput || v.kind == TokenwiseKind::kPart || v.output >= 0;
      own_[i] = elsewhere ? nullptr : take(rows_ * v.columns);
      prepared_[i] = nullptr;
      if (v.kind != TokenwiseKind::kProduct) continue;
      const int64_t columns = a_.values[v.a].columns;
      with_rows(v.bits, v.int8_activations, [&](auto* pointer) {
        using Rows = std::remove_pointer_t<decltype(pointer)>;
        const int64_t packed = Rows::kStepStrips || Rows::kRounds ? columns * kStrip : 0;
        scratch_floats_ = most(scratch_floats_, most(packed, kTileRows * columns + kPieceRows * kStrip));
        if (v.prepared_by != i) return 0;
        const int64_t strips = ceil_div(rows_, kStrip);
        prepared_[i] = take(few_ ? rows_ * Rows::prepared(columns) : strips * strip_floats<Rows>(v, columns));
        return 0;
      });
    }
    scratch_floats_ = round_up(scratch_floats_, 16);
    scratch_ = take(scratch_floats_ * parallel_.threads);
    phases_ = reinterpret_cast<Phase*>(take(2 * stages_ * passes_ * static_cast<int64_t>(sizeof(Phase) / 4)));
    bytes_ = at - start + 64;
  }

  // Row `row` of a pass that begins at row `first` of the call.
  float* at(int32_t index, int64_t first, int64_t row) const {
    const Value& v = a_.values[index];
    if (v.output >= 0) return a_.outputs[v.output] + (first + row) * v.columns;
    if (v.kind == TokenwiseKind::kPart) return at(v.a, first, row) + v.begin;
    if (v.kind == TokenwiseKind::kInput) return const_cast<float*>(input(v.port)) + (first + row) * v.columns;
    return own_[index] + row * v.columns;
  }
  const float* input(int32_t port) const { return static_cast<const float*>(a_.inputs[port]); }

  ExpertWeights weights(const Value& v) const {
    if (v.bits == 32) return {a_.inputs[v.port], nullptr, nullptr};
    return {a_.inputs[v.port], input(v.port + 1),
            v.zero_points ? static_cast<const uint8_t*>(a_.inputs[v.port + 2]) : nullptr};
  }

  // A stage's values of one token that are no products.
  void elements(int32_t stage, int64_t first, int64_t row) const {
    for (int32_t i = 0; i < a_.count; ++i) {
      const Value& v = a_.values[i];
      if (v.stage != stage) continue;
      switch (v.kind) {
        case TokenwiseKind::kAdd: {
          const float *x = at(v.a, first, row), *y = at(v.b, first, row);
          float* to = at(i, first, row);
          for (int64_t k = 0; k < v.columns; ++k) to[k] = x[k] + y[k];
          break;
        }
        case TokenwiseKind::kNorm:
          norm(at(v.a, first, row), input(v.port), v.columns, v.eps, at(i, first, row));
          break;
        case TokenwiseKind::kPart:
          if (v.output >= 0) copy_floats(at(i, first, row), at(v.a, first, row) + v.begin, v.columns);
          break;
        case TokenwiseKind::kJoin: {
          const int64_t left = a_.values[v.a].columns;
          copy_floats(at(i, first, row), at(v.a, first, row), left);
          copy_floats(at(i, first, row) + left, at(v.b, first, row), v.columns - left);
          break;
        }
        case TokenwiseKind::kSwiglu:
          swiglu(at(v.a, first, row), at(v.b, first, row), v.columns, at(i, first, row));
          break;
        default:
          break;
      }
    }
  }

  static void norm(const float* x, const float* weight, int64_t columns, float eps, float* to) {
    Vec totals[2] = {};
    int64_t k = 0;
    for (; k + 2 * kLanes <= columns; k += 2 * kLanes) {
      const Vec a = load(x + k), b = load(x + k + kLanes);
      totals[0] += a * a;
      totals[1] += b * b;
    }
    const Quad sums = quarter(totals[0] + totals[1]);
    float total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (; k < columns; ++k) total += x[k] * x[k];
    const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(columns) + eps);
    for (k = 0; k < columns; ++k) to[k] = x[k] * scale * weight[k];
  }

  // what(value, index, Rows) for the products of a stage.
  template <class What>
  void products(int32_t stage, const What& what) const {
    for (int32_t i = 0; i < a_.count; ++i) {
      const Value& v = a_.values[i];
      if (v.kind != TokenwiseKind::kProduct || v.stage != stage) continue;
      with_rows(v.bits, v.int8_activations, [&](auto* rows) {
        what(v, i, rows);
        return 0;
      });
    }
  }

  void few_elements(int32_t stage, int64_t rows) const {
    for (int64_t row = 0; row < rows; ++row) elements(stage, 0, row);
    products(stage, [&](const Value& v, int32_t i, auto* pointer) {
      using Rows = std::remove_pointer_t<decltype(pointer)>;
      if (std::is_same_v<Rows, WeightRows> || v.prepared_by != i) return;
      const int64_t columns = a_.values[v.a].columns;
      for (int64_t row = 0; row < rows; ++row) {
        Rows::prepare(at(v.a, 0, row), 0, columns, columns, v.block_size, prepared_[i] + row * Rows::prepared(columns));
      }
    });
  }

  void few_stage(Team& team, int32_t stage, int64_t rows) const {
    int64_t total = 0;
    products(stage, [&](const Value& v, int32_t, auto*) { total += bytes_of(v); });
    const Pieces pieces{total, parallel_.threads};
    // what(value, index, Rows, first row, end) for the products that piece `piece` has rows of
    const auto in_piece = [&](int64_t piece, const auto& what) {
      int64_t before = 0;
      products(stage, [&](const Value& v, int32_t i, auto* pointer) {
        const auto row_at = [&](int64_t bytes) {
          const int64_t row = (bytes - before) * v.columns / bytes_of(v) / kSumRows * kSumRows;
          return bytes <= before ? 0 : bytes >= before + bytes_of(v) ? v.columns : row;
        };
        const int64_t begin = row_at(pieces.begin(piece)), end = row_at(pieces.begin(piece + 1));
        if (begin < end) what(v, i, pointer, begin, end);
        before += bytes_of(v);
      });
    };
    const auto elements = [&](int64_t) { few_elements(stage, rows); };
    if (total == 0) return team.each(1, elements);
    team.each_before(1, elements, [&](int64_t piece) {
      if (piece >= pieces.count()) return;
      in_piece(piece, [&](const Value& v, int32_t, auto*, int64_t begin, int64_t end) {
        const int64_t row = bytes_of(v) / v.columns, some = least((end - begin) * row, kWarmBytes);
        const char* const from = static_cast<const char*>(a_.inputs[v.port]) + begin * row;
        for (int64_t k = 0; k < some; k += 64) __builtin_prefetch(from + k);
      });
    });
    team.each(pieces.count(), [&](int64_t piece) {
      in_piece(piece, [&](const Value& v, int32_t i, auto* pointer, int64_t begin, int64_t end) {
        few_piece(pointer, v, i, begin, end, rows);
      });
    });
  }

  int64_t bytes_of(const Value& v) const { return v.columns * a_.values[v.a].columns * v.bits / 8; }

  template <class Rows>
  void few_piece(Rows*, const Value& v, int32_t i, int64_t begin, int64_t end, int64_t rows) const {
    const int64_t columns = a_.values[v.a].columns;
    const Rows weight_rows(weights(v), 0, v.columns, columns, v.block_size);
    for (int64_t m = 0; m < rows; m += kFewAtOnce) {
      const int64_t count = least(rows - m, kFewAtOnce);
      const float* x[kFewAtOnce];
      float* y[kFewAtOnce];
      for (int64_t j = 0; j < count; ++j) {
        x[j] = std::is_same_v<Rows, WeightRows> ? at(v.a, 0, m + j)
                                                : prepared_[v.prepared_by] + (m + j) * Rows::prepared(columns);
        y[j] = at(i, 0, m + j);
      }
      few_products(weight_rows, begin, end, x, count, [&](int64_t row, int64_t j, float sum) { y[j][row] = sum; });
    }
  }

  // Tokens of strip `s`, and its width in lanes.
  static int64_t tokens_of(int64_t s, int64_t rows) { return least(kStrip, rows - s * kStrip); }
  static int64_t width_of(int64_t s, int64_t rows) { return round_up(tokens_of(s, rows), kLanes); }

  void strip_elements(int32_t stage, int64_t first, int64_t rows, int64_t s, float* scratch) const {
    const int64_t count = tokens_of(s, rows), width = width_of(s, rows);
    for (int64_t t = 0; t < count; ++t) elements(stage, first, s * kStrip + t);
    products(stage, [&](const Value& v, int32_t i, auto* pointer) {
      using Rows = std::remove_pointer_t<decltype(pointer)>;
      if (v.prepared_by != i) return;
      const int64_t columns = a_.values[v.a].columns;
      const float* x[kStrip];
      for (int64_t t = 0; t < count; ++t) x[t] = at(v.a, first, s * kStrip + t);
      float* const to = prepared_[i] + s * strip_floats<Rows>(v, columns);
      if constexpr (Rows::kStepStrips) {
        pack_strip(x, count, width, columns, scratch);
        round_to_steps<Rows::kInterleave>(scratch, 0, columns, width, v.block_size,
                                          StepStrip(to, columns, width, v.block_size));
      } else {
        pack_strip(x, count, width, columns, to);
        if constexpr (Rows::kRounds) round_strip(to, columns, width, v.block_size);
      }
    });
  }

  void strip_stage(Team& team, int32_t stage, int64_t first, int64_t rows, int64_t strips, float* scratch) const {
    int64_t pieces = 0;
    products(stage, [&](const Value& v, int32_t, auto*) { pieces += ceil_div(v.columns, kPieceRows); });
    team.each(pieces * strips, [&](int64_t index) {
      const int64_t s = index % strips;
      int64_t piece = index / strips;
      products(stage, [&](const Value& v, int32_t i, auto* pointer) {
        const int64_t own = ceil_div(v.columns, kPieceRows);
        if (piece >= 0 && piece < own) strip_piece(pointer, v, i, first, rows, s, piece * kPieceRows, scratch);
        piece -= own;
      });
    });
  }

  template <class Rows>
  void strip_piece(Rows*, const Value& v, int32_t i, int64_t first, int64_t rows, int64_t s, int64_t begin,
                   float* scratch) const {
    const int64_t columns = a_.values[v.a].columns, width = width_of(s, rows);
    const int64_t end = least(begin + kPieceRows, v.columns);
    const Rows weight_rows(weights(v), 0, v.columns, columns, v.block_size);
    float* const strip = prepared_[v.prepared_by] + s * strip_floats<Rows>(v, columns);
    float *y = scratch, *panel = scratch + kPieceRows * kStrip;
    for (int64_t row = begin; row < end; row += kTileRows) {
      const int64_t count = least(kTileRows, end - row);
      float* to = y + (row - begin) * width;
      if constexpr (Rows::kStepStrips)
        strip_products(weight_rows, row, count, width, columns, StepStrip(strip, columns, width, v.block_size), panel,
                       to);
      else
        strip_products(weight_rows, row, count, width, columns, strip, panel, to);
    }
    float* output[kStrip];
    for (int64_t t = 0; t < tokens_of(s, rows); ++t) output[t] = at(i, first, s * kStrip + t) + begin;
    store_transposed(y, width, end - begin, tokens_of(s, rows), output);
  }

  const TokenwiseArguments& a_;
  const Parallel& parallel_;
  int64_t rows_, passes_, scratch_floats_ = 0;
  int32_t stages_ = 0;
  bool few_;
  size_t bytes_;
  float *scratch_, *own_[kMaxTokenwiseValues], *prepared_[kMaxTokenwiseValues];
  Phase* phases_;
};

}  // namespace

namespace KIMI_CPU_LEVEL {

size_t tokenwise_workspace(const TokenwiseArguments& arguments, const Parallel& parallel) {
  return Tokenwise(arguments, parallel).bytes();
}

void tokenwise(const TokenwiseArguments& arguments, const Parallel& parallel) { Tokenwise(arguments, parallel).run(); }

}  // namespace KIMI_CPU_LEVEL
}  // namespace kimi::cpu
