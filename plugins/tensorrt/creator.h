// Makes the plugin of one op from its fields.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "launcher.h"

namespace kimi {

class PluginCreator : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit PluginCreator(const Launcher& launcher);

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return launcher_.spec->name; }
  const char* getPluginVersion() const noexcept override { return launcher_.spec->version; }
  const char* getPluginNamespace() const noexcept override { return launcher_.spec->plugin_namespace; }
  const char* abi() const { return launcher_.spec->abi == nullptr ? "" : launcher_.spec->abi; }

 private:
  const Launcher& launcher_;
  const std::string label_;
  const std::vector<nvinfer1::PluginField> fields_;
  const nvinfer1::PluginFieldCollection collection_;
};

}  // namespace kimi
