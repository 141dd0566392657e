// CPU kernels of the ops: portable C++17, no runtime's header. Everything is float32 and C-contiguous unless said
// otherwise; ports, shapes and attributes are those of the OpSpecs (docs/ops.md). A present state may be the memory of
// its past.
//
// Each kernel source is compiled once per instruction set (KIMI_CPU_LEVEL names the namespace) and chosen at run time,
// so it may not instantiate templates or inline functions that other objects have too: the linker keeps one of each.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kimi::cpu {

// How a kernel runs tasks: `run` calls task(argument, index) for each index below `tasks`, in any order, on threads of
// the caller, and returns when all are done. `threads` is how many may run at once.
struct Parallel {
  void* context;
  int32_t threads;
  void (*run)(void* context, void (*task)(void* argument, size_t index), size_t tasks, void* argument);

  // How many pieces of `count` run at once: the number of workspaces that `each` needs.
  int64_t slots(int64_t count) const { return count < threads ? count : threads; }

  // task(index, slot) for each index below `count`; calls of one slot, which is below slots(count), follow each other.
  template <class Task>
  void each(int64_t count, const Task& task) const {
    struct Shared {
      const Task& task;
      int64_t count, next;
    } shared = {task, count, 0};
    auto work = [](void* argument, size_t slot) {
      Shared& own = *static_cast<Shared*>(argument);
      int64_t index;
      while ((index = __atomic_fetch_add(&own.next, 1, __ATOMIC_RELAXED)) < own.count) {
        own.task(index, static_cast<int64_t>(slot));
      }
    };
    const int64_t running = slots(count);
    if (running > 1) {
      run(context, work, static_cast<size_t>(running), &shared);
    } else {
      work(&shared, 0);
    }
  }
};

// What a kernel found wrong with the values of its inputs; shapes are the caller's to check.
enum class Fault : int32_t { kNone, kSequenceLength, kPastLength, kCapacity, kHeadDim, kRouting, kBlocks, kZeroPoints };

// `index` is the row of the batch, `seen` the value, `expected` its bound.
struct Status {
  Fault fault = Fault::kNone;
  int64_t index = 0;
  int64_t seen = 0;
  int64_t expected = 0;
};

// Name of the instruction set whose kernels run: the best of this machine, or the one that was chosen.
const char* instruction_set();
bool choose_instruction_set(const char* name);

struct KdaArguments {
  int64_t batch, sequence, num_heads, head_dim, conv_width;  // head_dim: a multiple of 8
  float norm_eps, scale;
  bool bounded_gate;
  float gate_lower_bound;
  const float *qkv, *decay, *beta, *output_gate, *conv_weight, *A_log, *dt_bias, *norm_weight;
  const float *past_conv_state, *past_recurrent_state;
  const int32_t* sequence_lengths;  // null: every row takes every step
  float *output, *present_conv_state, *present_recurrent_state;
  void* workspace;  // of kda_workspace bytes
};

// Bytes of workspace for these sizes.
size_t kda_workspace(const KdaArguments& arguments, const Parallel& parallel);
Status kda(const KdaArguments& arguments, const Parallel& parallel);

struct LatentAttentionArguments {
  int64_t batch, sequence, capacity, num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, kv_lora_rank;
  float scale;
  const float *query, *latent, *kv_b_weight, *past_latent;
  const int32_t *past_lengths, *sequence_lengths;  // the second null: every row takes every step
  float *output, *present_latent;
  void* workspace;  // of latent_attention_workspace bytes
};

size_t latent_attention_workspace(const LatentAttentionArguments& arguments, const Parallel& parallel);
Status latent_attention(const LatentAttentionArguments& arguments, const Parallel& parallel);

inline constexpr int64_t kMaxExperts = 1024;

// One product of every expert, [num_experts, rows, columns]: float32 with 32 bits, else packed levels.
struct ExpertWeights {
  const void* values;
  const float* scales;         // null with 32 bits
  const uint8_t* zero_points;  // null: symmetric
};

// MixtureOfExperts with 32 bits, QuantizedMixtureOfExperts with 8 or 4.
struct MixtureOfExpertsArguments {
  int64_t tokens, hidden, num_experts, intermediate, top_k, n_group, topk_group;
  bool renormalize;
  float routed_scaling_factor;
  int32_t bits;
  int64_t block_size;     // 32, 64 or 128; not read with 32 bits
  bool int8_activations;  // not read with 32 bits
  const float *hidden_states, *router_weight, *router_bias;
  ExpertWeights gate_up, down;
  float* output;
  void* workspace;  // of mixture_of_experts_workspace bytes, any alignment
};

// About 4 bytes x (tokens x (num_experts + 9/8 hidden + top_k x 9/8 intermediate) + threads x 90 x (hidden +
// intermediate)), and the padding of each expert's tokens to whole vectors; never a copy of the weights.
size_t mixture_of_experts_workspace(const MixtureOfExpertsArguments& arguments, const Parallel& parallel);
// Every sum is taken in an order that does not depend on the number of threads.
Status mixture_of_experts(const MixtureOfExpertsArguments& arguments, const Parallel& parallel);

inline constexpr int32_t kMaxTokenwiseValues = 64;

enum class TokenwiseKind : int32_t { kInput, kAdd, kNorm, kPart, kJoin, kSwiglu, kProduct };

// A value [rows, columns] of a run of layers that treat each row by itself, from earlier ones, `a` and `b`:
// kAdd a + b; kNorm RMSNorm of a; kPart columns of a from `begin` on; kJoin a, then b; kSwiglu silu(a) * b;
// kProduct a W^T, W [columns, columns of a].
struct TokenwiseValue {
  TokenwiseKind kind;
  int32_t a, b;
  int64_t columns, begin;
  float eps;
  int32_t port;         // of kInput; of kNorm's weight; of kProduct's W, before its scales and zero points
  int32_t output;       // -1: nobody outside reads it
  int32_t stage;        // at least that of `a` and `b`, and above that of a product
  int32_t prepared_by;  // the first product of the stage that reads `a` in the same way
  // of kProduct: float32 with 32 bits, else as an expert of QuantizedMixtureOfExperts
  int32_t bits;
  int64_t block_size;
  bool int8_activations, zero_points;
};

struct TokenwiseArguments {
  const TokenwiseValue* values;
  int32_t count;  // at most kMaxTokenwiseValues
  int64_t rows;
  const void* const* inputs;  // by port
  float* const* outputs;      // [rows, columns] each
  void* workspace;            // of tokenwise_workspace bytes, any alignment
};

// At most 512 rows of every value that is no output, and of every product's input; never a copy of the weights.
size_t tokenwise_workspace(const TokenwiseArguments& arguments, const Parallel& parallel);
// Every sum is taken in an order that does not depend on the number of threads.
void tokenwise(const TokenwiseArguments& arguments, const Parallel& parallel);

}  // namespace kimi::cpu
