// The part of ONNX Runtime's C ABI that the custom ops use, declared by hand. The table of functions only ever grows at
// its end, and no package of a registry carries the headers, so that these few slots spare every build a download;
// tests/ort_abi_layout.cpp compares them with the real header where there is one (ONNXRUNTIME_INCLUDE_DIR).
#pragma once

#include <cstddef>
#include <cstdint>

namespace kimi::ort {

// The first version of the table with its last slot below: ONNX Runtime 1.24.
inline constexpr uint32_t kApiVersion = 24;

struct Status;
struct Value;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct Allocator;

enum class ElementType : int32_t { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt32 = 6 };
enum class ErrorCode : int32_t { kFail = 1, kInvalidArgument = 2 };
enum class Characteristic : int32_t { kRequired = 0, kOptional = 1, kVariadic = 2 };

using Unused = void (*)();

struct Api {
  Status* (*CreateStatus)(ErrorCode code, const char* message);
  Unused unused_1[25];
  Status* (*CreateCustomOpDomain)(const char* domain, CustomOpDomain** out);
  Status* (*CustomOpDomain_Add)(CustomOpDomain* domain, const struct CustomOp* op);
  Status* (*AddCustomOpDomain)(SessionOptions* options, CustomOpDomain* domain);
  Unused unused_29[22];
  Status* (*GetTensorMutableData)(Value* value, void** out);
  Unused unused_52[23];
  Status* (*AllocatorAlloc)(Allocator* allocator, size_t size, void** out);
  Status* (*AllocatorFree)(Allocator* allocator, void* memory);
  Unused unused_77[8];
  Status* (*KernelInfoGetAttribute_float)(const KernelInfo* info, const char* name, float* out);
  Status* (*KernelInfoGetAttribute_int64)(const KernelInfo* info, const char* name, int64_t* out);
  Status* (*KernelInfoGetAttribute_string)(const KernelInfo* info, const char* name, char* out, size_t* size);
  Status* (*KernelContext_GetInputCount)(const KernelContext* context, size_t* out);
  Unused unused_89[1];
  Status* (*KernelContext_GetInput)(const KernelContext* context, size_t index, const Value** out);
  Status* (*KernelContext_GetOutput)(KernelContext* context, size_t index, const int64_t* dims, size_t count,
                                     Value** out);
  Unused unused_92[1];
  void (*ReleaseStatus)(Status* status);
  Unused unused_94[38];
  void (*ReleaseAllocator)(Allocator* allocator);
  Unused unused_133[116];
  Status* (*KernelInfoGetConstantInput_tensor)(const KernelInfo* info, size_t index, int* is_constant,
                                               const Value** out);
  Unused unused_250[24];
  Status* (*KernelContext_ParallelFor)(const KernelContext* context, void (*task)(void* argument, size_t index),
                                       size_t tasks, size_t batches, void* argument);
  Unused unused_275[3];
  Status* (*KernelInfoGetAllocator)(const KernelInfo* info, int32_t memory_type, Allocator** out);
  Unused unused_279[135];
  Status* (*GetTensorElementTypeAndShapeDataReference)(const Value* value, ElementType* type, const int64_t** dims,
                                                       size_t* count);
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// What a custom op is to ONNX Runtime. A null function that may be null keeps its default.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp* op, const Api* api, const KernelInfo* info);
  const char* (*GetName)(const CustomOp* op);
  const char* (*GetExecutionProviderType)(const CustomOp* op);
  ElementType (*GetInputType)(const CustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp* op);
  ElementType (*GetOutputType)(const CustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp* op);
  void (*KernelCompute)(void* kernel, KernelContext* context);
  void (*KernelDestroy)(void* kernel);
  Characteristic (*GetInputCharacteristic)(const CustomOp* op, size_t index);
  Characteristic (*GetOutputCharacteristic)(const CustomOp* op, size_t index);
  int32_t (*GetInputMemoryType)(const CustomOp* op, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp* op);
  int (*GetVariadicInputHomogeneity)(const CustomOp* op);
  int (*GetVariadicOutputMinArity)(const CustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const CustomOp* op);
  Status* (*CreateKernelV2)(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext* context);
  Status* (*InferOutputShapeFn)(const CustomOp* op, ShapeInferContext* context);
  int (*GetStartVersion)(const CustomOp* op);
  int (*GetEndVersion)(const CustomOp* op);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // namespace kimi::ort
