// What the checks of all ops say in the same words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kimi_kernels.h"

namespace kimi {

constexpr int64_t kMaxBlocks = 0x7FFFFFFF;  // of a grid

struct Pointer {
  const char* name;
  const void* address;
  bool optional;
};

inline std::string number(int64_t value) { return std::to_string(value); }

inline bool divides(int32_t part, int32_t whole) { return part > 0 && whole % part == 0; }

inline KimiStatus refuse(KimiStatus status, std::string& message, const std::string& text) {
  message = text;
  return status;
}

inline KimiStatus check_struct(uint32_t seen, size_t size, std::string& message) {
  if (seen == size) return KIMI_OK;
  return refuse(
      KIMI_ERROR_ABI, message,
      "struct_size is " + number(seen) + "; this library (ABI " + number(KIMI_ABI_VERSION) + ") takes " + number(size));
}

inline KimiStatus check_type(const char* name, int32_t type, std::string& message) {
  if (type == KIMI_FLOAT32 || type == KIMI_FLOAT16 || type == KIMI_BFLOAT16) return KIMI_OK;
  return refuse(KIMI_ERROR_DTYPE, message,
                std::string(name) + " is " + number(type) + "; expected 0 (float32), 1 (float16) or 2 (bfloat16)");
}

template <size_t kCount>
KimiStatus check_pointers(const Pointer (&pointers)[kCount], std::string& message) {
  for (const Pointer& p : pointers) {
    if (p.address == nullptr && !p.optional) {
      return refuse(KIMI_ERROR_ARGUMENT, message, std::string(p.name) + " is null");
    }
    if (reinterpret_cast<uintptr_t>(p.address) % 16 != 0) {
      return refuse(KIMI_ERROR_ARGUMENT, message, std::string(p.name) + " is not aligned to 16 bytes");
    }
  }
  return KIMI_OK;
}

}  // namespace kimi
