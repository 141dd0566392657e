#include "causal_conv.cuh"
#include "standard_check.h"

namespace kimi {
namespace {

template <class T, int kLanes>
std::string run(const KimiCausalConvArguments& a) {
  CausalConvParams<T> p = {};
  p.input = static_cast<const T*>(a.input);
  p.weight = static_cast<const T*>(a.weight);
  p.bias = static_cast<const T*>(a.bias);
  p.past_state = static_cast<const T*>(a.past_state);
  p.output = static_cast<T*>(a.output);
  p.present_state = static_cast<T*>(a.present_state);
  p.rows = static_cast<int64_t>(a.batch) * a.channels;
  p.channels = a.channels;
  p.sequence = a.sequence;
  p.width = a.width;
  p.silu = a.activation == KIMI_ACTIVATION_SILU;
  const int64_t blocks = (p.rows * kLanes + kConvThreads - 1) / kConvThreads;
  const std::string message = launch(a.width == 4 ? causal_conv<T, kLanes, 4> : causal_conv<T, kLanes, 0>, p, blocks,
                                     kConvThreads, 0, a.stream);
  return message.empty() ? message : "causal_conv: " + message;
}

template <class T>
std::string for_lanes(const KimiCausalConvArguments& a) {
  return a.sequence >= kWarp && a.sequence >= a.width - 1 ? run<T, kWarp>(a) : run<T, 1>(a);
}

}  // namespace
}  // namespace kimi

extern "C" int32_t kimi_causal_conv(const KimiCausalConvArguments* arguments) {
  using namespace kimi;
  std::string message;
  const KimiStatus status = check(arguments, message);
  if (status != KIMI_OK) return finish(status, message);
  const KimiCausalConvArguments& a = *arguments;
  message = a.data_type == KIMI_FLOAT32   ? for_lanes<float>(a)
            : a.data_type == KIMI_FLOAT16 ? for_lanes<Half>(a)
                                          : for_lanes<BFloat16>(a);
  return finish(message.empty() ? KIMI_OK : KIMI_ERROR_LAUNCH, message);
}
