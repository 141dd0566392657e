#include "kda_chain.cuh"
#include "kda_launch.cuh"
#include "kda_output.cuh"
#include "kda_prep.cuh"

namespace kimi {

Workspace prefill_workspace(const KimiKdaArguments& a) {
  const auto heads = static_cast<size_t>(a.num_heads);
  const auto rows = static_cast<size_t>(a.cu_seqlens != nullptr ? 1 : a.batch) * static_cast<size_t>(a.sequence);
  const int record = a.head_dim == 64 ? TileRecord<64>::kBytes : TileRecord<128>::kBytes;
  return {static_cast<size_t>(max_tiles(a)) * heads * static_cast<size_t>(record),
          rows * heads * static_cast<size_t>(a.head_dim) * sizeof(float)};
}

namespace {

// Blocks of four warps, one for every part of a multiprocessor, unless there are too many heads for that: fewer warps
// leave parts idle, and every block reads all of a tile's keys and queries. Measured on an H200: at 32 heads two blocks
// a head take about 390 us for 8192 steps, one about 550, four 440.
template <int D>
int chosen_splits(const KimiKdaArguments& a) {
  constexpr int kGroups = ChainLayout<D>::kMaxWarps / 4;  // of four warps, which start Hopper's products together
  if (a.value_splits > 0) return is_hopper() && a.value_splits > kGroups ? kGroups : a.value_splits;
  const int64_t heads = static_cast<int64_t>(a.batch) * a.num_heads;
  int splits = 1;
  while (splits < kGroups && heads * splits * 2 <= multiprocessors()) splits *= 2;
  return splits;
}

// How many tiles a block of the chain has in shared memory. Hopper: as many as hide the memory's latency, unless blocks
// have to share a multiprocessor.
int chosen_stages(int stage_pitch, int64_t blocks) {
  constexpr int kMostStages = 6;
  if (!is_hopper()) return kChainStages;
  const int room = (blocks <= multiprocessors() ? 224 : 112) * 1024 / stage_pitch;
  return clamp(room, kChainStages, kMostStages);
}

template <class T, int D>
std::string prefill(const KimiKdaArguments& a) {
  const Workspace workspace = prefill_workspace(a);
  KdaParams<T> p = params_of<T>(a);
  p.tiles = static_cast<unsigned char*>(a.workspace);
  p.raw_output = reinterpret_cast<float*>(p.tiles + workspace.tiles);
  p.num_tiles = max_tiles(a);
  const int64_t heads = a.num_heads;
  const int64_t rows = static_cast<int64_t>(a.cu_seqlens != nullptr ? 1 : a.batch) * a.sequence;

  std::string message;
  if (a.sequence > 0) {
    message =
        launch(kda_prep<T, D>, p, p.num_tiles * heads, PrepLayout<D>::kThreads, PrepLayout<D>::kSharedBytes, a.stream);
    if (!message.empty()) return "kda_prep: " + message;
  }
  const int splits = chosen_splits<D>(a), warps = ChainLayout<D>::kMaxWarps / splits;
  const int64_t blocks = a.batch * heads * splits;
  p.stages = chosen_stages(ChainLayout<D>::stage_pitch(warps), blocks);
  message = launch(kda_chain<T, D>, p, blocks, warps * kWarp,
                   static_cast<size_t>(ChainLayout<D>::shared_bytes(warps, p.stages)), a.stream);
  if (!message.empty()) return "kda_chain: " + message;
  if (a.sequence > 0) {
    const int items = kOutputThreads / (D / 4);  // of a block
    message = launch(kda_output<T, D>, p, (rows * heads + items - 1) / items, kOutputThreads, 0, a.stream);
    if (!message.empty()) return "kda_output: " + message;
  }
  return message;
}

}  // namespace
}  // namespace kimi

extern "C" {

int32_t kimi_kda_prefill_workspace(const KimiKdaArguments* arguments, size_t* bytes) {
  using namespace kimi;
  std::string message;
  KimiStatus status = check(arguments, Call::kPrefillWorkspace, message);
  if (status == KIMI_OK && bytes == nullptr) {
    status = KIMI_ERROR_ARGUMENT;
    message = "bytes is null";
  }
  if (status == KIMI_OK) *bytes = prefill_workspace(*arguments).total();
  return finish(status, message);
}

int32_t kimi_kda_prefill(const KimiKdaArguments* arguments) {
  using namespace kimi;
  std::string message;
  const KimiStatus status = check(arguments, Call::kPrefill, message);
  if (status != KIMI_OK) return finish(status, message);
  message =
      for_16_bit(*arguments, [&](auto type, auto head_dim) { return prefill<decltype(type), head_dim>(*arguments); });
  return finish(message.empty() ? KIMI_OK : KIMI_ERROR_LAUNCH, message);
}
}
