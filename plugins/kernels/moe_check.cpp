#include "moe_check.h"

#include <algorithm>
#include <cmath>

#include "refusal.h"

namespace kimi {

namespace {

constexpr int kMaxExperts = 1024, kMaxTopK = 32;
constexpr int kTileRows = 64;                 // as the kernels'
constexpr int64_t kMaxPairs = (1 << 24) - 1;  // counted in float32
constexpr int64_t kNarrowestTile = 64;        // columns
constexpr int64_t kAlignment = 256;

KimiStatus check_sizes(const KimiMoeArguments& a, std::string& message) {
  KimiStatus status = check_struct(a.struct_size, sizeof a, message);
  if (status == KIMI_OK) status = check_type("data_type", a.data_type, message);
  if (status != KIMI_OK) return status;
  if (a.tokens < 0 || a.hidden < 8 || a.hidden % 8 != 0 || a.intermediate < 8 || a.intermediate % 8 != 0) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  "tokens " + number(a.tokens) + ", hidden " + number(a.hidden) + ", intermediate " +
                      number(a.intermediate) + "; expected at least 0, and two multiples of 8");
  }
  if (a.num_experts < 1 || a.num_experts > kMaxExperts) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  "num_experts is " + number(a.num_experts) + "; the kernels take 1 to " + number(kMaxExperts));
  }
  if (!divides(a.n_group, a.num_experts) || a.topk_group < 1 || a.topk_group > a.n_group) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  "n_group is " + number(a.n_group) + ", topk_group " + number(a.topk_group) +
                      "; expected a divisor of num_experts, " + number(a.num_experts) + ", and 1 to n_group");
  }
  const int reachable = a.num_experts / a.n_group * a.topk_group;
  if (a.top_k < 1 || a.top_k > kMaxTopK || a.top_k > reachable) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  "top_k is " + number(a.top_k) + "; the kernels take 1 to " + number(std::min(kMaxTopK, reachable)) +
                      ", the kept groups having " + number(reachable) + " experts");
  }
  if (a.renormalize != 0 && a.renormalize != 1) {
    return refuse(KIMI_ERROR_ARGUMENT, message, "renormalize is " + number(a.renormalize) + "; expected 0 or 1");
  }
  if (!std::isfinite(a.routed_scaling_factor)) {
    return refuse(KIMI_ERROR_ARGUMENT, message,
                  "routed_scaling_factor is " + std::to_string(a.routed_scaling_factor) + "; it must be finite");
  }
  const int64_t widest = std::max<int64_t>(2 * static_cast<int64_t>(a.intermediate), a.hidden);
  const int64_t pairs = static_cast<int64_t>(a.tokens) * a.top_k;
  if (pairs > kMaxPairs || 2 * static_cast<int64_t>(a.intermediate) > kMaxBlocks ||
      moe_tiles(a) * ((widest + kNarrowestTile - 1) / kNarrowestTile) > kMaxBlocks) {
    return refuse(KIMI_ERROR_SHAPE, message,
                  number(a.tokens) + " tokens with " + number(a.top_k) + " experts of " + number(a.intermediate) +
                      " each are more than one launch takes; fewer tokens at a time");
  }
  return KIMI_OK;
}

}  // namespace

KimiStatus check(const KimiMoeArguments* arguments, bool sizes_only, std::string& message) {
  if (arguments == nullptr) return refuse(KIMI_ERROR_ARGUMENT, message, "arguments is null");
  const KimiMoeArguments& a = *arguments;
  KimiStatus status = check_sizes(a, message);
  if (status != KIMI_OK || sizes_only || a.tokens == 0) return status;
  const Pointer pointers[] = {
      {"hidden_states", a.hidden_states, false}, {"router_weight", a.router_weight, false},
      {"router_bias", a.router_bias, false},     {"gate_up_weight", a.gate_up_weight, false},
      {"down_weight", a.down_weight, false},     {"output", a.output, false},
      {"workspace", a.workspace, true},
  };
  status = check_pointers(pointers, message);
  if (status != KIMI_OK) return status;
  const size_t needed = moe_workspace(a).total;
  if (a.workspace == nullptr || a.workspace_size < needed) {
    return refuse(KIMI_ERROR_WORKSPACE, message,
                  "workspace of " + std::to_string(a.workspace == nullptr ? 0 : a.workspace_size) + " bytes; " +
                      std::to_string(needed) + " are needed");
  }
  return KIMI_OK;
}

int64_t moe_tiles(const KimiMoeArguments& a) {
  const int64_t pairs = static_cast<int64_t>(a.tokens) * a.top_k;
  return pairs / kTileRows + std::min<int64_t>(pairs, a.num_experts);
}

MoeWorkspace moe_workspace(const KimiMoeArguments& a) {
  MoeWorkspace w = {};
  if (a.tokens == 0) return w;
  const size_t element = a.data_type == KIMI_FLOAT32 ? 4 : 2;
  const auto tokens = static_cast<size_t>(a.tokens), experts = static_cast<size_t>(a.num_experts);
  const size_t pairs = tokens * static_cast<size_t>(a.top_k), inner = static_cast<size_t>(a.intermediate);
  size_t end = 0;
  auto part = [&](size_t bytes) {
    const size_t start = (end + kAlignment - 1) / kAlignment * kAlignment;
    end = start + bytes;
    return start;
  };
  w.scores = part(tokens * experts * 4);
  w.chosen = part(pairs * 4);
  w.weights = part(pairs * 4);
  const size_t routed = end;
  w.few_hidden = part(pairs * inner * 4);
  w.total = end;
  if (a.tokens <= kMostFewTokens) return w;
  end = routed;
  const auto tiles = static_cast<size_t>(moe_tiles(a));
  w.counts = part(experts * 4);
  w.sorted = part(pairs * 4);
  w.tile_expert = part(tiles * 4);
  w.tile_first = part(tiles * 4);
  w.many_hidden = part(pairs * inner * element);
  w.many_output = part(pairs * static_cast<size_t>(a.hidden) * element);
  // never less than for fewer tokens
  KimiMoeArguments few = a;
  few.tokens = kMostFewTokens;
  w.total = std::max(end, moe_workspace(few).total);
  return w;
}

}  // namespace kimi
