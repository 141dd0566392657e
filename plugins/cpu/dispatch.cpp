// Each kernel, compiled for several instruction sets, as the best of them that this machine runs.
#include "kimi_cpu.h"

#if defined(__x86_64__)
#define KIMI_CPU_DISPATCH(result, name, parameters, arguments) \
  namespace x86_64_v2 {                                        \
  result name parameters;                                      \
  }                                                            \
  namespace x86_64_v3 {                                        \
  result name parameters;                                      \
  }                                                            \
  namespace x86_64_v4 {                                        \
  result name parameters;                                      \
  }                                                            \
  result name parameters {                                     \
    switch (level()) {                                         \
      case 4:                                                  \
        return x86_64_v4::name arguments;                      \
      case 3:                                                  \
        return x86_64_v3::name arguments;                      \
      default:                                                 \
        return x86_64_v2::name arguments;                      \
    }                                                          \
  }
#else
#define KIMI_CPU_DISPATCH(result, name, parameters, arguments) \
  namespace native {                                           \
  result name parameters;                                      \
  }                                                            \
  result name parameters { return native::name arguments; }
#endif

namespace kimi::cpu {
namespace {

#if defined(__x86_64__)
// Of the x86-64 psABI, from 2 on.
int level() {
  static const int found = [] {
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? 4 : v3 ? 3 : 2;
  }();
  return found;
}
#endif

}  // namespace

#if defined(__x86_64__)
const char* instruction_set() { return level() == 4 ? "x86-64-v4" : level() == 3 ? "x86-64-v3" : "x86-64-v2"; }
#else
const char* instruction_set() { return "native"; }
#endif

KIMI_CPU_DISPATCH(size_t, kda_workspace, (const KdaArguments& a, const Parallel& p), (a, p))
KIMI_CPU_DISPATCH(Status, kda, (const KdaArguments& a, const Parallel& p), (a, p))
KIMI_CPU_DISPATCH(size_t, latent_attention_workspace, (const LatentAttentionArguments& a, const Parallel& p), (a, p))
KIMI_CPU_DISPATCH(Status, latent_attention, (const LatentAttentionArguments& a, const Parallel& p), (a, p))

}  // namespace kimi::cpu
