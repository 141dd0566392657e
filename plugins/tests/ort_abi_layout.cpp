// The slots of plugins/onnxruntime/ort_abi.h are those of ONNX Runtime's own header. Compiling is the test.
#include <onnxruntime_c_api.h>

#include "../onnxruntime/ort_abi.h"

#define SAME_SLOT(name) static_assert(offsetof(kimi::ort::Api, name) == offsetof(OrtApi, name), #name)
#define SAME_CALLBACK(name) static_assert(offsetof(kimi::ort::CustomOp, name) == offsetof(OrtCustomOp, name), #name)

SAME_SLOT(CreateStatus);
SAME_SLOT(CreateCustomOpDomain);
SAME_SLOT(CustomOpDomain_Add);
SAME_SLOT(AddCustomOpDomain);
SAME_SLOT(GetTensorMutableData);
SAME_SLOT(AllocatorAlloc);
SAME_SLOT(AllocatorFree);
SAME_SLOT(KernelInfoGetAttribute_float);
SAME_SLOT(KernelInfoGetAttribute_int64);
SAME_SLOT(KernelInfoGetAttribute_string);
SAME_SLOT(KernelContext_GetInputCount);
SAME_SLOT(KernelContext_GetInput);
SAME_SLOT(KernelContext_GetOutput);
SAME_SLOT(ReleaseStatus);
SAME_SLOT(ReleaseAllocator);
SAME_SLOT(KernelInfoGetConstantInput_tensor);
SAME_SLOT(KernelContext_ParallelFor);
SAME_SLOT(KernelInfoGetAllocator);
SAME_SLOT(GetTensorElementTypeAndShapeDataReference);

SAME_CALLBACK(version);
SAME_CALLBACK(GetName);
SAME_CALLBACK(GetExecutionProviderType);
SAME_CALLBACK(GetInputType);
SAME_CALLBACK(GetInputTypeCount);
SAME_CALLBACK(GetOutputType);
SAME_CALLBACK(GetOutputTypeCount);
SAME_CALLBACK(KernelDestroy);
SAME_CALLBACK(GetInputCharacteristic);
SAME_CALLBACK(GetOutputCharacteristic);
SAME_CALLBACK(GetInputMemoryType);
SAME_CALLBACK(GetVariadicInputMinArity);
SAME_CALLBACK(GetVariadicInputHomogeneity);
SAME_CALLBACK(GetVariadicOutputMinArity);
SAME_CALLBACK(GetVariadicOutputHomogeneity);
SAME_CALLBACK(CreateKernelV2);
SAME_CALLBACK(KernelComputeV2);
SAME_CALLBACK(InferOutputShapeFn);
SAME_CALLBACK(GetStartVersion);
SAME_CALLBACK(GetEndVersion);
SAME_CALLBACK(GetMayInplace);
SAME_CALLBACK(ReleaseAliasMap);

static_assert(static_cast<int>(kimi::ort::ElementType::kFloat) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
static_assert(static_cast<int>(kimi::ort::ElementType::kUint8) == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
static_assert(static_cast<int>(kimi::ort::ElementType::kInt32) == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
static_assert(static_cast<int>(kimi::ort::ErrorCode::kInvalidArgument) == ORT_INVALID_ARGUMENT);
static_assert(static_cast<int>(kimi::ort::ErrorCode::kFail) == ORT_FAIL);
static_assert(static_cast<int>(kimi::ort::Characteristic::kOptional) == INPUT_OUTPUT_OPTIONAL);
static_assert(static_cast<int>(kimi::ort::Characteristic::kVariadic) == INPUT_OUTPUT_VARIADIC);
static_assert(kimi::ort::kApiVersion <= ORT_API_VERSION);
