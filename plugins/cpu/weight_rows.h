// Products of weights in any format, for few tokens and for strips of many.
#pragma once

#include "moe_levels.h"
#include "moe_tiles.h"

namespace kimi::cpu {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// float32 weights, as LevelRows are quantised ones.
class WeightRows : public FloatRows {
 public:
  static constexpr bool kRounds = false, kStepStrips = false;
  WeightRows(const ExpertWeights& w, int64_t expert, int64_t rows, int64_t columns, int64_t)
      : FloatRows{static_cast<const float*>(w.values) + expert * rows * columns, columns} {}
  static int64_t granule(int64_t) { return kLanes; }
  static int64_t prepared(int64_t columns) { return columns; }
  static void prepare(const float* x, int64_t begin, int64_t end, int64_t, int64_t, float* to) {
    copy_floats(to + begin, x + begin, end - begin);
  }
  const float* panel(int64_t row, int64_t, float*, int64_t* stride) const {
    *stride = columns;
    return weights + row * columns;
  }
};

// Calls what(Rows) for weights of so many bits, whose products read int8 or float32 inputs.
template <class What>
auto with_rows(int32_t bits, bool int8_activations, const What& what) {
  if (bits == 32) return what(static_cast<WeightRows*>(nullptr));
  if (bits == 8) {
    if (int8_activations) return what(static_cast<LevelRows<8, true>*>(nullptr));
    return what(static_cast<LevelRows<8, false>*>(nullptr));
  }
  if (int8_activations) return what(static_cast<LevelRows<4, true>*>(nullptr));
  return what(static_cast<LevelRows<4, false>*>(nullptr));
}

// y [count, width] of up to kTileRows rows of so many columns.
template <class Rows>
void strip_products(const Rows& rows, int64_t row, int64_t count, int64_t width, int64_t columns, const float* strip,
                    float* panel, float* y) {
  int64_t stride;
  const float* weights = rows.panel(row, count, panel, &stride);
  tile_rows(count, width / kLanes, [&](int64_t r, auto R, auto V) {
    tile<R(), V()>(weights + r * stride, stride, strip, columns, y + r * width);
  });
}
template <class Rows>
void strip_products(const Rows& rows, int64_t row, int64_t count, int64_t width, int64_t, const StepStrip& strip,
                    float* panel, float* y) {
  if constexpr (Rows::kStepStrips) {
    tile_rows(count, width / kLanes, [&](int64_t r, auto R, auto V) {
      rows.template step_tile<R(), V()>(row + r, strip, reinterpret_cast<uint32_t*>(panel), y + r * width);
    });
  }
}

inline void swiglu(const float* gate, const float* up, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i];
}

}  // namespace
}  // namespace kimi::cpu
