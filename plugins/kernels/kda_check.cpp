#include "kda_check.h"

#include <cmath>

namespace kimi {

namespace {

thread_local std::string last_error;

constexpr int64_t kMaxBlocks = 0x7FFFFFFF;

struct Pointer {
  const char* name;
  const void* address;
  size_t alignment;
  bool optional = false;
};

std::string number(int64_t value) { return std::to_string(value); }

KimiStatus check_sizes(const KimiKdaArguments& a, Call call, std::string& message) {
  if (a.data_type != KIMI_FLOAT16 && a.data_type != KIMI_BFLOAT16 &&
      !(a.data_type == KIMI_FLOAT32 && (call == Call::kDecode || call == Call::kSizes))) {
    message =
        "data_type is " + number(a.data_type) +
        (call == Call::kDecode || call == Call::kSizes ? "; decode takes 0 (float32), 1 (float16) and 2 (bfloat16)"
                                                       : "; prefill takes 1 (float16) and 2 (bfloat16)");
    return KIMI_ERROR_DTYPE;
  }
  if (a.state_type != KIMI_FLOAT32) {
    message = "state_type is " + number(a.state_type) + "; recurrent states are 0 (float32)";
    return KIMI_ERROR_DTYPE;
  }
  if (a.head_dim != 64 && a.head_dim != 128) {
    message = "head_dim is " + number(a.head_dim) + "; the kernels are built for 64 and 128";
    return KIMI_ERROR_SHAPE;
  }
  if (a.conv_width != 4) {
    message = "conv_width is " + number(a.conv_width) + "; the kernels are built for 4";
    return KIMI_ERROR_SHAPE;
  }
  if (a.batch < 1 || a.sequence < 0 || a.num_heads < 1) {
    message = "batch " + number(a.batch) + ", sequence " + number(a.sequence) + ", num_heads " + number(a.num_heads) +
              "; expected at least 1, 0 and 1";
    return KIMI_ERROR_SHAPE;
  }
  if (a.num_heads > 4096) {
    message = "num_heads is " + number(a.num_heads) + "; at most 4096";
    return KIMI_ERROR_SHAPE;
  }
  if (a.cu_seqlens != nullptr && call == Call::kDecode) {
    message = "decode takes the padded layout, but cu_seqlens is given";
    return KIMI_ERROR_ARGUMENT;
  }
  if (a.gate != KIMI_GATE_SOFTPLUS && a.gate != KIMI_GATE_BOUNDED) {
    message = "gate is " + number(a.gate) + "; expected 0 (softplus) or 1 (bounded)";
    return KIMI_ERROR_ARGUMENT;
  }
  if (a.gate == KIMI_GATE_BOUNDED && !(a.gate_lower_bound >= -5.0f && a.gate_lower_bound < 0.0f)) {
    message = "gate_lower_bound is " + std::to_string(a.gate_lower_bound) + "; the bounded gate takes [-5, 0)";
    return KIMI_ERROR_ARGUMENT;
  }
  if (!(a.norm_eps >= 0.0f) || !std::isfinite(a.norm_eps) || !std::isfinite(a.scale)) {
    message = "norm_eps is " + std::to_string(a.norm_eps) + ", scale " + std::to_string(a.scale) +
              "; both must be finite, norm_eps not negative";
    return KIMI_ERROR_ARGUMENT;
  }
  const int warps = a.head_dim / 16, splits = a.value_splits;
  if (splits < 0 || splits > warps || (splits & (splits - 1)) != 0) {
    message = "value_splits is " + number(splits) + "; expected 0 or a power of two up to " + number(warps);
    return KIMI_ERROR_ARGUMENT;
  }
  const int64_t blocks_of_chain = static_cast<int64_t>(a.batch) * a.num_heads * warps;
  // rows and heads are counted in 31 bits, up to the end of the last block
  const int64_t rows = static_cast<int64_t>(a.cu_seqlens != nullptr ? 1 : a.batch) * a.sequence;
  if (max_tiles(a) * a.num_heads > kMaxBlocks || blocks_of_chain > kMaxBlocks ||
      rows * a.num_heads > kMaxBlocks - 1024) {
    message = "batch " + number(a.batch) + " of " + number(a.sequence) + " steps and " + number(a.num_heads) +
              " heads are more than one grid holds";
    return KIMI_ERROR_SHAPE;
  }
  return KIMI_OK;
}

KimiStatus check_pointers(const KimiKdaArguments& a, Call call, std::string& message) {
  const Pointer pointers[] = {
      {"qkv", a.qkv, 16},
      {"decay", a.decay, 16},
      {"beta", a.beta, 4},
      {"output_gate", a.output_gate, 16},
      {"conv_weight", a.conv_weight, 16},
      {"A_log", a.A_log, 4},
      {"dt_bias", a.dt_bias, 4},
      {"norm_weight", a.norm_weight, 16},
      {"past_conv_state", a.past_conv_state, 16},
      {"past_recurrent_state", a.past_recurrent_state, 16},
      {"sequence_lengths", a.sequence_lengths, 4, true},
      {"cu_seqlens", a.cu_seqlens, 4, true},
      {"slots", a.slots, 4, true},
      {"output", a.output, 16},
      {"present_conv_state", a.present_conv_state, 16},
      {"present_recurrent_state", a.present_recurrent_state, 16},
      {"state_snapshots", a.state_snapshots, 16, true},
  };
  for (const Pointer& p : pointers) {
    // tensors of steps have no memory when there are no steps
    const bool of_steps = p.address == a.qkv || p.address == a.decay || p.address == a.beta ||
                          p.address == a.output_gate || p.address == a.output;
    if (p.address == nullptr && !p.optional && !(of_steps && a.sequence == 0)) {
      message = std::string(p.name) + " is null";
      return KIMI_ERROR_ARGUMENT;
    }
    if (reinterpret_cast<uintptr_t>(p.address) % p.alignment != 0) {
      message = std::string(p.name) + " is not aligned to " + number(static_cast<int64_t>(p.alignment)) + " bytes";
      return KIMI_ERROR_ARGUMENT;
    }
  }
  if (a.cu_seqlens != nullptr && a.sequence_lengths != nullptr) {
    message = "cu_seqlens and sequence_lengths are both given; a batch is packed or padded";
    return KIMI_ERROR_ARGUMENT;
  }
  if (a.slots != nullptr && a.num_slots < 1) {
    message = "slots are given, but num_slots is " + number(a.num_slots);
    return KIMI_ERROR_ARGUMENT;
  }
  if (call == Call::kDecode && a.state_snapshots != nullptr) {
    message = "state_snapshots are made by prefill only";
    return KIMI_ERROR_ARGUMENT;
  }
  if (call == Call::kPrefill) {
    const size_t needed = prefill_workspace(a).total();
    if (needed > 0 && a.workspace == nullptr) {
      message = "workspace is null; " + std::to_string(needed) + " bytes are needed";
      return KIMI_ERROR_WORKSPACE;
    }
    if (a.workspace_size < needed) {
      message =
          "workspace has " + std::to_string(a.workspace_size) + " bytes; " + std::to_string(needed) + " are needed";
      return KIMI_ERROR_WORKSPACE;
    }
    if (reinterpret_cast<uintptr_t>(a.workspace) % 16 != 0) {
      message = "workspace is not aligned to 16 bytes";
      return KIMI_ERROR_ARGUMENT;
    }
  }
  return KIMI_OK;
}

}  // namespace

KimiStatus check(const KimiKdaArguments* arguments, Call call, std::string& message) {
  if (arguments == nullptr) {
    message = "arguments is null";
    return KIMI_ERROR_ARGUMENT;
  }
  if (arguments->struct_size != sizeof(KimiKdaArguments)) {
    message = "struct_size is " + number(arguments->struct_size) + "; this library (ABI " + number(KIMI_ABI_VERSION) +
              ") takes " + std::to_string(sizeof(KimiKdaArguments));
    return KIMI_ERROR_ABI;
  }
  const KimiStatus status = check_sizes(*arguments, call, message);
  if (status != KIMI_OK || call == Call::kSizes || call == Call::kPrefillWorkspace) return status;
  return check_pointers(*arguments, call, message);
}

KimiStatus finish(KimiStatus status, const std::string& message) {
  last_error = status == KIMI_OK ? std::string() : message;
  return status;
}

int64_t max_tiles(const KimiKdaArguments& a) {
  constexpr int kTile = 32;  // as the kernels'
  if (a.cu_seqlens != nullptr) return static_cast<int64_t>(a.sequence) / kTile + a.batch;
  return static_cast<int64_t>(a.batch) * ((static_cast<int64_t>(a.sequence) + kTile - 1) / kTile);
}

}  // namespace kimi

extern "C" {

uint32_t kimi_abi_version(void) { return KIMI_ABI_VERSION; }

const char* kimi_backend(void) {
#ifdef KIMI_EMULATED
  return "emulated";
#else
  return "cuda";
#endif
}

const char* kimi_last_error(void) { return kimi::last_error.c_str(); }
}
