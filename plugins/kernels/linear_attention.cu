#include <algorithm>

#include "linear_attention.cuh"
#include "standard_check.h"

namespace kimi {
namespace {

constexpr size_t kStagedBytes = 24 * 1024;  // of a block: several of them fit a multiprocessor
constexpr int kMaxStagedSteps = 16;

template <class T, int kKeys>
std::string run(const KimiLinearAttentionArguments& a) {
  using Layout = LinearAttentionLayout<kKeys>;
  const int64_t states = static_cast<int64_t>(a.batch) * a.kv_num_heads;
  auto blocks_of = [&](int warps) { return (a.value_dim - 1) / (warps * Layout::kColumns) + 1; };
  // wide blocks share a step's key and query; narrower ones where the chip has room for more blocks
  int warps = Layout::kMaxWarps;
  while (warps > 1 && (blocks_of(warps / 2) == blocks_of(warps) || states * blocks_of(warps) < multiprocessors())) {
    warps /= 2;
  }

  LinearAttentionParams<T> p = {};
  p.query = static_cast<const T*>(a.query);
  p.key = static_cast<const T*>(a.key);
  p.value = static_cast<const T*>(a.value);
  p.decay = static_cast<const T*>(a.decay);
  p.beta = static_cast<const T*>(a.beta);
  p.past_state = a.past_state;
  p.output = static_cast<T*>(a.output);
  p.present_state = a.present_state;
  p.sequence = a.sequence;
  p.kv_heads = a.kv_num_heads;
  p.key_heads = a.key_num_heads;
  p.query_heads = a.q_num_heads;
  p.output_heads = std::max(a.q_num_heads, a.kv_num_heads);
  p.beta_heads = a.beta_num_heads;
  p.queries = queries_of_state(a);
  p.key_dim = a.key_dim;
  p.value_dim = a.value_dim;
  p.state_type = a.state_type;
  p.column_blocks = blocks_of(warps);
  p.decay_per_key = a.decay_per_key != 0;
  p.vectors = a.value_dim % 4 == 0;
  p.scale = a.scale == 0.0f ? 1.0f / std::sqrt(static_cast<float>(a.key_dim)) : a.scale;

  const size_t step_bytes =
      sizeof(float) * static_cast<size_t>(Layout::step_floats(p.queries, warps * Layout::kColumns));
  const auto fitting = static_cast<int>(kStagedBytes / step_bytes);
  p.staged_steps = std::max(1, std::min({fitting, kMaxStagedSteps, a.sequence}));
  const std::string message = launch(linear_attention<T, kKeys>, p, states * p.column_blocks, warps * kWarp,
                                     step_bytes * static_cast<size_t>(p.staged_steps), a.stream);
  return message.empty() ? message : "linear_attention: " + message;
}

template <class T>
std::string for_key_dim(const KimiLinearAttentionArguments& a) {
  switch (rows_for(a.key_dim)) {
    case 64:
      return run<T, 64>(a);
    case 128:
      return run<T, 128>(a);
    case 256:
      return run<T, 256>(a);
    default:
      return run<T, 512>(a);
  }
}

}  // namespace
}  // namespace kimi

extern "C" {

int32_t kimi_linear_attention_workspace(const KimiLinearAttentionArguments* arguments, size_t* bytes) {
  using namespace kimi;
  std::string message;
  KimiStatus status = check_sizes(arguments, message);
  if (status == KIMI_OK && bytes == nullptr) {
    status = KIMI_ERROR_ARGUMENT;
    message = "bytes is null";
  }
  if (status == KIMI_OK) *bytes = 0;
  return finish(status, message);
}

int32_t kimi_linear_attention(const KimiLinearAttentionArguments* arguments) {
  using namespace kimi;
  std::string message;
  const KimiStatus status = check(arguments, message);
  if (status != KIMI_OK) return finish(status, message);
  const KimiLinearAttentionArguments& a = *arguments;
  message = a.data_type == KIMI_FLOAT32   ? for_key_dim<float>(a)
            : a.data_type == KIMI_FLOAT16 ? for_key_dim<Half>(a)
                                          : for_key_dim<BFloat16>(a);
  return finish(message.empty() ? KIMI_OK : KIMI_ERROR_LAUNCH, message);
}
}
