// Which of the two kernels an invocation gets.
#include "kda_check.h"

namespace kimi {

namespace {

// Up to here a padded batch is decoded. On an H100, 32 heads of 128, one row: 8 steps take 18.0 us decoded and 19.6 as
// a prefill, 12 take 24.7 and 19.6 (python -m kimi_deploy.bench.kernels.thresholds).
constexpr int32_t kMostDecodedSteps = 8;

bool decodes(const KimiKdaArguments& a) {
  if (a.cu_seqlens != nullptr || a.state_snapshots != nullptr) return false;
  // prefill takes no float32
  return a.sequence <= kMostDecodedSteps || a.data_type == KIMI_FLOAT32;
}

}  // namespace
}  // namespace kimi

extern "C" {

int32_t kimi_kda_workspace(const KimiKdaArguments* arguments, size_t* bytes) {
  using namespace kimi;
  std::string message;
  KimiStatus status = check(arguments, Call::kSizes, message);
  if (status == KIMI_OK && !decodes(*arguments)) return kimi_kda_prefill_workspace(arguments, bytes);
  if (status == KIMI_OK && bytes == nullptr) {
    status = KIMI_ERROR_ARGUMENT;
    message = "bytes is null";
  }
  if (status == KIMI_OK) *bytes = 0;
  return finish(status, message);
}

int32_t kimi_kda(const KimiKdaArguments* arguments) {
  using namespace kimi;
  std::string message;
  const KimiStatus status = check(arguments, Call::kSizes, message);
  if (status != KIMI_OK) return finish(status, message);
  return decodes(*arguments) ? kimi_kda_decode(arguments) : kimi_kda_prefill(arguments);
}
}
