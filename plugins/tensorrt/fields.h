// A plugin's fields: read from TensorRT with nothing assumed, kept as plain values, written for serialisation.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "op_spec.h"

namespace kimi {

struct FieldValue {
  int32_t integer = 0;  // an integer, or the index of a string's choice
  float real = 0;
  std::string text;
};

// Values of all fields of `spec`, in its order. Throws Refusal for an unknown, repeated, missing or wrongly typed
// field, a value that is no choice, and another ABI than this library's.
std::vector<FieldValue> read_fields(const OpSpec& spec, const nvinfer1::PluginFieldCollection* fields);

// A collection that owns what its fields point at.
class FieldCollection {
 public:
  FieldCollection() = default;
  FieldCollection(const OpSpec& spec, const std::vector<FieldValue>& values);
  FieldCollection(const FieldCollection&) = delete;
  FieldCollection& operator=(const FieldCollection&) = delete;

  // The names and types alone, as a creator declares them.
  static std::vector<nvinfer1::PluginField> names(const OpSpec& spec);

  const nvinfer1::PluginFieldCollection* get() const { return &collection_; }

 private:
  std::vector<FieldValue> values_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_ = {0, nullptr};
};

}  // namespace kimi
