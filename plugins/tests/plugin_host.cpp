#include "plugin_host.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;

std::mutex mutex;
std::string messages;

void keep(const char* message) {
  const std::lock_guard<std::mutex> lock(mutex);
  messages += std::string(message) + "\n";
}

struct Library {
  void (*on_error)(void (*)(const char*));
  IPluginCreatorInterface* const* creators;
  int32_t num_creators;
};

// Dimension expressions that hold a size, which plugins cannot see.
class Expression : public IDimensionExpr, private apiv::VDimensionExpr {
 public:
  explicit Expression(int64_t size) : size_(size) { mImpl = this; }
  ~Expression() override = default;
  int64_t size() const { return size_; }

 private:
  bool isConstant() const override { return false; }
  int64_t getConstantValue() const override { return -1; }
  bool isSizeTensor() const override { return false; }

  const int64_t size_;
};

class Builder : public IExprBuilder, private apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  ~Builder() override = default;
  const IDimensionExpr* add(int64_t size) {
    expressions_.push_back(std::make_unique<Expression>(size));
    return expressions_.back().get();
  }

 private:
  const IDimensionExpr* constant(int64_t value) override { return add(value); }
  const IDimensionExpr* operation(DimensionOperation operation, const IDimensionExpr& first,
                                  const IDimensionExpr& second) override {
    const int64_t a = static_cast<const Expression&>(first).size(), b = static_cast<const Expression&>(second).size();
    switch (operation) {
      case DimensionOperation::kSUM:
        return add(a + b);
      case DimensionOperation::kSUB:
        return add(a - b);
      case DimensionOperation::kPROD:
        return add(a * b);
      case DimensionOperation::kMAX:
        return add(a > b ? a : b);
      case DimensionOperation::kFLOOR_DIV:
        return add(a / b);
      default:
        return nullptr;
    }
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }

  std::vector<std::unique_ptr<Expression>> expressions_;
};

Dims dims_of(int32_t rank, const int64_t* sizes) {
  Dims dims = {};
  dims.nbDims = rank;
  for (int32_t i = 0; i < rank; ++i) dims.d[i] = sizes[i];
  return dims;
}

PluginTensorDesc desc_of(const HostTensor& tensor) {
  PluginTensorDesc desc = {};
  desc.dims = dims_of(tensor.rank, tensor.dims);
  desc.type = static_cast<DataType>(tensor.type);
  desc.format = static_cast<TensorFormat>(tensor.format);
  return desc;
}

std::vector<PluginTensorDesc> descs_of(const HostTensor* tensors, int32_t count) {
  std::vector<PluginTensorDesc> descs;
  for (int32_t i = 0; i < count; ++i) descs.push_back(desc_of(tensors[i]));
  return descs;
}

std::vector<DynamicPluginTensorDesc> dynamic_descs_of(const HostTensor* tensors, int32_t count) {
  std::vector<DynamicPluginTensorDesc> descs;
  for (int32_t i = 0; i < count; ++i) {
    const HostTensor& t = tensors[i];
    descs.push_back({desc_of(t), dims_of(t.rank, t.min), dims_of(t.rank, t.max), dims_of(t.rank, t.opt)});
  }
  return descs;
}

IPluginV3* plugin_of(void* plugin) { return static_cast<IPluginV3*>(plugin); }

IPluginV3OneCore* core_of(void* plugin) {
  return static_cast<IPluginV3OneCore*>(plugin_of(plugin)->getCapabilityInterface(PluginCapabilityType::kCORE));
}

IPluginV3OneBuildV2* build_of(void* plugin) {
  return static_cast<IPluginV3OneBuildV2*>(plugin_of(plugin)->getCapabilityInterface(PluginCapabilityType::kBUILD));
}

