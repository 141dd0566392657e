#include "plugin.h"

#include <cstring>
#include <utility>

#include "../generated/kimi_ops.h"
#include "report.h"

namespace kimi {

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

bool is_model_type(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

KimiDataType kernel_type(DataType type) {
  return type == DataType::kHALF ? KIMI_FLOAT16 : type == DataType::kBF16 ? KIMI_BFLOAT16 : KIMI_FLOAT32;
}

std::string text_of(const Dims& dims) {
  std::string text = "(";
  for (int32_t i = 0; i < dims.nbDims; ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
  return text + ")";
}

struct ExpressionAlgebra {
  nvinfer1::IExprBuilder& builder;

  const nvinfer1::IDimensionExpr* constant(int32_t value) const { return builder.constant(value); }
  const nvinfer1::IDimensionExpr* combine(DimensionStep::Kind kind, const nvinfer1::IDimensionExpr* first,
                                          const nvinfer1::IDimensionExpr* second) const {
    using Operation = nvinfer1::DimensionOperation;
    const Operation operation = kind == DimensionStep::kAdd        ? Operation::kSUM
                                : kind == DimensionStep::kSubtract ? Operation::kSUB
                                : kind == DimensionStep::kMultiply ? Operation::kPROD
                                : kind == DimensionStep::kMax      ? Operation::kMAX
                                                                   : Operation::kFLOOR_DIV;
    return builder.operation(operation, *first, *second);
  }
};

size_t blocks_of(size_t bytes) {
  const size_t block = static_cast<size_t>(kWorkspaceBlock);
  return (bytes + block - 1) / block;
}

// The first type of a port of that kind among the inputs; `otherwise` if there is none.
template <class TypeOf>
DataType first_type(const OpSpec& spec, PortType kind, int32_t num_inputs, TypeOf type_of, DataType otherwise) {
  for (int32_t i = 0; i < num_inputs; ++i) {
    if (spec.inputs[i].type == kind) return type_of(i);
  }
  return otherwise;
}

}  // namespace

Plugin::Plugin(const Launcher& launcher, std::vector<FieldValue> fields, std::string layer)
    : launcher_(launcher), fields_(std::move(fields)), layer_(std::move(layer)) {}

void Plugin::check_num_inputs(int32_t num_inputs) const {
  const OpSpec& spec = *launcher_.spec;
  bool fits = num_inputs <= spec.inputs.count;
  for (int32_t i = num_inputs; fits && i < spec.inputs.count; ++i) fits = spec.inputs[i].optional;
  if (fits) return;
  std::string names;
  for (const PortSpec& port : spec.inputs) {
    names += (names.empty() ? "" : ", ") + std::string(port.name) + (port.optional ? " (optional)" : "");
  }
  throw Refusal("wrong number of inputs; seen: " + std::to_string(num_inputs) + "; expected: " + names);
}

template <class DimsOf, class TypeOf>
Invocation Plugin::bind(int32_t num_inputs, DimsOf dims_of, TypeOf type_of) const {
  const OpSpec& spec = *launcher_.spec;
  check_num_inputs(num_inputs);
  Invocation call = {};
  call.fields = &fields_;
  for (int64_t& symbol : call.symbols) symbol = -1;
  for (int32_t i = 0; i < spec.fields.count; ++i) {
    if (spec.fields[i].symbol >= 0) call.symbols[spec.fields[i].symbol] = fields_[static_cast<size_t>(i)].integer;
  }
  for (int32_t i = 0; i < num_inputs; ++i) {
    const PortSpec& port = spec.inputs[i];
    const Dims& dims = dims_of(i);
    if (dims.nbDims != port.dims.count) {
      throw Refusal("input " + std::string(port.name) + " has the wrong rank; seen: " + text_of(dims) +
                    "; expected: " + std::to_string(port.dims.count) + " dimensions");
    }
    call.present[i] = true;
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
      const int32_t symbol = port.dims[axis].symbol();
      if (symbol >= 0 && call.symbols[symbol] < 0) call.symbols[symbol] = dims.d[axis];
    }
  }
  for (int32_t i = 0; i < num_inputs; ++i) {
    const Dims& dims = dims_of(i);
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
      const DimensionSpec& dimension = spec.inputs[i].dims[axis];
      const int64_t wanted = evaluate(dimension, call.symbols, SizeAlgebra());
      if (wanted != dims.d[axis]) {
        throw Refusal("input " + std::string(spec.inputs[i].name) + " has the wrong size on axis " +
                      std::to_string(axis) + "; seen: " + text_of(dims) + "; expected: " + dimension.text + " = " +
                      std::to_string(wanted));
      }
    }
  }
  const DataType type = first_type(spec, PortType::kT, num_inputs, type_of, DataType::kFLOAT);
  call.type = kernel_type(type);
  call.state_type = kernel_type(first_type(spec, PortType::kS, num_inputs, type_of, type));
  return call;
}

