#include "tokenwise.h"

#include <new>
#include <sstream>
#include <string>
#include <vector>

#include "ort_call.h"

namespace kimi::ort {
namespace {

using cpu::TokenwiseKind;
using cpu::TokenwiseValue;

constexpr int32_t kMaxPorts = 3 * cpu::kMaxTokenwiseValues;

struct Kernel {
  const Api* api;
  Allocator* allocator = nullptr;
  int32_t threads;
  std::vector<TokenwiseValue> values;
  std::vector<int32_t> outputs;      // values
  std::vector<const void*> inputs;   // by port: constants, or null
  std::vector<int32_t> activations;  // values that are inputs of a call

  template <class... Arguments>
  Status* refuse(const char* format, Arguments... arguments) const {
    return refusal(api, kTokenwiseName, format, arguments...);
  }
};

// The constant at `port`, whose type and number of elements must be these.
Status* read_constant(Kernel* kernel, const KernelInfo* info, int32_t port, ElementType type, int64_t elements) {
  const Api& api = *kernel->api;
  const Value* value = nullptr;
  int constant = 0;
  if (port < 0 || port >= kMaxPorts) return kernel->refuse("there is no port %d", static_cast<int>(port));
  KIMI_TRY(api.KernelInfoGetConstantInput_tensor(info, static_cast<size_t>(port), &constant, &value));
  if (!constant) return kernel->refuse("input %d is no constant", static_cast<int>(port));
  ElementType seen;
  const int64_t* dims;
  size_t rank;
  KIMI_TRY(api.GetTensorElementTypeAndShapeDataReference(value, &seen, &dims, &rank));
  int64_t count = 1;
  for (size_t i = 0; i < rank; ++i) count *= dims[i];
  if (seen != type || count != elements) {
    return kernel->refuse("constant %d has type %d and %lld elements; expected: type %d, %lld", static_cast<int>(port),
                          static_cast<int>(seen), static_cast<long long>(count), static_cast<int>(type),
                          static_cast<long long>(elements));
  }
  void* data;
  KIMI_TRY(api.GetTensorMutableData(const_cast<Value*>(value), &data));
  if (kernel->inputs.size() <= static_cast<size_t>(port)) kernel->inputs.resize(static_cast<size_t>(port) + 1);
  kernel->inputs[static_cast<size_t>(port)] = data;
  return nullptr;
}

Status* read_product(Kernel* kernel, const KernelInfo* info, const TokenwiseValue& v) {
  const int64_t rows = v.columns, columns = kernel->values[static_cast<size_t>(v.a)].columns;
  if (v.bits == 32) return read_constant(kernel, info, v.port, ElementType::kFloat, rows * columns);
  const bool known = (v.bits == 4 || v.bits == 8) && (v.block_size == 32 || v.block_size == 64 || v.block_size == 128);
  if (!known || columns % v.block_size != 0) {
    return kernel->refuse("%lld columns in blocks of %lld with %d bits", static_cast<long long>(columns),
                          static_cast<long long>(v.block_size), static_cast<int>(v.bits));
  }
  const int64_t blocks = columns / v.block_size;
  KIMI_TRY(read_constant(kernel, info, v.port, ElementType::kUint8, rows * columns * v.bits / 8));
  KIMI_TRY(read_constant(kernel, info, v.port + 1, ElementType::kFloat, rows * blocks));
  if (!v.zero_points) return nullptr;
  return read_constant(kernel, info, v.port + 2, ElementType::kUint8, rows * ((blocks * v.bits + 7) / 8));
}

// The stage of a value, and the product whose prepared input it can take.
void place(const std::vector<TokenwiseValue>& values, TokenwiseValue* v) {
  for (const int32_t operand : {v->a, v->b}) {
    if (operand < 0) continue;
    const TokenwiseValue& from = values[static_cast<size_t>(operand)];
    const int32_t ready = from.stage + (from.kind == TokenwiseKind::kProduct ? 1 : 0);
    if (ready > v->stage) v->stage = ready;
  }
  v->prepared_by = static_cast<int32_t>(values.size());
  for (int32_t i = v->prepared_by - 1; i >= 0 && v->kind == TokenwiseKind::kProduct; --i) {
    const TokenwiseValue& o = values[static_cast<size_t>(i)];
    const bool same = o.kind == v->kind && o.a == v->a && o.stage == v->stage && o.bits == v->bits &&
                      o.block_size == v->block_size && o.int8_activations == v->int8_activations;
    if (same) v->prepared_by = o.prepared_by;
  }
}

Status* read_line(Kernel* kernel, const KernelInfo* info, const std::string& line) {
  std::istringstream text(line);
  std::string what;
  text >> what;
  TokenwiseValue v = {};
  v.a = v.b = v.output = -1;
  v.bits = 32;
  auto& values = kernel->values;
  const auto operand = [&](int32_t* index) -> const TokenwiseValue* {
    if (!(text >> *index) || *index < 0 || static_cast<size_t>(*index) >= values.size()) return nullptr;
    return &values[static_cast<size_t>(*index)];
  };
  const auto wrong = [&] { return kernel->refuse("the program has a wrong line: %.100s", line.c_str()); };
  if (what == "input") {
    v.kind = TokenwiseKind::kInput;
    if (!(text >> v.port >> v.columns) || v.port < 0 || v.port >= kMaxPorts || v.columns < 1) return wrong();
    if (kernel->inputs.size() <= static_cast<size_t>(v.port)) kernel->inputs.resize(static_cast<size_t>(v.port) + 1);
    kernel->activations.push_back(static_cast<int32_t>(values.size()));
  } else {
    const TokenwiseValue* const a = operand(&v.a);
    if (a == nullptr) return wrong();
    v.columns = a->columns;
    if (what == "output") {
      if (a->output >= 0 || a->kind == TokenwiseKind::kInput) return wrong();
      values[static_cast<size_t>(v.a)].output = static_cast<int32_t>(kernel->outputs.size());
      kernel->outputs.push_back(v.a);
      return nullptr;
    }
    if (what == "add" || what == "swiglu" || what == "join") {
      v.kind = what == "add" ? TokenwiseKind::kAdd : what == "join" ? TokenwiseKind::kJoin : TokenwiseKind::kSwiglu;
      const TokenwiseValue* const b = operand(&v.b);
      if (b == nullptr || (what != "join" && b->columns != a->columns)) return wrong();
      if (what == "join") v.columns += b->columns;
    } else if (what == "norm") {
      v.kind = TokenwiseKind::kNorm;
      if (!(text >> v.port >> v.eps)) return wrong();
      KIMI_TRY(read_constant(kernel, info, v.port, ElementType::kFloat, v.columns));
    } else if (what == "part") {
      v.kind = TokenwiseKind::kPart;
      if (!(text >> v.begin >> v.columns) || v.begin < 0 || v.columns < 1 || v.begin + v.columns > a->columns) {
        return wrong();
      }
    } else if (what == "product") {
      v.kind = TokenwiseKind::kProduct;
      text >> v.columns >> v.bits >> v.block_size >> v.int8_activations >> v.zero_points >> v.port;
      if (!text || v.columns < 1) return wrong();
      KIMI_TRY(read_product(kernel, info, v));
    } else {
      return wrong();
    }
  }
  if (values.size() == static_cast<size_t>(cpu::kMaxTokenwiseValues)) {
    return kernel->refuse("the program has more than %d values", static_cast<int>(cpu::kMaxTokenwiseValues));
  }
  place(values, &v);
  values.push_back(v);
  return nullptr;
}

Status* read_program(Kernel* kernel, const KernelInfo* info) {
  const Api& api = *kernel->api;
  size_t size = 0;
  KIMI_TRY(api.KernelInfoGetAttribute_string(info, "program", nullptr, &size));
  std::string program(size, '\0');
  KIMI_TRY(api.KernelInfoGetAttribute_string(info, "program", &program[0], &size));
  program.resize(program.find('\0') == std::string::npos ? size : program.find('\0'));
  std::istringstream lines(program);
  for (std::string line; std::getline(lines, line);) KIMI_TRY(read_line(kernel, info, line));
  if (kernel->activations.empty() || kernel->outputs.empty()) return kernel->refuse("%s", "the program is empty");
  return api.KernelInfoGetAllocator(info, 0, &kernel->allocator);
}

struct Op {
  CustomOp callbacks;
  int32_t threads;
};

void destroy(void* pointer) {
  Kernel* const kernel = static_cast<Kernel*>(pointer);
  if (kernel->allocator != nullptr) kernel->api->ReleaseAllocator(kernel->allocator);
  delete kernel;
}

Status* create(const CustomOp* op, const Api* api, const KernelInfo* info, void** out) {
  Kernel* const kernel = new (std::nothrow) Kernel();
  if (kernel == nullptr) return api->CreateStatus(ErrorCode::kFail, "out of memory");
  kernel->api = api;
  kernel->threads = reinterpret_cast<const Op*>(op)->threads;
  if (Status* const status = read_program(kernel, info)) {
    destroy(kernel);
    return status;
  }
  *out = kernel;
  return nullptr;
}

Status* compute(void* pointer, KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(pointer);
  const Api& api = *kernel.api;
  const void* inputs[kMaxPorts];
  for (size_t i = 0; i < kernel.inputs.size(); ++i) inputs[i] = kernel.inputs[i];
  int64_t shape[8];
  size_t rank = 0;
  int64_t rows = 1;
  for (const int32_t index : kernel.activations) {
    const TokenwiseValue& v = kernel.values[static_cast<size_t>(index)];
    const Value* value = nullptr;
    KIMI_TRY(api.KernelContext_GetInput(context, static_cast<size_t>(v.port), &value));
    ElementType type;
    const int64_t* dims;
    size_t count;
    KIMI_TRY(api.GetTensorElementTypeAndShapeDataReference(value, &type, &dims, &count));
    if (type != ElementType::kFloat || count < 1 || count > 8 || dims[count - 1] != v.columns) {
      return kernel.refuse("input %d has type %d, %d dimensions; expected: floats, the last dimension %lld",
                           static_cast<int>(v.port), static_cast<int>(type), static_cast<int>(count),
                           static_cast<long long>(v.columns));
    }
    if (rank == 0) {
      rank = count;
      for (size_t i = 0; i < count; ++i) shape[i] = dims[i];
      for (size_t i = 0; i + 1 < count; ++i) rows *= dims[i];
    }
    bool same = rank == count;
    for (size_t i = 0; same && i + 1 < count; ++i) same = shape[i] == dims[i];
    if (!same) return kernel.refuse("input %d has another number of tokens", static_cast<int>(v.port));
    void* data;
    KIMI_TRY(api.GetTensorMutableData(const_cast<Value*>(value), &data));
    inputs[v.port] = data;
  }
  float* outputs[cpu::kMaxTokenwiseValues];
  for (size_t i = 0; i < kernel.outputs.size(); ++i) {
    shape[rank - 1] = kernel.values[static_cast<size_t>(kernel.outputs[i])].columns;
    Value* value;
    void* data;
    KIMI_TRY(api.KernelContext_GetOutput(context, i, shape, rank, &value));
    KIMI_TRY(api.GetTensorMutableData(value, &data));
    outputs[i] = static_cast<float*>(data);
  }
  Threads threads = {&api, context, nullptr};
  const cpu::Parallel parallel = {&threads, kernel.threads, Threads::run};
  cpu::TokenwiseArguments a = {
      kernel.values.data(), static_cast<int32_t>(kernel.values.size()), rows, inputs, outputs, nullptr};
  KIMI_TRY(api.AllocatorAlloc(kernel.allocator, cpu::tokenwise_workspace(a, parallel), &a.workspace));
  cpu::tokenwise(a, parallel);
  Status* const freed = api.AllocatorFree(kernel.allocator, a.workspace);
  if (threads.failed == nullptr) return freed;
  if (freed != nullptr) api.ReleaseStatus(freed);
  return threads.failed;
}

}  // namespace

const CustomOp& tokenwise_op(int32_t threads) {
  static const Op op = [threads] {
    Op made = {};
    made.threads = threads;
    CustomOp& c = made.callbacks;
    c.version = kApiVersion;
    c.GetName = [](const CustomOp*) { return kTokenwiseName; };
    c.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
    c.GetInputTypeCount = c.GetOutputTypeCount = [](const CustomOp*) { return size_t{1}; };
    c.GetInputType = [](const CustomOp*, size_t) { return ElementType::kUndefined; };
    c.GetOutputType = [](const CustomOp*, size_t) { return ElementType::kFloat; };
    c.GetInputCharacteristic =
        c.GetOutputCharacteristic = [](const CustomOp*, size_t) { return Characteristic::kVariadic; };
    c.GetVariadicInputMinArity = c.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
    c.GetVariadicInputHomogeneity = [](const CustomOp*) { return 0; };
    c.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
    c.GetInputMemoryType = [](const CustomOp*, size_t) -> int32_t { return 0; };
    c.CreateKernelV2 = create;
    c.KernelComputeV2 = compute;
    c.KernelDestroy = destroy;
    c.GetStartVersion = c.GetEndVersion = [](const CustomOp*) { return 1; };
    return made;
  }();
  return op.callbacks;
}

}  // namespace kimi::ort