IPluginV3OneRuntime* runtime_of(void* plugin) {
  return static_cast<IPluginV3OneRuntime*>(plugin_of(plugin)->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

IPluginCreatorV3One* creator_of(void* creator) { return static_cast<IPluginCreatorV3One*>(creator); }

int32_t copy_fields(const PluginFieldCollection* collection, HostField* fields, int32_t room) {
  if (collection == nullptr || collection->nbFields > room) return -1;
  for (int32_t i = 0; i < collection->nbFields; ++i) {
    const PluginField& field = collection->fields[i];
    fields[i] = {field.name, field.data, static_cast<int32_t>(field.type), field.length};
  }
  return collection->nbFields;
}

}  // namespace

extern "C" {

void* host_open(const char* path) {
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    messages += std::string(dlerror()) + "\n";
    return nullptr;
  }
  const auto on_error = reinterpret_cast<void (*)(void (*)(const char*))>(dlsym(handle, "kimi_plugins_on_error"));
  const auto get_creators =
      reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
  if (on_error == nullptr || get_creators == nullptr) {
    messages += std::string(path) + " exports no kimi_plugins_on_error or getCreators\n";
    return nullptr;
  }
  on_error(keep);
  auto library = std::make_unique<Library>(Library{on_error, nullptr, 0});
  library->creators = get_creators(library->num_creators);
  return library.release();
}

const char* host_messages(void) {
  static std::string taken;
  const std::lock_guard<std::mutex> lock(mutex);
  taken.swap(messages);
  messages.clear();
  return taken.c_str();
}

void host_close(void* library) {
  const std::unique_ptr<Library> own(static_cast<Library*>(library));
  own->on_error(nullptr);
}

void* host_creator(void* library, const char* name) {
  const Library& own = *static_cast<Library*>(library);
  for (int32_t i = 0; i < own.num_creators; ++i) {
    if (std::strcmp(own.creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) continue;
    auto* creator = static_cast<IPluginCreatorV3One*>(own.creators[i]);
    if (std::strcmp(creator->getPluginName(), name) == 0) return creator;
  }
  return nullptr;
}

const char* host_creator_version(void* creator) { return creator_of(creator)->getPluginVersion(); }

const char* host_creator_namespace(void* creator) { return creator_of(creator)->getPluginNamespace(); }

int32_t host_creator_fields(void* creator, HostField* fields, int32_t room) {
  return copy_fields(creator_of(creator)->getFieldNames(), fields, room);
}

void* host_create(void* creator, const char* layer, const HostField* fields, int32_t count, int32_t phase) {
  std::vector<PluginField> given;
  for (int32_t i = 0; i < count; ++i) {
    given.emplace_back(fields[i].name, fields[i].data, static_cast<PluginFieldType>(fields[i].type), fields[i].length);
  }
  const PluginFieldCollection collection = {count, given.data()};
  return creator_of(creator)->createPlugin(layer, &collection, static_cast<TensorRTPhase>(phase));
}

void* host_clone(void* plugin) { return plugin_of(plugin)->clone(); }

void* host_attach(void* plugin) { return runtime_of(plugin)->attachToContext(nullptr); }

void host_destroy(void* plugin) { delete plugin_of(plugin); }

const char* host_identity(void* plugin) {
  static std::string text;
  const IPluginV3OneCore& core = *core_of(plugin);
  text = std::string(core.getPluginName()) + " " + core.getPluginVersion() + " " + core.getPluginNamespace();
  return text.c_str();
}

int32_t host_num_outputs(void* plugin) { return build_of(plugin)->getNbOutputs(); }

int32_t host_output_types(void* plugin, const int32_t* inputs, int32_t num_inputs, int32_t* outputs) {
  std::vector<DataType> given, made(static_cast<size_t>(host_num_outputs(plugin)));
  for (int32_t i = 0; i < num_inputs; ++i) given.push_back(static_cast<DataType>(inputs[i]));
  const int32_t status =
      build_of(plugin)->getOutputDataTypes(made.data(), static_cast<int32_t>(made.size()), given.data(), num_inputs);
  for (size_t i = 0; i < made.size(); ++i) outputs[i] = static_cast<int32_t>(made[i]);
  return status;
}

int32_t host_output_shapes(void* plugin, const HostTensor* inputs, int32_t num_inputs, HostTensor* outputs) {
  Builder builder;
  std::vector<DimsExprs> given(static_cast<size_t>(num_inputs)), made(static_cast<size_t>(host_num_outputs(plugin)));
  for (size_t i = 0; i < given.size(); ++i) {
    given[i].nbDims = inputs[i].rank;
    for (int32_t axis = 0; axis < inputs[i].rank; ++axis) given[i].d[axis] = builder.add(inputs[i].dims[axis]);
  }
  const int32_t status = build_of(plugin)->getOutputShapes(given.data(), num_inputs, nullptr, 0, made.data(),
                                                           static_cast<int32_t>(made.size()), builder);
  for (size_t i = 0; status == 0 && i < made.size(); ++i) {
    outputs[i].rank = made[i].nbDims;
    for (int32_t axis = 0; axis < made[i].nbDims; ++axis) {
      outputs[i].dims[axis] = static_cast<const Expression*>(made[i].d[axis])->size();
    }
  }
  return status;
}

int32_t host_supports(void* plugin, int32_t position, const HostTensor* in_out, int32_t num_inputs,
                      int32_t num_outputs) {
  std::vector<DynamicPluginTensorDesc> descs = dynamic_descs_of(in_out, num_inputs + num_outputs);
  // what is after `position` may not be looked at
  for (size_t i = static_cast<size_t>(position) + 1; i < descs.size(); ++i)
    std::memset(&descs[i], 0x7B, sizeof(descs[i]));
  return build_of(plugin)->supportsFormatCombination(position, descs.data(), num_inputs, num_outputs) ? 1 : 0;
}

int32_t host_configure(void* plugin, const HostTensor* inputs, int32_t num_inputs, const HostTensor* outputs,
                       int32_t num_outputs) {
  const auto in = dynamic_descs_of(inputs, num_inputs), out = dynamic_descs_of(outputs, num_outputs);
  return build_of(plugin)->configurePlugin(in.data(), num_inputs, out.data(), num_outputs);
}

size_t host_workspace(void* plugin, const HostTensor* inputs, int32_t num_inputs, const HostTensor* outputs,
                      int32_t num_outputs) {
  const auto in = dynamic_descs_of(inputs, num_inputs), out = dynamic_descs_of(outputs, num_outputs);
  return build_of(plugin)->getWorkspaceSize(in.data(), num_inputs, out.data(), num_outputs);
}

int32_t host_aliased_input(void* plugin, int32_t output) { return build_of(plugin)->getAliasedInput(output); }

int32_t host_serialize(void* plugin, HostField* fields, int32_t room) {
  return copy_fields(runtime_of(plugin)->getFieldsToSerialize(), fields, room);
}

int32_t host_shape_change(void* plugin, const HostTensor* inputs, int32_t num_inputs, const HostTensor* outputs,
                          int32_t num_outputs) {
  const auto in = descs_of(inputs, num_inputs), out = descs_of(outputs, num_outputs);
  return runtime_of(plugin)->onShapeChange(in.data(), num_inputs, out.data(), num_outputs);
}

int32_t host_enqueue(void* plugin, const HostTensor* inputs, int32_t num_inputs, const HostTensor* outputs,
                     int32_t num_outputs, const void* const* input_memory, void* const* output_memory, void* workspace,
                     void* stream) {
  const auto in = descs_of(inputs, num_inputs), out = descs_of(outputs, num_outputs);
  return runtime_of(plugin)->enqueue(in.data(), out.data(), input_memory, output_memory, workspace,
                                     static_cast<cudaStream_t>(stream));
}

double host_time_enqueue(void* plugin, const HostTensor* inputs, int32_t num_inputs, const HostTensor* outputs,
                         int32_t num_outputs, const void* const* input_memory, void* const* output_memory,
                         int32_t count) {
  const auto in = descs_of(inputs, num_inputs), out = descs_of(outputs, num_outputs);
  IPluginV3OneRuntime* runtime = runtime_of(plugin);
  const auto start = std::chrono::steady_clock::now();
  for (int32_t i = 0; i < count; ++i) {
    runtime->enqueue(in.data(), out.data(), input_memory, output_memory, nullptr, nullptr);
  }
  const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
  return taken.count() / count;
}
}
