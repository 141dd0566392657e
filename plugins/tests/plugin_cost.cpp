// What one enqueue costs the host, without kernels: "<ns> ns, <n> allocations". Usage: plugin_cost LIBRARY [COUNT]
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

constexpr int32_t kHalf = 1, kInt32 = 3, kFloat32Field = 1, kInt32Field = 5, kCharField = 6;

HostTensor tensor(int32_t type, std::vector<int64_t> dims) {
  HostTensor t = {};
  t.type = type;
  t.rank = static_cast<int32_t>(dims.size());
  for (size_t i = 0; i < dims.size(); ++i) t.dims[i] = t.min[i] = t.opt[i] = t.max[i] = dims[i];
  return t;
}

int fail(const char* what) {
  std::fprintf(stderr, "%s: %s\n", what, host_messages());
  return 1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) return fail("usage: plugin_cost LIBRARY [COUNT]");
  void* library = host_open(arguments[1]);
  void* creator = library == nullptr ? nullptr : host_creator(library, "KimiDeltaAttention");
  if (creator == nullptr) return fail("no KimiDeltaAttention");
  const int32_t heads = 32, dim = 128;
  const float eps = 1e-5f, scale = 0.088388f, bound = -5.0f;
  const char* abi = kimi::kimi_delta_attention::kSpec.abi;
  const HostField fields[] = {{"num_heads", &heads, kInt32Field, 1},
                              {"head_dim", &dim, kInt32Field, 1},
                              {"norm_eps", &eps, kFloat32Field, 1},
                              {"scale", &scale, kFloat32Field, 1},
                              {"gate", "bounded", kCharField, 7},
                              {"gate_lower_bound", &bound, kFloat32Field, 1},
                              {"abi", abi, kCharField, static_cast<int32_t>(std::strlen(abi))}};
  void* plugin = host_create(creator, "cost", fields, 7, 0);
  if (plugin == nullptr) return fail("refused");
  const int64_t wide = heads * dim;
  const HostTensor inputs[] = {tensor(kHalf, {1, 1, 3 * wide}),
                               tensor(kHalf, {1, 1, wide}),
                               tensor(kHalf, {1, 1, heads}),
                               tensor(kHalf, {1, 1, wide}),
                               tensor(kHalf, {3 * wide, 4}),
                               tensor(0, {heads}),
                               tensor(0, {wide}),
                               tensor(kHalf, {dim}),
                               tensor(kHalf, {1, 3 * wide, 3}),
                               tensor(0, {1, heads, dim, dim}),
                               tensor(kInt32, {1})};
  const HostTensor outputs[] = {tensor(kHalf, {1, 1, wide}), tensor(kHalf, {1, 3 * wide, 3}),
                                tensor(0, {1, heads, dim, dim})};
  if (host_configure(plugin, inputs, 11, outputs, 3) != 0 || host_shape_change(plugin, inputs, 11, outputs, 3) != 0) {
    return fail("configure");
  }
  const void* input_memory[11] = {};
  void* output_memory[3] = {};
  const int32_t calls = count > 2 ? std::atoi(arguments[2]) : 200000;
  host_time_enqueue(plugin, inputs, 11, outputs, 3, input_memory, output_memory, 1000);
  // the descriptors of one call of the timer are allocations of their own
  const int64_t before = allocations;
  host_time_enqueue(plugin, inputs, 11, outputs, 3, input_memory, output_memory, 1);
  const int64_t of_timer = allocations - before;
  const double time = host_time_enqueue(plugin, inputs, 11, outputs, 3, input_memory, output_memory, calls);
  const int64_t of_calls = allocations - before - 2 * of_timer;
  if (*host_messages() != '\0') return fail("enqueue");
  std::printf("%.0f ns, %lld allocations\n", time, static_cast<long long>(of_calls));
  host_destroy(plugin);
  host_close(library);
  return 0;
}
