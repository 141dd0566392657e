// The one plugin class: everything but the launch follows from the op's spec.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

#include "fields.h"
#include "launcher.h"

namespace kimi {

class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuildV2,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  // `layer` names the node in messages.
  Plugin(const Launcher& launcher, std::vector<FieldValue> fields, std::string layer);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return launcher_.spec->name; }
  const char* getPluginVersion() const noexcept override { return launcher_.spec->version; }
  const char* getPluginNamespace() const noexcept override { return launcher_.spec->plugin_namespace; }

  int32_t getNbOutputs() const noexcept override { return launcher_.spec->outputs.count; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t num_outputs, const nvinfer1::DataType* inputs,
                             int32_t num_inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs, const nvinfer1::DimsExprs* shapes,
                          int32_t num_shapes, nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* in_out, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t num_outputs) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t num_outputs) const noexcept override;
  int32_t getAliasedInput(int32_t output) noexcept override;

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t num_inputs,
                        const nvinfer1::PluginTensorDesc* outputs, int32_t num_outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc* output_descs,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  // Refuses a number of inputs that the op cannot have; only optional ones at the end may be absent.
  void check_num_inputs(int32_t num_inputs) const;
  // An invocation with these types and sizes and without memory. Throws Refusal for sizes that contradict the op.
  template <class DimsOf, class TypeOf>
  Invocation bind(int32_t num_inputs, DimsOf dims_of, TypeOf type_of) const;
  size_t workspace_of(const Invocation& call) const;
  // Bytes that TensorRT keeps for this layer; everything there is where no plan says it.
  size_t reserved() const;

  const Launcher& launcher_;
  // The whole of a plugin's state: what is serialised.
  std::vector<FieldValue> fields_;
  const std::string layer_;  // of the node, for messages
  int32_t num_inputs_ = 0;   // of the last shape change: enqueue is not told
  std::unique_ptr<FieldCollection> serialized_;
};

}  // namespace kimi
