// The library's edges: what ONNX Runtime calls when the library is registered with a session's options, and what the
// ops in it were built from. Indices are below kimi_ort_count().
#pragma once

#include <stdint.h>

#define KIMI_ORT_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

struct OrtSessionOptions;
struct OrtApiBase;
struct OrtStatus;

KIMI_ORT_API struct OrtStatus* RegisterCustomOps(struct OrtSessionOptions* options, const struct OrtApiBase* base);
KIMI_ORT_API int32_t kimi_ort_count(void);
KIMI_ORT_API const char* kimi_ort_name(int32_t index);
KIMI_ORT_API const char* kimi_ort_abi(int32_t index);
KIMI_ORT_API const char* kimi_ort_instruction_set(void);
// Runs the kernels of a lesser instruction set from now on, for tests of them. 0: this machine has not that one.
KIMI_ORT_API int32_t kimi_ort_choose_instruction_set(const char* name);

#ifdef __cplusplus
}
#endif