size_t Plugin::workspace_of(const Invocation& call) const {
  size_t bytes = 0;
  if (launcher_.workspace(call, &bytes) != KIMI_OK) {
    throw Refusal("the kernels do not take this node; seen: " + std::string(kimi_last_error()) +
                  "; fix: build the engine without this plugin (build-engine --plugin none)");
  }
  return bytes;
}

size_t Plugin::reserved() const {
  const int32_t blocks = fields_[static_cast<size_t>(launcher_.spec->workspace_field)].integer;
  return blocks < 0 ? SIZE_MAX : static_cast<size_t>(blocks) * static_cast<size_t>(kWorkspaceBlock);
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  return guarded<nvinfer1::IPluginV3*>(layer_.c_str(), nullptr, [&] {
    auto copy = std::make_unique<Plugin>(launcher_, fields_, layer_);
    copy->num_inputs_ = num_inputs_;
    return copy.release();
  });
}

int32_t Plugin::getOutputDataTypes(DataType* outputs, int32_t num_outputs, const DataType* inputs,
                                   int32_t num_inputs) const noexcept {
  return guarded(layer_.c_str(), -1, [&] {
    const OpSpec& spec = *launcher_.spec;
    check_num_inputs(num_inputs);
    const auto type_of = [&](int32_t i) { return inputs[i]; };
    const DataType type = first_type(spec, PortType::kT, num_inputs, type_of, DataType::kFLOAT);
    for (int32_t i = 0; i < num_outputs; ++i) {
      const PortType port = spec.outputs[i].type;
      outputs[i] = port == PortType::kT   ? type
                   : port == PortType::kS ? first_type(spec, PortType::kS, num_inputs, type_of, type)
                                          : (port == PortType::kInt32 ? DataType::kINT32 : DataType::kFLOAT);
    }
    return 0;
  });
}

