// The kernels' C ABI without kernels: every call succeeds at once. What a plugin then takes is its own.
#include "../kernels/kimi_causal_conv.h"
#include "../kernels/kimi_linear_attention.h"
#include "../kernels/kimi_moe.h"

extern "C" {

uint32_t kimi_abi_version(void) { return KIMI_ABI_VERSION; }
const char* kimi_backend(void) { return "none"; }
const char* kimi_last_error(void) { return ""; }

int32_t kimi_kda_workspace(const KimiKdaArguments*, size_t* bytes) {
  *bytes = 0;
  return KIMI_OK;
}
int32_t kimi_kda(const KimiKdaArguments*) { return KIMI_OK; }

int32_t kimi_moe_workspace(const KimiMoeArguments*, size_t* bytes) {
  *bytes = 0;
  return KIMI_OK;
}
int32_t kimi_moe(const KimiMoeArguments*) { return KIMI_OK; }

int32_t kimi_linear_attention_workspace(const KimiLinearAttentionArguments*, size_t* bytes) {
  *bytes = 0;
  return KIMI_OK;
}
int32_t kimi_linear_attention(const KimiLinearAttentionArguments*) { return KIMI_OK; }
int32_t kimi_causal_conv(const KimiCausalConvArguments*) { return KIMI_OK; }
}
