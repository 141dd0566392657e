#include "op.h"

#include <cstring>
#include <new>

#include "ort_call.h"

namespace kimi::ort {
namespace {

const Op& of(const CustomOp* op) { return *reinterpret_cast<const Op*>(op); }

ElementType element_type(PortType type) {
  switch (type) {
    case PortType::kInt32:
      return ElementType::kInt32;
    case PortType::kUint8:
      return ElementType::kUint8;
    default:
      return ElementType::kFloat;
  }
}

// A node: its attributes, and the sizes that they fix.
struct Kernel {
  const Api* api;
  const Launcher* launcher;
  Allocator* allocator;
  int32_t threads;
  FieldValue fields[kMaxFields];
  int64_t sizes[kMaxSymbols];  // -1: comes from an input

  template <class... Values>
  Status* refuse(const char* format, Values... values) const {
    return ort::refusal(api, launcher->spec->name, format, values...);
  }
};

Status* read_field(const Api* api, const KernelInfo* info, const OpSpec& spec, const FieldSpec& field,
                   FieldValue* out) {
  if (field.type == FieldType::kInt) return api->KernelInfoGetAttribute_int64(info, field.name, &out->integer);
  if (field.type == FieldType::kFloat) return api->KernelInfoGetAttribute_float(info, field.name, &out->real);
  char text[64];
  size_t size = sizeof text;
  KIMI_TRY(api->KernelInfoGetAttribute_string(info, field.name, text, &size));
  if (&field == &spec.fields[spec.abi_field]) {
    if (std::strcmp(text, spec.abi) == 0) return nullptr;
    return refusal(api, spec.name,
                   "the graph was exported for another ABI of the op than this library has; graph: %s; library: "
                   "%s; export the model again, or build the library again: make cpu-kernels",
                   text, spec.abi);
  }
  for (int32_t choice = 0; choice < field.choices.count; ++choice) {
    out->integer = choice;
    if (std::strcmp(text, field.choices[choice]) == 0) return nullptr;
  }
  return refusal(api, spec.name, "attribute %s is %s, which is no choice of it", field.name, text);
}

Status* create_kernel(const CustomOp* op, const Api* api, const KernelInfo* info, void** out) {
  const Launcher& launcher = *of(op).launcher;
  const OpSpec& spec = *launcher.spec;
  Kernel* const kernel = new (std::nothrow) Kernel{api, &launcher, nullptr, of(op).threads, {}, {}};
  if (kernel == nullptr) return api->CreateStatus(ErrorCode::kFail, "out of memory");
  for (int64_t& size : kernel->sizes) size = -1;
  Status* status = api->KernelInfoGetAllocator(info, 0, &kernel->allocator);
  for (int32_t i = 0; i < spec.fields.count && status == nullptr; ++i) {
    status = read_field(api, info, spec, spec.fields[i], &kernel->fields[i]);
    if (spec.fields[i].symbol >= 0) kernel->sizes[spec.fields[i].symbol] = kernel->fields[i].integer;
  }
  if (status != nullptr) {
    if (kernel->allocator != nullptr) api->ReleaseAllocator(kernel->allocator);
    delete kernel;
    return status;
  }
  *out = kernel;
  return nullptr;
}

void destroy_kernel(void* pointer) {
  Kernel* const kernel = static_cast<Kernel*>(pointer);
  kernel->api->ReleaseAllocator(kernel->allocator);
  delete kernel;
}

// The tensors of a call; sizes not known from attributes are taken from the first port that has them.
Status* read_inputs(const Kernel& kernel, const KernelContext* context, int64_t* sizes, const void** inputs) {
  const Api& api = *kernel.api;
  const OpSpec& spec = *kernel.launcher->spec;
  const int64_t* shapes[kMaxPorts];
  size_t given = 0;
  KIMI_TRY(api.KernelContext_GetInputCount(context, &given));
  for (int32_t i = 0; i < spec.inputs.count; ++i) {
    const PortSpec& port = spec.inputs[i];
    const Value* value = nullptr;
    if (static_cast<size_t>(i) < given) KIMI_TRY(api.KernelContext_GetInput(context, static_cast<size_t>(i), &value));
    inputs[i] = nullptr;
    shapes[i] = nullptr;
    if (value == nullptr) {
      if (port.optional) continue;
      return kernel.refuse("input %s is missing", port.name);
    }
    ElementType type;
    size_t rank;
    KIMI_TRY(api.GetTensorElementTypeAndShapeDataReference(value, &type, &shapes[i], &rank));
    if (rank != static_cast<size_t>(port.dims.count)) {
      return kernel.refuse("input %s has %d dimensions; expected: %d", port.name, static_cast<int>(rank),
                           static_cast<int>(port.dims.count));
    }
    void* data;
    KIMI_TRY(api.GetTensorMutableData(const_cast<Value*>(value), &data));
    inputs[i] = data;
    for (int32_t axis = 0; axis < port.dims.count; ++axis) {
      const int32_t symbol = port.dims[axis].symbol();
      if (symbol >= 0 && sizes[symbol] < 0) sizes[symbol] = shapes[i][axis];
    }
  }
  for (int32_t i = 0; i < spec.inputs.count; ++i) {
    for (int32_t axis = 0; shapes[i] != nullptr && axis < spec.inputs[i].dims.count; ++axis) {
      const DimensionSpec& dimension = spec.inputs[i].dims[axis];
      const int32_t symbol = dimension.symbol();
      const int64_t wanted = symbol >= 0 ? sizes[symbol] : evaluate(dimension, sizes, SizeAlgebra());
      if (shapes[i][axis] != wanted) {
        return kernel.refuse("input %s has %lld on axis %d; expected: %s = %lld", spec.inputs[i].name,
                             static_cast<long long>(shapes[i][axis]), static_cast<int>(axis), dimension.text,
                             static_cast<long long>(wanted));
      }
    }
  }
  return nullptr;
}

Status* make_outputs(const Kernel& kernel, KernelContext* context, const int64_t* sizes, void** outputs) {
  const OpSpec& spec = *kernel.launcher->spec;
  for (int32_t i = 0; i < spec.outputs.count; ++i) {
    const List<DimensionSpec>& dims = spec.outputs[i].dims;
    int64_t shape[8];
    for (int32_t axis = 0; axis < dims.count; ++axis) shape[axis] = evaluate(dims[axis], sizes, SizeAlgebra());
    Value* value;
    KIMI_TRY(kernel.api->KernelContext_GetOutput(context, static_cast<size_t>(i), shape,
                                                 static_cast<size_t>(dims.count), &value));
    KIMI_TRY(kernel.api->GetTensorMutableData(value, &outputs[i]));
  }
  return nullptr;
}

Status* describe(const Kernel& kernel, const cpu::Status& status) {
  const char* what = "a value of its inputs is out of range";
  if (status.fault == cpu::Fault::kSequenceLength) what = "sequence_lengths is not within the steps of the call";
  if (status.fault == cpu::Fault::kPastLength) what = "past_lengths is negative";
  if (status.fault == cpu::Fault::kCapacity) what = "the cache has no room for every step";
  if (status.fault == cpu::Fault::kHeadDim) what = "head_dim is no multiple of 8";
  if (status.fault == cpu::Fault::kRouting) what = "num_experts, top_k, n_group and topk_group do not go together";
  if (status.fault == cpu::Fault::kBlocks)
    what = "bits must be 4 or 8, and block_size 32, 64 or 128 and divide the sizes";
  if (status.fault == cpu::Fault::kZeroPoints) what = "zero points do not fit the attribute symmetric";
  return kernel.refuse("%s; row %lld; seen: %lld; bound: %lld", what, static_cast<long long>(status.index),
                       static_cast<long long>(status.seen), static_cast<long long>(status.expected));
}

Status* compute(void* pointer, KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(pointer);
  const Api& api = *kernel.api;
  int64_t sizes[kMaxSymbols];
  std::memcpy(sizes, kernel.sizes, sizeof sizes);
  const void* inputs[kMaxPorts];
  void* outputs[kMaxPorts];
  KIMI_TRY(read_inputs(kernel, context, sizes, inputs));
  KIMI_TRY(make_outputs(kernel, context, sizes, outputs));
  Threads threads = {&api, context, nullptr};
  Call call = {sizes, kernel.fields, inputs, outputs, {&threads, kernel.threads, Threads::run}, nullptr};
  const size_t bytes = kernel.launcher->workspace(call);
  if (bytes > 0) KIMI_TRY(api.AllocatorAlloc(kernel.allocator, bytes, &call.workspace));
  const cpu::Status done = kernel.launcher->run(call);
  if (bytes > 0) {
    Status* const status = api.AllocatorFree(kernel.allocator, call.workspace);
    if (status != nullptr && threads.failed == nullptr) threads.failed = status;
  }
  if (threads.failed != nullptr) return threads.failed;
  return done.fault == cpu::Fault::kNone ? nullptr : describe(kernel, done);
}

}  // namespace

Op::Op(const Launcher& op_launcher, int32_t op_threads) : callbacks(), launcher(&op_launcher), threads(op_threads) {
  callbacks.version = kApiVersion;
  callbacks.GetName = [](const CustomOp* op) { return of(op).launcher->spec->name; };
  callbacks.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  callbacks.GetInputTypeCount = [](const CustomOp* op) {
    return static_cast<size_t>(of(op).launcher->spec->inputs.count);
  };
  callbacks.GetOutputTypeCount = [](const CustomOp* op) {
    return static_cast<size_t>(of(op).launcher->spec->outputs.count);
  };
  callbacks.GetInputType = [](const CustomOp* op, size_t i) {
    return element_type(of(op).launcher->spec->inputs[static_cast<int32_t>(i)].type);
  };
  callbacks.GetOutputType = [](const CustomOp* op, size_t i) {
    return element_type(of(op).launcher->spec->outputs[static_cast<int32_t>(i)].type);
  };
  callbacks.GetInputCharacteristic = [](const CustomOp* op, size_t i) {
    return of(op).launcher->spec->inputs[static_cast<int32_t>(i)].optional ? Characteristic::kOptional
                                                                           : Characteristic::kRequired;
  };
  callbacks.GetOutputCharacteristic = [](const CustomOp*, size_t) { return Characteristic::kRequired; };
  callbacks.GetInputMemoryType = [](const CustomOp*, size_t) -> int32_t { return 0; };
  callbacks.CreateKernelV2 = create_kernel;
  callbacks.KernelComputeV2 = compute;
  callbacks.KernelDestroy = destroy_kernel;
  callbacks.GetStartVersion = [](const CustomOp*) { return 1; };
  callbacks.GetEndVersion = [](const CustomOp*) { return 1; };
}

}  // namespace kimi::ort
