// The TensorRT libraries that this process has loaded, full or RTX, found at run time: one plugin library serves all.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

namespace kimi {

// Where a plugin registry's virtual functions are. TensorRT 11 dropped deprecated ones before them, and a library that
// was compiled with the headers of one version must still register itself with the other.
struct RegistryLayout {
  int register_creator;
  int all_creators;
  int deregister_creator;
};
inline constexpr RegistryLayout kRegistryOf10 = {12, 13, 15};
inline constexpr RegistryLayout kRegistryOf11 = {8, 9, 11};

// The plugin registry of one TensorRT.
class Registry {
 public:
  Registry(void* object, RegistryLayout layout) : object_(object), layout_(layout) {}

  bool add(nvinfer1::IPluginCreatorInterface& creator, const char* plugin_namespace) const;
  bool remove(const nvinfer1::IPluginCreatorInterface& creator) const;
  std::vector<nvinfer1::IPluginCreatorInterface*> creators() const;

 private:
  template <class Function>
  Function slot(int index) const {
    return reinterpret_cast<Function>((*static_cast<void***>(object_))[index]);
  }

  void* object_;
  RegistryLayout layout_;
};

struct TensorRt {
  std::string file;
  int version;  // as getInferLibVersion gives it
  bool rtx;
  nvinfer1::ILogger* logger;  // null until the application made a builder, runtime or refitter
  Registry registry;
};

// Loads the TensorRT that a library linked with TensorRT would load, where the process has none; nothing if there is
// none on the loader's path.
void load_tensorrt_if_none();

// Every TensorRT of this process that these plugins support; `refused` (may be null) says why others are left out.
std::vector<TensorRt> tensorrts_of_process(std::string* refused);

// The first logger of them, null if none.
nvinfer1::ILogger* logger_of_process();

}  // namespace kimi
