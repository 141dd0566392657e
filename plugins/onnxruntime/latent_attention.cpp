#include "../generated/kimi_ort_ops.h"
#include "op.h"

namespace kimi::ort {
namespace {

using namespace latent_attention;

cpu::LatentAttentionArguments arguments_of(const Call& call) {
  cpu::LatentAttentionArguments a = {};
  a.batch = call.sizes[kSymbolBatch];
  a.sequence = call.sizes[kSymbolSequence];
  a.capacity = call.sizes[kSymbolCapacity];
  a.num_heads = call.sizes[kSymbolNumHeads];
  a.qk_nope_head_dim = call.sizes[kSymbolQkNopeHeadDim];
  a.qk_rope_head_dim = call.sizes[kSymbolQkRopeHeadDim];
  a.v_head_dim = call.sizes[kSymbolVHeadDim];
  a.kv_lora_rank = call.sizes[kSymbolKvLoraRank];
  a.scale = call.fields[kFieldScale].real;
  a.query = call.input<float>(kInputQuery);
  a.latent = call.input<float>(kInputLatent);
  a.kv_b_weight = call.input<float>(kInputKvBWeight);
  a.past_latent = call.input<float>(kInputPastLatent);
  a.past_lengths = call.input<int32_t>(kInputPastLengths);
  a.sequence_lengths = call.input<int32_t>(kInputSequenceLengths);
  a.output = call.output(kOutputOutput);
  a.present_latent = call.output(kOutputPresentLatent);
  a.workspace = call.workspace;
  return a;
}

}  // namespace

const Launcher& latent_attention_launcher() {
  static constexpr Launcher launcher = {
      &kSpec,
      [](const Call& call) { return cpu::latent_attention_workspace(arguments_of(call), call.parallel); },
      [](const Call& call) { return cpu::latent_attention(arguments_of(call), call.parallel); },
  };
  return launcher;
}

}  // namespace kimi::ort
