// Which experts each token takes, and with what weights.
#pragma once

#include "moe_params.cuh"

namespace kimi {

constexpr float kRenormalizeEpsilon = 1e-20f;
constexpr int kScoredTokens = 8;  // of a warp: they share the router's row, the warps of a block share the tokens

// A warp scores one expert for kScoredTokens tokens. Blocks: expert groups of kMoeWarps, then tokens.
template <class T>
KIMI_KERNEL(kMoeThreads, 2)
moe_score(KIMI_GRID_CONSTANT MoeParams<T> p) {
  const int expert_blocks = (p.experts + kMoeWarps - 1) / kMoeWarps;
  const int expert = block_index() % expert_blocks * kMoeWarps + thread_index() / kWarp;
  const int first = block_index() / expert_blocks * kScoredTokens, lane = thread_index() % kWarp;
  if (expert >= p.experts) return;  // the whole warp
  const T* row = p.router_weight + static_cast<int64_t>(expert) * p.hidden;
  float sums[kScoredTokens] = {};
  for (int c = lane * 8; c < p.hidden; c += kWarp * 8) {
    const Eight w = load8(row + c);
#pragma unroll
    for (int i = 0; i < kScoredTokens; ++i) {
      if (first + i < p.tokens) {
        sums[i] = dot8(w, load8(p.x + static_cast<int64_t>(first + i) * p.hidden + c), sums[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kScoredTokens; ++i) {
    const float logit = warp_sum(sums[i]);
    // not the quick sigmoid: scores that are nearly equal decide which expert is read
    if (lane == i && first + i < p.tokens) {
      p.scores[static_cast<int64_t>(first + i) * p.experts + expert] = 1.0f / (1.0f + expf(-logit));
    }
  }
}

struct Best {
  float value;
  int index;
};

// The largest of all lanes' values, of equal ones that with the lowest index.
KIMI_DEVICE Best warp_best(Best best) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float value = shuffle_xor(best.value, mask);
    const int index = static_cast<int>(bits_of(shuffle_xor(float_of(static_cast<uint32_t>(best.index)), mask)));
    if (value > best.value || (value == best.value && index < best.index)) best = Best{value, index};
  }
  return best;
}

// Index of the largest of `values`, of equal ones the lowest; NaN is never it. `otherwise` if there is none.
KIMI_DEVICE int warp_largest(const float* values, int count, int otherwise) {
  Best best = {-INFINITY, 0x7FFFFFFF};
  for (int i = thread_index() % kWarp; i < count; i += kWarp) {
    const float value = values[i];
    if (value > best.value || (value == best.value && i < best.index)) best = Best{value, i};
  }
  best = warp_best(best);
  return best.index == 0x7FFFFFFF ? otherwise : best.index;
}

// Shared memory of a block: biased scores and, where there are groups, their scores, of every warp.
inline size_t choose_bytes(int experts, int groups) {
  return sizeof(float) * static_cast<size_t>(experts + groups) * kMoeWarps;
}

// A warp chooses for one token.
template <class T>
KIMI_KERNEL(kMoeThreads, 2)
moe_choose(KIMI_GRID_CONSTANT MoeParams<T> p) {
  const int64_t token = grid_warp();
  const int lane = thread_index() % kWarp;
  if (token >= p.tokens) return;  // the whole warp
  float* biased = reinterpret_cast<float*>(shared_memory()) + thread_index() / kWarp * (p.experts + p.groups);
  float* groups = biased + p.experts;
  const float* scores = p.scores + token * p.experts;
  for (int e = lane; e < p.experts; e += kWarp) {
    const float score = scores[e] + p.router_bias[e];
    // a NaN is chosen first, so that it shows; from here on NaN means "not to be chosen"
    biased[e] = score == score ? score : INFINITY;
  }
  sync_warp();
  if (p.kept_groups < p.groups) {
    const int size = p.experts / p.groups;
    for (int g = lane; g < p.groups; g += kWarp) {
      float first = -INFINITY, second = size > 1 ? -INFINITY : 0.0f;
      for (int e = g * size; e < (g + 1) * size; ++e) {
        const float score = biased[e];
        if (score > first) {
          if (size > 1) second = first;
          first = score;
        } else if (score > second && size > 1) {
          second = score;
        }
      }
      groups[g] = first + second;
    }
    sync_warp();
    for (int i = 0; i < p.kept_groups; ++i) {
      const int group = warp_largest(groups, p.groups, i);
      sync_warp();
      if (lane == 0) groups[group] = NAN;
      sync_warp();
    }
    for (int e = lane; e < p.experts; e += kWarp) {
      const float group = groups[e / size];
      if (group == group) biased[e] = NAN;
    }
    sync_warp();
  }
  int own = 0;  // lane i keeps choice i
  for (int i = 0; i < p.top_k; ++i) {
    const int expert = warp_largest(biased, p.experts, i);
    if (lane == i) own = expert;
    sync_warp();
    if (lane == 0) biased[expert] = NAN;
    sync_warp();
  }
  const float score = lane < p.top_k ? scores[own] : 0.0f;
  const float total = warp_sum(score);
  if (lane < p.top_k) {
    const int64_t pair = token * p.top_k + lane;
    p.chosen[pair] = own;
    p.weights[pair] = (p.renormalize ? score / (total + kRenormalizeEpsilon) : score) * p.factor;
  }
}

}  // namespace kimi