int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs, const nvinfer1::DimsExprs*,
                                int32_t, nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                                nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(layer_.c_str(), -1, [&] {
    const OpSpec& spec = *launcher_.spec;
    check_num_inputs(num_inputs);
    const nvinfer1::IDimensionExpr* symbols[kMaxSymbols] = {};
    for (int32_t i = 0; i < spec.fields.count; ++i) {
      if (spec.fields[i].symbol >= 0) {
        symbols[spec.fields[i].symbol] = builder.constant(fields_[static_cast<size_t>(i)].integer);
      }
    }
    for (int32_t i = 0; i < num_inputs; ++i) {
      const PortSpec& port = spec.inputs[i];
      if (inputs[i].nbDims != port.dims.count) {
        throw Refusal("input " + std::string(port.name) + " has the wrong rank; seen: " +
                      std::to_string(inputs[i].nbDims) + "; expected: " + std::to_string(port.dims.count));
      }
      for (int32_t axis = 0; axis < port.dims.count; ++axis) {
        const int32_t symbol = port.dims[axis].symbol();
        if (symbol >= 0 && symbols[symbol] == nullptr) symbols[symbol] = inputs[i].d[axis];
      }
    }
    for (int32_t i = 0; i < num_outputs; ++i) {
      outputs[i].nbDims = spec.outputs[i].dims.count;
      for (int32_t axis = 0; axis < outputs[i].nbDims; ++axis) {
        outputs[i].d[axis] = evaluate(spec.outputs[i].dims[axis], symbols, ExpressionAlgebra{builder});
      }
    }
    return 0;
  });
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* in_out, int32_t num_inputs,
                                       int32_t) noexcept {
  return guarded(layer_.c_str(), false, [&] {
    const OpSpec& spec = *launcher_.spec;
    check_num_inputs(num_inputs);
    // descriptions after `position` are not to be read
    const auto port_of = [&](int32_t i) -> const PortSpec& {
      return i < num_inputs ? spec.inputs[i] : spec.outputs[i - num_inputs];
    };
    const PluginTensorDesc& desc = in_out[position].desc;
    if (desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
    const PortType port = port_of(position).type;
    if (port == PortType::kInt32) return desc.type == DataType::kINT32;
    if (port == PortType::kFloat32) return desc.type == DataType::kFLOAT;
    // an S output without an S input is T
    const bool of_model =
        port == PortType::kT || first_type(
                                    spec, PortType::kS, num_inputs, [](int32_t) { return DataType::kHALF; },
                                    DataType::kFLOAT) == DataType::kFLOAT;
    const PortType kind = of_model ? PortType::kT : port;
    for (int32_t i = 0; i <= position; ++i) {
      if (port_of(i).type == kind) return is_model_type(desc.type) && desc.type == in_out[i].desc.type;
    }
    return false;
  });
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                const DynamicPluginTensorDesc*, int32_t) noexcept {
  return guarded(layer_.c_str(), -1, [&] {
    const auto type_of = [&](int32_t i) { return inputs[i].desc.type; };
    size_t bytes = 0;
    for (const auto bound :
         {&DynamicPluginTensorDesc::min, &DynamicPluginTensorDesc::opt, &DynamicPluginTensorDesc::max}) {
      bytes = workspace_of(bind(num_inputs, [&](int32_t i) -> const Dims& { return inputs[i].*bound; }, type_of));
    }
    // the last bound is the largest
    fields_[static_cast<size_t>(launcher_.spec->workspace_field)].integer = static_cast<int32_t>(blocks_of(bytes));
    num_inputs_ = num_inputs;
    return 0;
  });
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                const DynamicPluginTensorDesc*, int32_t) const noexcept {
  return guarded(layer_.c_str(), static_cast<size_t>(0), [&] {
    const size_t bytes = workspace_of(bind(
        num_inputs, [&](int32_t i) -> const Dims& { return inputs[i].max; },
        [&](int32_t i) { return inputs[i].desc.type; }));
    return blocks_of(bytes) * static_cast<size_t>(kWorkspaceBlock);
  });
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept {
  const int32_t field = launcher_.spec->in_place_field;
  const bool in_place = field >= 0 && fields_[static_cast<size_t>(field)].integer == 1;
  return in_place && output >= 0 && output < launcher_.spec->aliases.count ? launcher_.spec->aliases[output] : -1;
}

int32_t Plugin::onShapeChange(const PluginTensorDesc* inputs, int32_t num_inputs, const PluginTensorDesc*,
                              int32_t) noexcept {
  return guarded(layer_.c_str(), -1, [&] {
    const size_t needed = workspace_of(bind(
        num_inputs, [&](int32_t i) -> const Dims& { return inputs[i].dims; },
        [&](int32_t i) { return inputs[i].type; }));
    if (needed > reserved()) {
      throw Refusal("the engine keeps less workspace for this layer than these kernels need; seen: " +
                    std::to_string(reserved()) + " bytes; expected: " + std::to_string(needed) +
                    "; fix: build the engine again with this version of the plugins");
    }
    num_inputs_ = num_inputs;
    return 0;
  });
}

int32_t Plugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*, const void* const* inputs,
                        void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded(layer_.c_str(), -1, [&] {
    const OpSpec& spec = *launcher_.spec;
    Invocation call = bind(
        num_inputs_, [&](int32_t i) -> const Dims& { return input_descs[i].dims; },
        [&](int32_t i) { return input_descs[i].type; });
    for (int32_t i = 0; i < num_inputs_; ++i) call.inputs[i] = inputs[i];
    for (int32_t i = 0; i < spec.outputs.count; ++i) {
      call.outputs[i] = outputs[i];
      const int32_t aliased = getAliasedInput(i);
      if (aliased >= 0 && outputs[i] != inputs[aliased]) {
        throw Refusal("output " + std::string(spec.outputs[i].name) + " was declared to be the memory of " +
                      spec.inputs[aliased].name +
                      ", and is not; fix: build the engine with the preview feature "
                      "ALIASED_PLUGIN_IO_10_03, or without in_place_state");
      }
    }
    call.workspace = workspace;
    call.workspace_size = reserved();
    call.stream = stream;
    if (launcher_.enqueue(call) != KIMI_OK)
      throw Refusal("the kernels refused; seen: " + std::string(kimi_last_error()));
    return 0;
  });
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept {
  return guarded<const nvinfer1::PluginFieldCollection*>(layer_.c_str(), nullptr, [&] {
    // TensorRT reads it after this call
    serialized_ = std::make_unique<FieldCollection>(*launcher_.spec, fields_);
    return serialized_->get();
  });
}

}  // namespace kimi
