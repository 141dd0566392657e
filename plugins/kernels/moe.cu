#include "moe_check.h"
#include "moe_few.cuh"
#include "moe_many.cuh"
#include "moe_route.cuh"

namespace kimi {
namespace {

template <class T>
MoeParams<T> params_of(const KimiMoeArguments& a) {
  const MoeWorkspace parts = moe_workspace(a);
  auto* workspace = static_cast<unsigned char*>(a.workspace);
  MoeParams<T> p = {};
  p.x = static_cast<const T*>(a.hidden_states);
  p.router_weight = static_cast<const T*>(a.router_weight);
  p.router_bias = a.router_bias;
  p.gate_up = static_cast<const T*>(a.gate_up_weight);
  p.down = static_cast<const T*>(a.down_weight);
  p.output = static_cast<T*>(a.output);
  p.tokens = a.tokens;
  p.hidden = a.hidden;
  p.experts = a.num_experts;
  p.inner = a.intermediate;
  p.top_k = a.top_k;
  p.groups = a.n_group;
  p.kept_groups = a.topk_group;
  p.renormalize = a.renormalize != 0;
  p.factor = a.routed_scaling_factor;
  p.scores = reinterpret_cast<float*>(workspace + parts.scores);
  p.chosen = reinterpret_cast<int*>(workspace + parts.chosen);
  p.weights = reinterpret_cast<float*>(workspace + parts.weights);
  p.few_hidden = reinterpret_cast<float*>(workspace + parts.few_hidden);
  p.counts = reinterpret_cast<int*>(workspace + parts.counts);
  p.sorted = reinterpret_cast<int*>(workspace + parts.sorted);
  p.tile_expert = reinterpret_cast<int*>(workspace + parts.tile_expert);
  p.tile_first = reinterpret_cast<int*>(workspace + parts.tile_first);
  p.many_hidden = reinterpret_cast<T*>(workspace + parts.many_hidden);
  p.many_output = reinterpret_cast<T*>(workspace + parts.many_output);
  p.tiles = static_cast<int>(moe_tiles(a));
  return p;
}

// Launches one after the other on a stream until one fails.
template <class T>
struct Launches {
  const MoeParams<T>& p;
  void* stream;
  std::string message = {};

  void operator()(const char* name, void (*kernel)(MoeParams<T>), int64_t blocks, int threads, size_t shared_bytes) {
    if (!message.empty()) return;
    message = launch(kernel, p, blocks, threads, shared_bytes, stream);
    if (!message.empty()) message = std::string(name) + ": " + message;
  }
};

int64_t blocks_of(int64_t count, int64_t a_block) { return (count + a_block - 1) / a_block; }

// The gate and up product, then the down product, in tiles of one kind.
template <class Tile, class T>
void products(Launches<T>& run, const char* name, void (*first)(MoeParams<T>), void (*second)(MoeParams<T>)) {
  const MoeParams<T>& p = run.p;
  run(name, first, p.tiles * blocks_of(2 * p.inner, Tile::kColumns), Tile::kThreads, Tile::kBytes);
  run(name, second, p.tiles * blocks_of(p.hidden, Tile::kColumns), Tile::kThreads, Tile::kBytes);
}

void products(Launches<float>& run) {
  products<ExpertTile32>(run, "moe_product_32", moe_product_32<float, true>, moe_product_32<float, false>);
}

template <class T>
void products(Launches<T>& run) {
  products<ExpertTile16>(run, "moe_product_16", moe_product_16<T, true>, moe_product_16<T, false>);
}

template <class T>
std::string run(const KimiMoeArguments& a) {
  const MoeParams<T> p = params_of<T>(a);
  Launches<T> run{p, a.stream};
  run("moe_score", moe_score<T>, blocks_of(p.experts, kMoeWarps) * blocks_of(p.tokens, kScoredTokens), kMoeThreads, 0);
  run("moe_choose", moe_choose<T>, blocks_of(p.tokens, kMoeWarps), kMoeThreads, choose_bytes(p.experts, p.groups));
  if (a.tokens <= kMostFewTokens) {
    run("moe_few_gate_up", moe_few_gate_up<T>, blocks_of(static_cast<int64_t>(p.pairs()) * p.inner, kMoeWarps),
        kMoeThreads, 0);
    run("moe_few_down", moe_few_down<T>, blocks_of(static_cast<int64_t>(p.tokens) * p.hidden, kMoeWarps), kMoeThreads,
        0);
    return run.message;
  }
  run("moe_count", moe_count<T>, p.experts, kMoeThreads, sizeof(float) * kMoeWarps);
  run("moe_place", moe_place<T>, p.experts, kMoeThreads, sizeof(float) * kMoeWarps + sizeof(int) * kMoeThreads);
  products(run);
  run("moe_sum", moe_sum<T>, blocks_of(static_cast<int64_t>(p.tokens) * p.hidden, kMoeThreads * 4), kMoeThreads, 0);
  return run.message;
}

}  // namespace
}  // namespace kimi

extern "C" {

int32_t kimi_moe_workspace(const KimiMoeArguments* arguments, size_t* bytes) {
  using namespace kimi;
  std::string message;
  KimiStatus status = check(arguments, true, message);
  if (status == KIMI_OK && bytes == nullptr) {
    status = KIMI_ERROR_ARGUMENT;
    message = "bytes is null";
  }
  if (status == KIMI_OK) *bytes = moe_workspace(*arguments).total;
  return finish(status, message);
}

int32_t kimi_moe(const KimiMoeArguments* arguments) {
  using namespace kimi;
  std::string message;
  const KimiStatus status = check(arguments, false, message);
  if (status != KIMI_OK || arguments->tokens == 0) return finish(status, message);
  const KimiMoeArguments& a = *arguments;
  message = a.data_type == KIMI_FLOAT32 ? run<float>(a) : a.data_type == KIMI_FLOAT16 ? run<Half>(a) : run<BFloat16>(a);
  return finish(message.empty() ? KIMI_OK : KIMI_ERROR_LAUNCH, message);
}
}
