#include "creator.h"

#include <memory>
#include <utility>

#include "plugin.h"
#include "report.h"

namespace kimi {

namespace {

std::string label_of(const OpSpec& spec) {
  const std::string plugin_namespace = spec.plugin_namespace;
  return "plugin " + (plugin_namespace.empty() ? "" : plugin_namespace + "::") + spec.name;
}

}  // namespace

PluginCreator::PluginCreator(const Launcher& launcher)
    : launcher_(launcher),
      label_(label_of(*launcher.spec)),
      fields_(FieldCollection::names(*launcher.spec)),
      collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

nvinfer1::IPluginV3* PluginCreator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                                 nvinfer1::TensorRTPhase) noexcept {
  return guarded<nvinfer1::IPluginV3*>(label_.c_str(), nullptr, [&] {
    std::string layer = label_ + (name == nullptr || *name == '\0' ? "" : std::string(", layer ") + name);
    return guarded<nvinfer1::IPluginV3*>(layer.c_str(), nullptr, [&] {
      std::vector<FieldValue> values = read_fields(*launcher_.spec, fields);
      return std::make_unique<Plugin>(launcher_, std::move(values), std::move(layer)).release();
    });
  });
}

}  // namespace kimi
