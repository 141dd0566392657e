#include "process.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>

namespace kimi {

namespace {

constexpr int kOldestFull = 101300;  // 10.13.0
constexpr int kOldestRtx = 10700;    // 1.7.0

// Paths of loaded objects that may be a TensorRT; by name, since a library may be loaded without global symbols.
std::vector<std::string> candidates() {
  std::vector<std::string> paths;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        const char* name = std::strrchr(info->dlpi_name, '/');
        name = name != nullptr ? name + 1 : info->dlpi_name;
        // libnvinfer_plugin and the like have no registry of their own
        if (std::strncmp(name, "libnvinfer.so", 13) == 0 || std::strncmp(name, "libtensorrt_rtx.so", 18) == 0 ||
            std::strncmp(name, "libnvinfer_lean.so", 18) == 0 ||
            std::strncmp(name, "libnvinfer_dispatch.so", 22) == 0) {
          static_cast<std::vector<std::string>*>(found)->emplace_back(info->dlpi_name);
        }
        return 0;
      },
      &paths);
  return paths;
}

template <class Function>
Function function_of(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

}  // namespace

void Logger::error(const char* message) const {
  using Function = void (*)(void*, nvinfer1::ILogger::Severity, const char*);
  virtual_function<Function>(object_, layout_.log)(object_, nvinfer1::ILogger::Severity::kERROR, message);
}

bool Registry::add(nvinfer1::IPluginCreatorInterface& creator, const char* plugin_namespace) const {
  using Function = bool (*)(void*, nvinfer1::IPluginCreatorInterface&, const char*);
  return virtual_function<Function>(object_, layout_.register_creator)(object_, creator, plugin_namespace);
}

bool Registry::remove(const nvinfer1::IPluginCreatorInterface& creator) const {
  using Function = bool (*)(void*, const nvinfer1::IPluginCreatorInterface&);
  return virtual_function<Function>(object_, layout_.deregister_creator)(object_, creator);
}

std::vector<nvinfer1::IPluginCreatorInterface*> Registry::creators() const {
  using Function = nvinfer1::IPluginCreatorInterface* const* (*)(const void*, int32_t*);
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* first =
      virtual_function<Function>(object_, layout_.all_creators)(object_, &count);
  return first == nullptr ? std::vector<nvinfer1::IPluginCreatorInterface*>()
                          : std::vector<nvinfer1::IPluginCreatorInterface*>(first, first + count);
}

void load_tensorrt_if_none() {
  if (!candidates().empty()) return;
  for (const char* name : {"libnvinfer.so.11", "libnvinfer.so.10", "libtensorrt_rtx.so.1"}) {
    if (dlopen(name, RTLD_NOW | RTLD_GLOBAL) != nullptr) return;
  }
}

std::vector<TensorRt> tensorrts_of_process(std::string* refused) {
  std::vector<TensorRt> found;
  std::vector<void*> registries;
  for (const std::string& path : candidates()) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) continue;
    const auto version_of = function_of<int32_t (*)()>(library, "getInferLibVersion");
    const auto registry_of = function_of<void* (*)()>(library, "getPluginRegistry");
    const auto logger_of = function_of<void* (*)()>(library, "getLogger");
    dlclose(library);  // only the count that RTLD_NOLOAD added
    if (version_of == nullptr || registry_of == nullptr) continue;
    void* registry = registry_of();
    bool known = registry == nullptr;
    for (void* other : registries) known = known || other == registry;
    if (known) continue;
    registries.push_back(registry);
    const int version = version_of();
    const bool rtx = path.find("tensorrt_rtx") != std::string::npos;
    if (version < (rtx ? kOldestRtx : kOldestFull)) {
      if (refused != nullptr) {
        *refused += (refused->empty() ? "" : "; ") + path + " has version " + std::to_string(version) +
                    "; these plugins take TensorRT 10.13 and TensorRT-RTX 1.7 or newer";
      }
      continue;
    }
    const Layout& layout = rtx || version >= 110000 ? kLayoutOf11 : kLayoutOf10;
    void* logger = logger_of == nullptr ? nullptr : logger_of();
    found.push_back({path, version, layout, Logger(logger, layout), Registry(registry, layout)});
  }
  return found;
}

Logger logger_of_process(void* finder) {
  for (const TensorRt& tensorrt : tensorrts_of_process(nullptr)) {
    if (finder != nullptr) {
      const auto find = virtual_function<void* (*)(void*)>(finder, tensorrt.layout.find_logger);
      return Logger(find(finder), tensorrt.layout);
    }
    if (tensorrt.logger) return tensorrt.logger;
  }
  return Logger();
}

}  // namespace kimi
