#include <thread>
#include <vector>

#include "kimi_ort.h"
#include "op.h"
#include "tokenwise.h"

namespace kimi::ort {
namespace {

constexpr const Launcher& (*kLaunchers[])() = {kda_launcher, latent_attention_launcher, mixture_of_experts_launcher,
                                               quantized_mixture_of_experts_launcher};
constexpr int32_t kCount = static_cast<int32_t>(sizeof kLaunchers / sizeof *kLaunchers);

int32_t most_threads() {
  const unsigned processors = std::thread::hardware_concurrency();
  return processors == 0 ? 1 : static_cast<int32_t>(processors);
}

// Never destroyed: ONNX Runtime may look at an op as long as a session lives.
const std::vector<Op>& ops() {
  static const std::vector<Op>* const all = [] {
    auto* const made = new std::vector<Op>();
    for (const auto launcher : kLaunchers) made->emplace_back(launcher(), most_threads());
    return made;
  }();
  return *all;
}

Status* register_with(SessionOptions* options, const ApiBase* base) {
  const Api* const api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    // the oldest table can make an error
    const Api* const oldest = base->GetApi(1);
    return oldest->CreateStatus(ErrorCode::kFail, "kimi's kernels need ONNX Runtime 1.24 or newer");
  }
  // the options keep the domain, whose release would be theirs; ONNX Runtime leaves it to the process
  CustomOpDomain* domain = nullptr;
  if (Status* const status = api->CreateCustomOpDomain(ops()[0].launcher->spec->plugin_namespace, &domain)) {
    return status;
  }
  for (const Op& op : ops()) {
    if (Status* const status = api->CustomOpDomain_Add(domain, &op.callbacks)) return status;
  }
  if (Status* const status = api->CustomOpDomain_Add(domain, &tokenwise_op(most_threads()))) return status;
  return api->AddCustomOpDomain(options, domain);
}

// After the ops of OpSpecs comes Tokenwise.
const char* name(int32_t index) { return index == kCount ? kTokenwiseName : kLaunchers[index]().spec->name; }
const char* abi(int32_t index) { return index == kCount ? kTokenwiseAbi : kLaunchers[index]().spec->abi; }
bool known(int32_t index) { return index >= 0 && index <= kCount; }

}  // namespace
}  // namespace kimi::ort

extern "C" {

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return reinterpret_cast<OrtStatus*>(kimi::ort::register_with(reinterpret_cast<kimi::ort::SessionOptions*>(options),
                                                               reinterpret_cast<const kimi::ort::ApiBase*>(base)));
}

int32_t kimi_ort_count(void) { return kimi::ort::kCount + 1; }

const char* kimi_ort_name(int32_t index) { return kimi::ort::known(index) ? kimi::ort::name(index) : nullptr; }

const char* kimi_ort_abi(int32_t index) { return kimi::ort::known(index) ? kimi::ort::abi(index) : nullptr; }

const char* kimi_ort_instruction_set(void) { return kimi::cpu::instruction_set(); }

int32_t kimi_ort_choose_instruction_set(const char* name) { return kimi::cpu::choose_instruction_set(name); }
}
