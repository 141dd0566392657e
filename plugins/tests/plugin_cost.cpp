// What one enqueue of each plugin costs the host, without kernels, a line a plugin: "<name>: <ns> ns, <n> allocations".
// Usage: plugin_cost LIBRARY [COUNT]
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../generated/kimi_ops.h"
#include "plugin_host.h"

static std::atomic<int64_t> allocations{0};

// Of the plugin library too, whose operator new ends here as well: this program's symbols come first. The names behind
// them are glibc's.
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t size) noexcept {
  ++allocations;
  return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) noexcept {
  ++allocations;
  return __libc_calloc(count, size);
}
void* realloc(void* memory, size_t size) noexcept {
  ++allocations;
  return __libc_realloc(memory, size);
}
void* aligned_alloc(size_t alignment, size_t size) noexcept {
  ++allocations;
  return __libc_memalign(alignment, size);
}
}

namespace {

constexpr int32_t kFloat = 0, kHalf = 1, kInt32 = 3, kFloat32Field = 1, kInt32Field = 5, kCharField = 6;

// A field by its text where the op's field is one, else by its number; or the size that a symbol of the op has.
struct Named {
  const char* name;
  double number;
  const char* text = "";
};

// A decode step of a layer of usual size: one token, weights in 16 bits, states in 32 where the op has its own type.
struct Case {
  const kimi::OpSpec& spec;
  std::vector<Named> fields;
  std::vector<Named> sizes;
};

const Case kCases[] = {
    {kimi::kimi_delta_attention::kSpec,
     {{"num_heads", 32},
      {"head_dim", 128},
      {"norm_eps", 1e-5},
      {"scale", 0.088388},
      {"gate", 0, "bounded"},
      {"gate_lower_bound", -5.0}},
     {{"batch", 1}, {"sequence", 1}, {"conv_width", 4}}},
    {kimi::mixture_of_experts::kSpec,
     {{"num_experts", 256},
      {"intermediate", 1024},
      {"top_k", 8},
      {"n_group", 1},
      {"topk_group", 1},
      {"renormalize", 1},
      {"routed_scaling_factor", 2.446}},
     {{"batch", 1}, {"sequence", 1}, {"hidden", 2304}}},
    {kimi::linear_attention::kSpec,
     {{"q_num_heads", 16}, {"kv_num_heads", 32}, {"update_rule", 0, "gated_delta"}},
     {{"batch", 1},
      {"sequence", 1},
      {"query_size", 2048},
      {"key_size", 2048},
      {"value_size", 4096},
      {"decay_size", 32},
      {"beta_size", 32}}},
    {kimi::causal_conv_with_state::kSpec,
     {{"activation", 0, "silu"}},
     {{"batch", 1}, {"channels", 8192}, {"length", 1}, {"kernel_size", 4}}},
};

int fail(const char* name, const char* what) {
  std::fprintf(stderr, "%s: %s: %s\n", name, what, host_messages());
  return 1;
}

std::vector<HostTensor> tensors(const kimi::List<kimi::PortSpec>& ports, const int64_t* symbols) {
  std::vector<HostTensor> made;
  for (const kimi::PortSpec& port : ports) {
    HostTensor t = {};
    t.type = port.type == kimi::PortType::kT ? kHalf : port.type == kimi::PortType::kInt32 ? kInt32 : kFloat;
    t.rank = port.dims.count;
    for (int32_t i = 0; i < t.rank; ++i) {
      t.dims[i] = t.min[i] = t.opt[i] = t.max[i] = kimi::evaluate(port.dims[i], symbols, kimi::SizeAlgebra());
    }
    made.push_back(t);
  }
  return made;
}

int measure(void* library, const Case& layer, int32_t calls) {
  const kimi::OpSpec& spec = layer.spec;
  void* creator = host_creator(library, spec.name);
  if (creator == nullptr) return fail(spec.name, "no creator");
  int64_t symbols[kimi::kMaxSymbols] = {};
  std::vector<Named> given = layer.fields;
  if (spec.abi != nullptr) given.push_back({"abi", 0, spec.abi});
  std::vector<int32_t> integers(given.size());
  std::vector<float> reals(given.size());
  std::vector<HostField> fields;
  for (size_t i = 0; i < given.size(); ++i) {
    for (const kimi::FieldSpec& field : spec.fields) {
      if (std::strcmp(field.name, given[i].name) != 0) continue;
      integers[i] = static_cast<int32_t>(given[i].number);
      reals[i] = static_cast<float>(given[i].number);
      if (field.symbol >= 0) symbols[field.symbol] = integers[i];
      if (field.type == kimi::FieldType::kInt) fields.push_back({field.name, &integers[i], kInt32Field, 1});
      if (field.type == kimi::FieldType::kFloat) fields.push_back({field.name, &reals[i], kFloat32Field, 1});
      if (field.type == kimi::FieldType::kString) {
        fields.push_back({field.name, given[i].text, kCharField, static_cast<int32_t>(std::strlen(given[i].text))});
      }
    }
  }
  if (fields.size() != given.size()) return fail(spec.name, "the op has other fields");
  for (const Named& size : layer.sizes) {
    for (int32_t i = 0; i < spec.symbols.count; ++i) {
      if (std::strcmp(spec.symbols[i], size.name) == 0) symbols[i] = static_cast<int64_t>(size.number);
    }
  }
  void* plugin = host_create(creator, "cost", fields.data(), static_cast<int32_t>(fields.size()), 0);
  if (plugin == nullptr) return fail(spec.name, "refused");
  const std::vector<HostTensor> inputs = tensors(spec.inputs, symbols), outputs = tensors(spec.outputs, symbols);
  const auto num_inputs = static_cast<int32_t>(inputs.size()), num_outputs = static_cast<int32_t>(outputs.size());
  if (host_configure(plugin, inputs.data(), num_inputs, outputs.data(), num_outputs) != 0 ||
      host_shape_change(plugin, inputs.data(), num_inputs, outputs.data(), num_outputs) != 0) {
    return fail(spec.name, "configure");
  }
  const void* input_memory[kimi::kMaxPorts] = {};
  void* output_memory[kimi::kMaxPorts] = {};
  const auto time = [&](int32_t count) {
    return host_time_enqueue(plugin, inputs.data(), num_inputs, outputs.data(), num_outputs, input_memory,
                             output_memory, count);
  };
  time(1000);
  // the descriptors of one call of the timer are allocations of their own
  const int64_t before = allocations;
  time(1);
  const int64_t of_timer = allocations - before;
  const double nanoseconds = time(calls);
  const int64_t of_calls = allocations - before - 2 * of_timer;
  if (*host_messages() != '\0') return fail(spec.name, "enqueue");
  std::printf("%s: %.0f ns, %lld allocations\n", spec.name, nanoseconds, static_cast<long long>(of_calls));
  host_destroy(plugin);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) return fail(arguments[0], "usage: plugin_cost LIBRARY [COUNT]");
  static_assert(sizeof(kCases) / sizeof(*kCases) == sizeof(kimi::kOps) / sizeof(*kimi::kOps), "a case for each op");
  void* library = host_open(arguments[1]);
  if (library == nullptr) return fail(arguments[1], "no library");
  for (const Case& layer : kCases) {
    if (measure(library, layer, count > 2 ? std::atoi(arguments[2]) : 200000) != 0) return 1;
  }
  host_close(library);
  return 0;
}
