// Each kernel, compiled for several instruction sets, as the best of them that this machine runs.
#include <atomic>
#include <cstring>

#include "kimi_cpu.h"

#if defined(__x86_64__)
// `best` is the namespace for level 5, x86_64_v4 where VNNI's products of bytes would not help.
#define KIMI_CPU_DISPATCH(best, result, name, parameters, arguments) \
  namespace x86_64_v2 {                                              \
  result name parameters;                                            \
  }                                                                  \
  namespace x86_64_v3 {                                              \
  result name parameters;                                            \
  }                                                                  \
  namespace x86_64_v4 {                                              \
  result name parameters;                                            \
  }                                                                  \
  namespace best {                                                   \
  result name parameters;                                            \
  }                                                                  \
  result name parameters {                                           \
    switch (level()) {                                               \
      case 5:                                                        \
        return best::name arguments;                                 \
      case 4:                                                        \
        return x86_64_v4::name arguments;                            \
      case 3:                                                        \
        return x86_64_v3::name arguments;                            \
      default:                                                       \
        return x86_64_v2::name arguments;                            \
    }                                                                \
  }
#else
#define KIMI_CPU_DISPATCH(best, result, name, parameters, arguments) \
  namespace native {                                                 \
  result name parameters;                                            \
  }                                                                  \
  result name parameters { return native::name arguments; }
#endif

namespace kimi::cpu {
namespace {

#if defined(__x86_64__)
constexpr const char* kNames[] = {"x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4 with VNNI"};

// Of the x86-64 psABI, from 2 on; 5 is 4 with AVX512-VNNI.
int best_level() {
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 && __builtin_cpu_supports("avx512vnni") ? 5 : v4 ? 4 : v3 ? 3 : 2;
}

std::atomic<int> chosen_level{0};

int level() {
  const int found = chosen_level.load(std::memory_order_relaxed);
  if (found != 0) return found;
  const int best = best_level();
  chosen_level.store(best, std::memory_order_relaxed);
  return best;
}
#endif

}  // namespace

#if defined(__x86_64__)
const char* instruction_set() { return kNames[level() - 2]; }

bool choose_instruction_set(const char* name) {
  const int best = best_level();
  for (int i = 2; i <= best; ++i) {
    if (std::strcmp(name, kNames[i - 2]) != 0) continue;
    chosen_level.store(i, std::memory_order_relaxed);
    return true;
  }
  return false;
}
#else
const char* instruction_set() { return "native"; }
bool choose_instruction_set(const char* name) { return std::strcmp(name, "native") == 0; }
#endif

KIMI_CPU_DISPATCH(x86_64_v4, size_t, kda_workspace, (const KdaArguments& a, const Parallel& p), (a, p))
KIMI_CPU_DISPATCH(x86_64_v4, Status, kda, (const KdaArguments& a, const Parallel& p), (a, p))
KIMI_CPU_DISPATCH(x86_64_v4, size_t, latent_attention_workspace, (const LatentAttentionArguments& a, const Parallel& p),
                  (a, p))
KIMI_CPU_DISPATCH(x86_64_v4, Status, latent_attention, (const LatentAttentionArguments& a, const Parallel& p), (a, p))
KIMI_CPU_DISPATCH(x86_64_v4_vnni, size_t, mixture_of_experts_workspace,
                  (const MixtureOfExpertsArguments& a, const Parallel& p), (a, p))
KIMI_CPU_DISPATCH(x86_64_v4_vnni, Status, mixture_of_experts, (const MixtureOfExpertsArguments& a, const Parallel& p),
                  (a, p))

KIMI_CPU_DISPATCH(x86_64_v4_vnni, size_t, tokenwise_workspace, (const TokenwiseArguments& a, const Parallel& p), (a, p))
KIMI_CPU_DISPATCH(x86_64_v4_vnni, void, tokenwise, (const TokenwiseArguments& a, const Parallel& p), (a, p))

}  // namespace kimi::cpu
