// The library's edges: registration on load, through getCreators and by call.
#include <cstring>
#include <mutex>

#include "creator.h"
#include "kimi_plugins.h"
#include "process.h"
#include "report.h"

namespace kimi {

namespace {

using nvinfer1::IPluginCreatorInterface;

struct Creators {
  PluginCreator items[4] = {PluginCreator(kda_launcher()), PluginCreator(moe_launcher()),
                            PluginCreator(linear_attention_launcher()), PluginCreator(causal_conv_launcher())};
  IPluginCreatorInterface* pointers[4] = {&items[0], &items[1], &items[2], &items[3]};
};

constexpr int32_t kCount = static_cast<int32_t>(sizeof(Creators::items) / sizeof(PluginCreator));

// Never destroyed: TensorRT may look at a creator while the process ends.
Creators& creators() {
  static Creators* const all = new Creators();
  return *all;
}

std::mutex mutex;
std::string error;

// A creator of the same name, version and namespace that the registry has; null if none.
const IPluginCreatorInterface* rival(const std::vector<IPluginCreatorInterface*>& registered,
                                     const PluginCreator& own) {
  for (IPluginCreatorInterface* other : registered) {
    if (std::strcmp(other->getInterfaceInfo().kind, own.getInterfaceInfo().kind) != 0) continue;
    const auto* creator = static_cast<const nvinfer1::IPluginCreatorV3One*>(other);
    if (std::strcmp(creator->getPluginName(), own.getPluginName()) == 0 &&
        std::strcmp(creator->getPluginVersion(), own.getPluginVersion()) == 0 &&
        std::strcmp(creator->getPluginNamespace(), own.getPluginNamespace()) == 0) {
      return other;
    }
  }
  return nullptr;
}

// Whether all of this library's plugins are registered there now.
bool register_with(const TensorRt& tensorrt) {
  bool complete = true;
  const std::vector<IPluginCreatorInterface*> registered = tensorrt.registry.creators();
  for (PluginCreator& own : creators().items) {
    const IPluginCreatorInterface* other = rival(registered, own);
    if (other == &own) continue;
    if (other != nullptr || !tensorrt.registry.add(own, own.getPluginNamespace())) {
      complete = false;
      error += (error.empty() ? "" : "; ") + std::string(own.getPluginName()) + " in " + tensorrt.file +
               (other != nullptr ? " is registered already by something else; it is left as it is"
                                 : " was not taken by TensorRT's registry");
    }
  }
  return complete;
}

int32_t register_everywhere() {
  const std::lock_guard<std::mutex> lock(mutex);
  error.clear();
  std::string refused;
  int32_t complete = 0;
  for (const TensorRt& tensorrt : tensorrts_of_process(&refused)) complete += register_with(tensorrt) ? 1 : 0;
  if (!refused.empty()) error += (error.empty() ? "" : "; ") + refused;
  if (complete == 0 && error.empty()) error = "this process has loaded no TensorRT";
  return complete > 0 ? complete : -1;
}

// Loading is enough. Tools load plugins before they use TensorRT, and count on a plugin library to bring it. Where it
// is not on the loader's path, as with pip, nothing is registered and nothing said: the application loads it in its own
// way.
const bool registered_on_load = guarded("kimi plugins", false, [] {
  load_tensorrt_if_none();
  return register_everywhere() > 0;
});

}  // namespace
}  // namespace kimi

extern "C" {

int32_t kimi_plugins_register(void) {
  return kimi::guarded("kimi plugins", -1, [] { return kimi::register_everywhere(); });
}

const char* kimi_plugins_error(void) { return kimi::error.c_str(); }

int32_t kimi_plugins_count(void) { return kimi::kCount; }

const char* kimi_plugins_name(int32_t index) {
  return index < 0 || index >= kimi::kCount ? nullptr : kimi::creators().items[index].getPluginName();
}

const char* kimi_plugins_abi(int32_t index) {
  return index < 0 || index >= kimi::kCount ? nullptr : kimi::creators().items[index].abi();
}

void kimi_plugins_on_error(void (*callback)(const char* message)) { kimi::set_error_callback(callback); }

KIMI_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { kimi::set_logger_finder(finder); }

// What IPluginRegistry::loadLibrary asks for, right after it loaded the library, which thereby registered itself: its
// own registration of a creator that is there fails, so ours makes way for it.
KIMI_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  return kimi::guarded<nvinfer1::IPluginCreatorInterface* const*>("kimi plugins", nullptr, [&] {
    const std::lock_guard<std::mutex> lock(kimi::mutex);
    for (const kimi::TensorRt& tensorrt : kimi::tensorrts_of_process(nullptr)) {
      const std::vector<nvinfer1::IPluginCreatorInterface*> registered = tensorrt.registry.creators();
      for (kimi::PluginCreator& own : kimi::creators().items) {
        if (kimi::rival(registered, own) == &own) tensorrt.registry.remove(own);
      }
    }
    count = kimi::kCount;
    return kimi::creators().pointers;
  });
}
}
