#include "fields.h"

#include <cstring>

#include "report.h"

namespace kimi {

namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr const char* kExportAgain = "; fix: export the model again with this version of kimi-deploy";

PluginFieldType type_of(const FieldSpec& field) {
  switch (field.type) {
    case FieldType::kInt:
      return PluginFieldType::kINT32;
    case FieldType::kFloat:
      return PluginFieldType::kFLOAT32;
    case FieldType::kString:
      break;
  }
  return PluginFieldType::kCHAR;
}

const char* name_of(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kINT32:
      return "INT32";
    case PluginFieldType::kFLOAT32:
      return "FLOAT32";
    case PluginFieldType::kCHAR:
      return "CHAR";
    default:
      return "another type";
  }
}

std::string expected_names(const OpSpec& spec) {
  std::string names;
  for (const FieldSpec& field : spec.fields) {
    names += (names.empty() ? "" : ", ") + std::string(field.name) + (field.required ? "" : " (optional)");
  }
  return names;
}

FieldValue read(const FieldSpec& field, const PluginField& given) {
  if (given.type != type_of(field)) {
    throw Refusal("field " + std::string(field.name) + " has the wrong type; seen: " + name_of(given.type) +
                  "; expected: " + name_of(type_of(field)));
  }
  const bool text = field.type == FieldType::kString;
  if (given.data == nullptr || (text ? given.length < 0 : given.length != 1)) {
    throw Refusal("field " + std::string(field.name) + " has " + std::to_string(given.length) +
                  " values; expected: " + (text ? "a string" : "one"));
  }
  FieldValue value;
  if (field.type == FieldType::kInt) {
    std::memcpy(&value.integer, given.data, sizeof(value.integer));
  } else if (field.type == FieldType::kFloat) {
    std::memcpy(&value.real, given.data, sizeof(value.real));
  } else {
    value.text.assign(static_cast<const char*>(given.data), static_cast<size_t>(given.length));
    // some producers count the terminating zero, some do not
    while (!value.text.empty() && value.text.back() == '\0') value.text.pop_back();
    if (field.choices.count == 0) return value;
    value.integer = -1;
    std::string choices;
    for (int32_t i = 0; i < field.choices.count; ++i) {
      if (value.text == field.choices[i]) value.integer = i;
      choices += (i == 0 ? "" : ", ") + std::string(field.choices[i]);
    }
    if (value.integer < 0) {
      throw Refusal("field " + std::string(field.name) + " is not valid; seen: " + value.text +
                    "; expected one of: " + choices);
    }
  }
  return value;
}

}  // namespace

std::vector<FieldValue> read_fields(const OpSpec& spec, const nvinfer1::PluginFieldCollection* fields) {
  const int32_t count = fields == nullptr ? 0 : fields->nbFields;
  std::vector<const PluginField*> given(static_cast<size_t>(spec.fields.count), nullptr);
  for (int32_t i = 0; i < count; ++i) {
    const PluginField& field = fields->fields[i];
    size_t index = 0;
    while (index < given.size() && std::strcmp(spec.fields[static_cast<int32_t>(index)].name, field.name) != 0) ++index;
    if (index == given.size() || given[index] != nullptr) {
      throw Refusal("field " + std::string(field.name) + (index == given.size() ? " is unknown" : " is given twice") +
                    "; expected exactly: " + expected_names(spec) + kExportAgain);
    }
    given[index] = &field;
  }
  std::vector<FieldValue> values(given.size());
  std::string missing;
  for (size_t i = 0; i < given.size(); ++i) {
    const FieldSpec& field = spec.fields[static_cast<int32_t>(i)];
    if (given[i] != nullptr) {
      values[i] = read(field, *given[i]);
    } else if (field.required) {
      missing += (missing.empty() ? "" : ", ") + std::string(field.name);
    } else {
      values[i].integer = field.integer;
      values[i].real = field.real;
      if (field.choices.count > 0) values[i].text = field.choices[field.integer];
    }
  }
  if (!missing.empty()) {
    throw Refusal("fields are missing on the node; missing: " + missing +
                  "; expected exactly: " + expected_names(spec) + kExportAgain);
  }
  if (spec.abi_field >= 0 && values[static_cast<size_t>(spec.abi_field)].text != spec.abi) {
    throw Refusal("the graph was exported for another ABI of the op than this plugin library has; seen: graph: " +
                  values[static_cast<size_t>(spec.abi_field)].text + "; expected: library: " + spec.abi +
                  "; fix: export the model again with the version of kimi-deploy that this library is of, or build the "
                  "library of the version that exported it");
  }
  if (spec.in_place_field >= 0) {
    const int32_t in_place = values[static_cast<size_t>(spec.in_place_field)].integer;
    if (in_place != 0 && in_place != 1) {
      throw Refusal("field in_place_state is not valid; seen: " + std::to_string(in_place) + "; expected: 0 or 1");
    }
  }
  return values;
}

FieldCollection::FieldCollection(const OpSpec& spec, const std::vector<FieldValue>& values)
    : values_(values), fields_(names(spec)) {
  for (size_t i = 0; i < fields_.size(); ++i) {
    PluginField& field = fields_[i];
    const FieldValue& value = values_[i];
    if (field.type == PluginFieldType::kCHAR) {
      field.data = value.text.data();
      field.length = static_cast<int32_t>(value.text.size());
    } else {
      field.data = field.type == PluginFieldType::kINT32 ? static_cast<const void*>(&value.integer) : &value.real;
      field.length = 1;
    }
  }
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

std::vector<PluginField> FieldCollection::names(const OpSpec& spec) {
  std::vector<PluginField> fields;
  for (const FieldSpec& field : spec.fields) fields.emplace_back(field.name, nullptr, type_of(field), 0);
  return fields;
}

}  // namespace kimi
