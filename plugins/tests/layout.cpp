// The positions by which the plugins call TensorRT's objects are those of the headers this was compiled with.
#include <cstdio>
#include <cstring>

#include "../tensorrt/process.h"

namespace {

using namespace nvinfer1;

int called = 0;

class OwnLogger : public ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity == Severity::kERROR && std::strcmp(message, "said") == 0) called |= 1;
  }
};

class OwnFinder : public ILoggerFinder {
 public:
  explicit OwnFinder(ILogger& logger) : logger_(logger) {}
  ILogger* findLogger() override { return &logger_; }

 private:
  ILogger& logger_;
};

class OwnRegistry : public IPluginRegistry {
 public:
#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(IPluginCreator&, const char*) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
  IPluginCreator* getPluginCreator(const char*, const char*, const char*) noexcept override { return nullptr; }
  bool deregisterCreator(const IPluginCreator&) noexcept override { return false; }
#endif
  ~OwnRegistry() noexcept override = default;
  void setErrorRecorder(IErrorRecorder*) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool) override {}
  void* loadLibrary(const char*) noexcept override { return nullptr; }
  void deregisterLibrary(void*) noexcept override {}
  bool registerCreator(IPluginCreatorInterface&, const char* plugin_namespace) noexcept override {
    if (std::strcmp(plugin_namespace, "kimi") == 0) called |= 2;
    return true;
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override {
    called |= 4;
    *count = 0;
    return nullptr;
  }
  IPluginCreatorInterface* getCreator(const char*, const char*, const char*) noexcept override { return nullptr; }
  bool deregisterCreator(const IPluginCreatorInterface&) noexcept override {
    called |= 8;
    return true;
  }
  IPluginResource* acquirePluginResource(const char*, IPluginResource*) noexcept override { return nullptr; }
  int32_t releasePluginResource(const char*) noexcept override { return 0; }
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override { return nullptr; }
};

class OwnCreator : public IPluginCreatorV3One {
 public:
  IPluginV3* createPlugin(const char*, const PluginFieldCollection*, TensorRTPhase) noexcept override {
    return nullptr;
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return nullptr; }
  const char* getPluginName() const noexcept override { return ""; }
  const char* getPluginVersion() const noexcept override { return ""; }
  const char* getPluginNamespace() const noexcept override { return ""; }
};

}  // namespace

int main() {
  const kimi::Layout layout = NV_TENSORRT_MAJOR < 11 ? kimi::kLayoutOf10 : kimi::kLayoutOf11;
  OwnLogger logger;
  OwnFinder finder(logger);
  OwnRegistry own;
  OwnCreator creator;
  const auto find = kimi::virtual_function<void* (*)(void*)>(&finder, layout.find_logger);
  kimi::Logger(find(&finder), layout).error("said");
  const kimi::Registry registry(&own, layout);
  const bool added = registry.add(creator, "kimi"), removed = registry.remove(creator);
  if (!added || !removed || !registry.creators().empty() || called != 15) {
    std::fprintf(stderr, "TensorRT %d: called %d of 15\n", NV_TENSORRT_MAJOR, called);
    return 1;
  }
  std::printf("TensorRT %d\n", NV_TENSORRT_MAJOR);
  return 0;
}
