// The TensorRT libraries that this process has loaded, full or RTX, found at run time: one plugin library serves all.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

namespace kimi {

// Where the virtual functions are of what TensorRT gives to plugins. Between 10 and 11 the registry lost deprecated
// functions and the logger and its finder became versioned interfaces; what plugins give to TensorRT did not change. A
// library that was compiled with the headers of the one must still work with the other, so that it calls by position.
struct Layout {
  int register_creator;  // IPluginRegistry
  int all_creators;
  int deregister_creator;
  int log;          // ILogger
  int find_logger;  // ILoggerFinder
};
inline constexpr Layout kLayoutOf10 = {12, 13, 15, 0, 0};
inline constexpr Layout kLayoutOf11 = {8, 9, 11, 4, 4};

template <class Function>
Function virtual_function(const void* object, int position) {
  return reinterpret_cast<Function>((*static_cast<void* const* const*>(object))[position]);
}

// A logger of some TensorRT, or none.
class Logger {
 public:
  Logger() = default;
  Logger(void* object, const Layout& layout) : object_(object), layout_(layout) {}
  explicit operator bool() const { return object_ != nullptr; }
  void error(const char* message) const;

 private:
  void* object_ = nullptr;
  Layout layout_ = {};
};

// The plugin registry of one TensorRT.
class Registry {
 public:
  Registry(void* object, const Layout& layout) : object_(object), layout_(layout) {}

  bool add(nvinfer1::IPluginCreatorInterface& creator, const char* plugin_namespace) const;
  bool remove(const nvinfer1::IPluginCreatorInterface& creator) const;
  std::vector<nvinfer1::IPluginCreatorInterface*> creators() const;

 private:
  void* object_;
  Layout layout_;
};

struct TensorRt {
  std::string file;
  int version;  // as getInferLibVersion gives it
  Layout layout;
  Logger logger;  // none until the application made a builder, runtime or refitter
  Registry registry;
};

// Loads the TensorRT that a library linked with TensorRT would load, where the process has none; nothing if there is
// none on the loader's path.
void load_tensorrt_if_none();

// Every TensorRT of this process that these plugins support; `refused` (may be null) says why others are left out.
std::vector<TensorRt> tensorrts_of_process(std::string* refused);

// The logger of `finder` (may be null), which a TensorRT of this process made, or else the first one that one of them
// has.
Logger logger_of_process(void* finder);

}  // namespace kimi
