// The router of MixtureOfExperts: scores of all experts, the choice of a token's experts and their weights.
#pragma once

#include <limits>

#include "moe_rows.h"

namespace kimi::cpu {
namespace {

// a before b in descending order; NaN is the largest, as PyTorch sorts.
inline bool above(float a, float b) { return a > b || (a != a && b == b); }

// The first index of the largest of `count` values, those taken left out.
inline int64_t best_of(const float* values, const bool* taken, int64_t count) {
  int64_t best = -1;
  for (int64_t i = 0; i < count; ++i) {
    if (!taken[i] && (best < 0 || above(values[i], values[best]))) best = i;
  }
  return best;
}

// Puts minus infinity in the place of every biased score outside the topk_group groups with the best sums of their two
// best scores.
inline void keep_groups(const MixtureOfExpertsArguments& a, float* biased) {
  const int64_t size = a.num_experts / a.n_group;
  float sums[kMaxExperts];
  bool kept[kMaxExperts] = {};
  for (int64_t g = 0; g < a.n_group; ++g) {
    const float* group = biased + g * size;
    bool taken[kMaxExperts];
    for (int64_t i = 0; i < size; ++i) taken[i] = false;
    const int64_t first = best_of(group, taken, size);
    taken[first] = true;
    const int64_t second = best_of(group, taken, size);
    sums[g] = group[first] + (second < 0 ? 0.0f : group[second]);
  }
  for (int64_t i = 0; i < a.topk_group; ++i) kept[best_of(sums, kept, a.n_group)] = true;
  for (int64_t e = 0; e < a.num_experts; ++e) {
    if (!kept[e / size]) biased[e] = -std::numeric_limits<float>::infinity();
  }
}

// Experts [top_k] of one token and their weights, of its router logits [num_experts], which become scores.
inline void choose(const MixtureOfExpertsArguments& a, float* logits, int32_t* experts, float* weights) {
  float biased[kMaxExperts];
  bool taken[kMaxExperts];
  for (int64_t e = 0; e < a.num_experts; ++e) taken[e] = false;
  for (int64_t e = 0; e < a.num_experts; ++e) logits[e] = sigmoid_of(logits[e]);
  for (int64_t e = 0; e < a.num_experts; ++e) biased[e] = logits[e] + a.router_bias[e];
  if (a.topk_group < a.n_group) keep_groups(a, biased);
  float total = 0.0f;
  for (int64_t k = 0; k < a.top_k; ++k) {
    const int64_t e = best_of(biased, taken, a.num_experts);
    taken[e] = true;
    experts[k] = static_cast<int32_t>(e);
    weights[k] = logits[e];
    total += logits[e];
  }
  const float divisor = a.renormalize ? total + 1e-20f : 1.0f;
  for (int64_t k = 0; k < a.top_k; ++k) weights[k] = weights[k] / divisor * a.routed_scaling_factor;
}

// Logits [tokens, num_experts] of experts [first, last) for tokens [begin, end).
inline void router_logits(const MixtureOfExpertsArguments& a, int64_t begin, int64_t end, int64_t first, int64_t last,
                          float* logits) {
  const FloatRows rows{a.router_weight, a.hidden};
  for (int64_t t = begin; t < end; t += kFewAtOnce) {
    const int64_t count = end - t < kFewAtOnce ? end - t : kFewAtOnce;
    const float* x[kFewAtOnce];
    for (int64_t m = 0; m < count; ++m) x[m] = a.hidden_states + (t + m) * a.hidden;
    few_products(rows, first, last, x, count,
                 [&](int64_t row, int64_t m, float sum) { logits[(t + m) * a.num_experts + row] = sum; });
  }
}

}  // namespace
}  // namespace kimi::cpu
