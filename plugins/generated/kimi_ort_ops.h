// Written by `python -m kimi_deploy.ops.cpp_header ort`; do not edit. A test keeps it current.
// clang-format off
#pragma once

#include "../tensorrt/op_spec.h"

namespace kimi {

namespace kimi_delta_attention {

enum Input { kInputQkv, kInputDecay, kInputBeta, kInputOutputGate, kInputConvWeight, kInputALog, kInputDtBias, kInputNormWeight, kInputPastConvState, kInputPastRecurrentState, kInputSequenceLengths };
enum Output { kOutputOutput, kOutputPresentConvState, kOutputPresentRecurrentState };
enum Field { kFieldNumHeads, kFieldHeadDim, kFieldNormEps, kFieldScale, kFieldGate, kFieldGateLowerBound, kFieldAbi };
enum Symbol { kSymbolNumHeads, kSymbolHeadDim, kSymbolBatch, kSymbolSequence, kSymbolConvWidth };
enum class Gate { kSoftplus, kBounded };

inline constexpr const char* kSymbols[] = {"num_heads", "head_dim", "batch", "sequence", "conv_width"};
inline constexpr DimensionStep kInQkv0[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kInQkv1[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionStep kInQkv2[] = {{DimensionStep::kConstant, 3}, {DimensionStep::kSymbol, 0}, {DimensionStep::kMultiply, 0}, {DimensionStep::kSymbol, 1}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionSpec kInQkvDims[] = {{"batch", kInQkv0}, {"sequence", kInQkv1}, {"3*num_heads*head_dim", kInQkv2}};
inline constexpr DimensionStep kInDecay0[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kInDecay1[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionStep kInDecay2[] = {{DimensionStep::kSymbol, 0}, {DimensionStep::kSymbol, 1}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionSpec kInDecayDims[] = {{"batch", kInDecay0}, {"sequence", kInDecay1}, {"num_heads*head_dim", kInDecay2}};
inline constexpr DimensionStep kInBeta0[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kInBeta1[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionStep kInBeta2[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionSpec kInBetaDims[] = {{"batch", kInBeta0}, {"sequence", kInBeta1}, {"num_heads", kInBeta2}};
inline constexpr DimensionStep kInOutputGate0[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kInOutputGate1[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionStep kInOutputGate2[] = {{DimensionStep::kSymbol, 0}, {DimensionStep::kSymbol, 1}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionSpec kInOutputGateDims[] = {{"batch", kInOutputGate0}, {"sequence", kInOutputGate1}, {"num_heads*head_dim", kInOutputGate2}};
inline constexpr DimensionStep kInConvWeight0[] = {{DimensionStep::kConstant, 3}, {DimensionStep::kSymbol, 0}, {DimensionStep::kMultiply, 0}, {DimensionStep::kSymbol, 1}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionStep kInConvWeight1[] = {{DimensionStep::kSymbol, 4}};
inline constexpr DimensionSpec kInConvWeightDims[] = {{"3*num_heads*head_dim", kInConvWeight0}, {"conv_width", kInConvWeight1}};
inline constexpr DimensionStep kInALog0[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionSpec kInALogDims[] = {{"num_heads", kInALog0}};
inline constexpr DimensionStep kInDtBias0[] = {{DimensionStep::kSymbol, 0}, {DimensionStep::kSymbol, 1}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionSpec kInDtBiasDims[] = {{"num_heads*head_dim", kInDtBias0}};
inline constexpr DimensionStep kInNormWeight0[] = {{DimensionStep::kSymbol, 1}};
inline constexpr DimensionSpec kInNormWeightDims[] = {{"head_dim", kInNormWeight0}};
inline constexpr DimensionStep kInPastConvState0[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kInPastConvState1[] = {{DimensionStep::kConstant, 3}, {DimensionStep::kSymbol, 0}, {DimensionStep::kMultiply, 0}, {DimensionStep::kSymbol, 1}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionStep kInPastConvState2[] = {{DimensionStep::kSymbol, 4}, {DimensionStep::kConstant, 1}, {DimensionStep::kSubtract, 0}};
inline constexpr DimensionSpec kInPastConvStateDims[] = {{"batch", kInPastConvState0}, {"3*num_heads*head_dim", kInPastConvState1}, {"conv_width-1", kInPastConvState2}};
inline constexpr DimensionStep kInPastRecurrentState0[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kInPastRecurrentState1[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionStep kInPastRecurrentState2[] = {{DimensionStep::kSymbol, 1}};
inline constexpr DimensionStep kInPastRecurrentState3[] = {{DimensionStep::kSymbol, 1}};
inline constexpr DimensionSpec kInPastRecurrentStateDims[] = {{"batch", kInPastRecurrentState0}, {"num_heads", kInPastRecurrentState1}, {"head_dim", kInPastRecurrentState2}, {"head_dim", kInPastRecurrentState3}};
inline constexpr DimensionStep kInSequenceLengths0[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionSpec kInSequenceLengthsDims[] = {{"batch", kInSequenceLengths0}};
inline constexpr PortSpec kInputs[] = {
    {"qkv", PortType::kT, false, kInQkvDims},
    {"decay", PortType::kT, false, kInDecayDims},
    {"beta", PortType::kT, false, kInBetaDims},
    {"output_gate", PortType::kT, false, kInOutputGateDims},
    {"conv_weight", PortType::kT, false, kInConvWeightDims},
    {"A_log", PortType::kFloat32, false, kInALogDims},
    {"dt_bias", PortType::kFloat32, false, kInDtBiasDims},
    {"norm_weight", PortType::kT, false, kInNormWeightDims},
    {"past_conv_state", PortType::kT, false, kInPastConvStateDims},
    {"past_recurrent_state", PortType::kFloat32, false, kInPastRecurrentStateDims},
    {"sequence_lengths", PortType::kInt32, true, kInSequenceLengthsDims}};
inline constexpr DimensionStep kOutOutput0[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kOutOutput1[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionStep kOutOutput2[] = {{DimensionStep::kSymbol, 0}, {DimensionStep::kSymbol, 1}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionSpec kOutOutputDims[] = {{"batch", kOutOutput0}, {"sequence", kOutOutput1}, {"num_heads*head_dim", kOutOutput2}};
inline constexpr DimensionStep kOutPresentConvState0[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kOutPresentConvState1[] = {{DimensionStep::kConstant, 3}, {DimensionStep::kSymbol, 0}, {DimensionStep::kMultiply, 0}, {DimensionStep::kSymbol, 1}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionStep kOutPresentConvState2[] = {{DimensionStep::kSymbol, 4}, {DimensionStep::kConstant, 1}, {DimensionStep::kSubtract, 0}};
inline constexpr DimensionSpec kOutPresentConvStateDims[] = {{"batch", kOutPresentConvState0}, {"3*num_heads*head_dim", kOutPresentConvState1}, {"conv_width-1", kOutPresentConvState2}};
inline constexpr DimensionStep kOutPresentRecurrentState0[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kOutPresentRecurrentState1[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionStep kOutPresentRecurrentState2[] = {{DimensionStep::kSymbol, 1}};
inline constexpr DimensionStep kOutPresentRecurrentState3[] = {{DimensionStep::kSymbol, 1}};
inline constexpr DimensionSpec kOutPresentRecurrentStateDims[] = {{"batch", kOutPresentRecurrentState0}, {"num_heads", kOutPresentRecurrentState1}, {"head_dim", kOutPresentRecurrentState2}, {"head_dim", kOutPresentRecurrentState3}};
inline constexpr PortSpec kOutputs[] = {
    {"output", PortType::kT, false, kOutOutputDims},
    {"present_conv_state", PortType::kT, false, kOutPresentConvStateDims},
    {"present_recurrent_state", PortType::kFloat32, false, kOutPresentRecurrentStateDims}};
inline constexpr const char* kChoicesOfGate[] = {"softplus", "bounded"};
inline constexpr FieldSpec kFields[] = {
    {"num_heads", FieldType::kInt, 0, true, 0, 0.0f, {}},
    {"head_dim", FieldType::kInt, 1, true, 0, 0.0f, {}},
    {"norm_eps", FieldType::kFloat, -1, true, 0, 0.0f, {}},
    {"scale", FieldType::kFloat, -1, true, 0, 0.0f, {}},
    {"gate", FieldType::kString, -1, true, 0, 0.0f, kChoicesOfGate},
    {"gate_lower_bound", FieldType::kFloat, -1, true, 0, 0.0f, {}},
    {"abi", FieldType::kString, -1, true, 0, 0.0f, {}}};
inline constexpr int kAliases[] = {-1, 8, 9};
inline constexpr OpSpec kSpec = {"KimiDeltaAttention", "kimi", "1",
    "03343c75e980d2e7", kInputs, kOutputs, kFields, kSymbols, kAliases, 6, -1, -1};

}  // namespace kimi_delta_attention

namespace latent_attention {

enum Input { kInputQuery, kInputLatent, kInputKvBWeight, kInputPastLatent, kInputPastLengths, kInputSequenceLengths };
enum Output { kOutputOutput, kOutputPresentLatent };
enum Field { kFieldNumHeads, kFieldQkNopeHeadDim, kFieldQkRopeHeadDim, kFieldVHeadDim, kFieldKvLoraRank, kFieldScale, kFieldAbi };
enum Symbol { kSymbolNumHeads, kSymbolQkNopeHeadDim, kSymbolQkRopeHeadDim, kSymbolVHeadDim, kSymbolKvLoraRank, kSymbolBatch, kSymbolSequence, kSymbolCapacity };

inline constexpr const char* kSymbols[] = {"num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "batch", "sequence", "capacity"};
inline constexpr DimensionStep kInQuery0[] = {{DimensionStep::kSymbol, 5}};
inline constexpr DimensionStep kInQuery1[] = {{DimensionStep::kSymbol, 6}};
inline constexpr DimensionStep kInQuery2[] = {{DimensionStep::kSymbol, 0}, {DimensionStep::kSymbol, 1}, {DimensionStep::kSymbol, 2}, {DimensionStep::kAdd, 0}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionSpec kInQueryDims[] = {{"batch", kInQuery0}, {"sequence", kInQuery1}, {"num_heads*(qk_nope_head_dim+qk_rope_head_dim)", kInQuery2}};
inline constexpr DimensionStep kInLatent0[] = {{DimensionStep::kSymbol, 5}};
inline constexpr DimensionStep kInLatent1[] = {{DimensionStep::kSymbol, 6}};
inline constexpr DimensionStep kInLatent2[] = {{DimensionStep::kSymbol, 4}, {DimensionStep::kSymbol, 2}, {DimensionStep::kAdd, 0}};
inline constexpr DimensionSpec kInLatentDims[] = {{"batch", kInLatent0}, {"sequence", kInLatent1}, {"kv_lora_rank+qk_rope_head_dim", kInLatent2}};
inline constexpr DimensionStep kInKvBWeight0[] = {{DimensionStep::kSymbol, 0}, {DimensionStep::kSymbol, 1}, {DimensionStep::kSymbol, 3}, {DimensionStep::kAdd, 0}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionStep kInKvBWeight1[] = {{DimensionStep::kSymbol, 4}};
inline constexpr DimensionSpec kInKvBWeightDims[] = {{"num_heads*(qk_nope_head_dim+v_head_dim)", kInKvBWeight0}, {"kv_lora_rank", kInKvBWeight1}};
inline constexpr DimensionStep kInPastLatent0[] = {{DimensionStep::kSymbol, 5}};
inline constexpr DimensionStep kInPastLatent1[] = {{DimensionStep::kSymbol, 7}};
inline constexpr DimensionStep kInPastLatent2[] = {{DimensionStep::kSymbol, 4}, {DimensionStep::kSymbol, 2}, {DimensionStep::kAdd, 0}};
inline constexpr DimensionSpec kInPastLatentDims[] = {{"batch", kInPastLatent0}, {"capacity", kInPastLatent1}, {"kv_lora_rank+qk_rope_head_dim", kInPastLatent2}};
inline constexpr DimensionStep kInPastLengths0[] = {{DimensionStep::kSymbol, 5}};
inline constexpr DimensionSpec kInPastLengthsDims[] = {{"batch", kInPastLengths0}};
inline constexpr DimensionStep kInSequenceLengths0[] = {{DimensionStep::kSymbol, 5}};
inline constexpr DimensionSpec kInSequenceLengthsDims[] = {{"batch", kInSequenceLengths0}};
inline constexpr PortSpec kInputs[] = {
    {"query", PortType::kT, false, kInQueryDims},
    {"latent", PortType::kT, false, kInLatentDims},
    {"kv_b_weight", PortType::kT, false, kInKvBWeightDims},
    {"past_latent", PortType::kT, false, kInPastLatentDims},
    {"past_lengths", PortType::kInt32, false, kInPastLengthsDims},
    {"sequence_lengths", PortType::kInt32, true, kInSequenceLengthsDims}};
inline constexpr DimensionStep kOutOutput0[] = {{DimensionStep::kSymbol, 5}};
inline constexpr DimensionStep kOutOutput1[] = {{DimensionStep::kSymbol, 6}};
inline constexpr DimensionStep kOutOutput2[] = {{DimensionStep::kSymbol, 0}, {DimensionStep::kSymbol, 3}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionSpec kOutOutputDims[] = {{"batch", kOutOutput0}, {"sequence", kOutOutput1}, {"num_heads*v_head_dim", kOutOutput2}};
inline constexpr DimensionStep kOutPresentLatent0[] = {{DimensionStep::kSymbol, 5}};
inline constexpr DimensionStep kOutPresentLatent1[] = {{DimensionStep::kSymbol, 7}};
inline constexpr DimensionStep kOutPresentLatent2[] = {{DimensionStep::kSymbol, 4}, {DimensionStep::kSymbol, 2}, {DimensionStep::kAdd, 0}};
inline constexpr DimensionSpec kOutPresentLatentDims[] = {{"batch", kOutPresentLatent0}, {"capacity", kOutPresentLatent1}, {"kv_lora_rank+qk_rope_head_dim", kOutPresentLatent2}};
inline constexpr PortSpec kOutputs[] = {
    {"output", PortType::kT, false, kOutOutputDims},
    {"present_latent", PortType::kT, false, kOutPresentLatentDims}};
inline constexpr FieldSpec kFields[] = {
    {"num_heads", FieldType::kInt, 0, true, 0, 0.0f, {}},
    {"qk_nope_head_dim", FieldType::kInt, 1, true, 0, 0.0f, {}},
    {"qk_rope_head_dim", FieldType::kInt, 2, true, 0, 0.0f, {}},
    {"v_head_dim", FieldType::kInt, 3, true, 0, 0.0f, {}},
    {"kv_lora_rank", FieldType::kInt, 4, true, 0, 0.0f, {}},
    {"scale", FieldType::kFloat, -1, true, 0, 0.0f, {}},
    {"abi", FieldType::kString, -1, true, 0, 0.0f, {}}};
inline constexpr int kAliases[] = {-1, 3};
inline constexpr OpSpec kSpec = {"LatentAttention", "kimi", "1",
    "7c3291f648b47bed", kInputs, kOutputs, kFields, kSymbols, kAliases, 6, -1, -1};

}  // namespace latent_attention

namespace mixture_of_experts {

enum Input { kInputHiddenStates, kInputRouterWeight, kInputRouterBias, kInputGateUpWeight, kInputDownWeight };
enum Output { kOutputOutput };
enum Field { kFieldNumExperts, kFieldIntermediate, kFieldTopK, kFieldNGroup, kFieldTopkGroup, kFieldRenormalize, kFieldRoutedScalingFactor, kFieldAbi };
enum Symbol { kSymbolNumExperts, kSymbolIntermediate, kSymbolTopK, kSymbolNGroup, kSymbolTopkGroup, kSymbolRenormalize, kSymbolBatch, kSymbolSequence, kSymbolHidden };

inline constexpr const char* kSymbols[] = {"num_experts", "intermediate", "top_k", "n_group", "topk_group", "renormalize", "batch", "sequence", "hidden"};
inline constexpr DimensionStep kInHiddenStates0[] = {{DimensionStep::kSymbol, 6}};
inline constexpr DimensionStep kInHiddenStates1[] = {{DimensionStep::kSymbol, 7}};
inline constexpr DimensionStep kInHiddenStates2[] = {{DimensionStep::kSymbol, 8}};
inline constexpr DimensionSpec kInHiddenStatesDims[] = {{"batch", kInHiddenStates0}, {"sequence", kInHiddenStates1}, {"hidden", kInHiddenStates2}};
inline constexpr DimensionStep kInRouterWeight0[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionStep kInRouterWeight1[] = {{DimensionStep::kSymbol, 8}};
inline constexpr DimensionSpec kInRouterWeightDims[] = {{"num_experts", kInRouterWeight0}, {"hidden", kInRouterWeight1}};
inline constexpr DimensionStep kInRouterBias0[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionSpec kInRouterBiasDims[] = {{"num_experts", kInRouterBias0}};
inline constexpr DimensionStep kInGateUpWeight0[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionStep kInGateUpWeight1[] = {{DimensionStep::kConstant, 2}, {DimensionStep::kSymbol, 1}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionStep kInGateUpWeight2[] = {{DimensionStep::kSymbol, 8}};
inline constexpr DimensionSpec kInGateUpWeightDims[] = {{"num_experts", kInGateUpWeight0}, {"2*intermediate", kInGateUpWeight1}, {"hidden", kInGateUpWeight2}};
inline constexpr DimensionStep kInDownWeight0[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionStep kInDownWeight1[] = {{DimensionStep::kSymbol, 8}};
inline constexpr DimensionStep kInDownWeight2[] = {{DimensionStep::kSymbol, 1}};
inline constexpr DimensionSpec kInDownWeightDims[] = {{"num_experts", kInDownWeight0}, {"hidden", kInDownWeight1}, {"intermediate", kInDownWeight2}};
inline constexpr PortSpec kInputs[] = {
    {"hidden_states", PortType::kT, false, kInHiddenStatesDims},
    {"router_weight", PortType::kT, false, kInRouterWeightDims},
    {"router_bias", PortType::kFloat32, false, kInRouterBiasDims},
    {"gate_up_weight", PortType::kT, false, kInGateUpWeightDims},
    {"down_weight", PortType::kT, false, kInDownWeightDims}};
inline constexpr DimensionStep kOutOutput0[] = {{DimensionStep::kSymbol, 6}};
inline constexpr DimensionStep kOutOutput1[] = {{DimensionStep::kSymbol, 7}};
inline constexpr DimensionStep kOutOutput2[] = {{DimensionStep::kSymbol, 8}};
inline constexpr DimensionSpec kOutOutputDims[] = {{"batch", kOutOutput0}, {"sequence", kOutOutput1}, {"hidden", kOutOutput2}};
inline constexpr PortSpec kOutputs[] = {
    {"output", PortType::kT, false, kOutOutputDims}};
inline constexpr FieldSpec kFields[] = {
    {"num_experts", FieldType::kInt, 0, true, 0, 0.0f, {}},
    {"intermediate", FieldType::kInt, 1, true, 0, 0.0f, {}},
    {"top_k", FieldType::kInt, 2, true, 0, 0.0f, {}},
    {"n_group", FieldType::kInt, 3, true, 0, 0.0f, {}},
    {"topk_group", FieldType::kInt, 4, true, 0, 0.0f, {}},
    {"renormalize", FieldType::kInt, 5, true, 0, 0.0f, {}},
    {"routed_scaling_factor", FieldType::kFloat, -1, true, 0, 0.0f, {}},
    {"abi", FieldType::kString, -1, true, 0, 0.0f, {}}};
inline constexpr int kAliases[] = {-1};
inline constexpr OpSpec kSpec = {"MixtureOfExperts", "kimi", "1",
    "d94cad42e62d7e89", kInputs, kOutputs, kFields, kSymbols, kAliases, 7, -1, -1};

}  // namespace mixture_of_experts

namespace quantized_mixture_of_experts {

enum Input { kInputHiddenStates, kInputRouterWeight, kInputRouterBias, kInputGateUpLevels, kInputGateUpScales, kInputDownLevels, kInputDownScales, kInputGateUpZeroPoints, kInputDownZeroPoints };
enum Output { kOutputOutput };
enum Field { kFieldNumExperts, kFieldIntermediate, kFieldTopK, kFieldNGroup, kFieldTopkGroup, kFieldRenormalize, kFieldRoutedScalingFactor, kFieldBits, kFieldBlockSize, kFieldSymmetric, kFieldActivations, kFieldAbi };
enum Symbol { kSymbolNumExperts, kSymbolIntermediate, kSymbolTopK, kSymbolNGroup, kSymbolTopkGroup, kSymbolRenormalize, kSymbolBits, kSymbolBlockSize, kSymbolSymmetric, kSymbolBatch, kSymbolSequence, kSymbolHidden };
enum class Activations { kFloat32, kInt8 };

inline constexpr const char* kSymbols[] = {"num_experts", "intermediate", "top_k", "n_group", "topk_group", "renormalize", "bits", "block_size", "symmetric", "batch", "sequence", "hidden"};
inline constexpr DimensionStep kInHiddenStates0[] = {{DimensionStep::kSymbol, 9}};
inline constexpr DimensionStep kInHiddenStates1[] = {{DimensionStep::kSymbol, 10}};
inline constexpr DimensionStep kInHiddenStates2[] = {{DimensionStep::kSymbol, 11}};
inline constexpr DimensionSpec kInHiddenStatesDims[] = {{"batch", kInHiddenStates0}, {"sequence", kInHiddenStates1}, {"hidden", kInHiddenStates2}};
inline constexpr DimensionStep kInRouterWeight0[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionStep kInRouterWeight1[] = {{DimensionStep::kSymbol, 11}};
inline constexpr DimensionSpec kInRouterWeightDims[] = {{"num_experts", kInRouterWeight0}, {"hidden", kInRouterWeight1}};
inline constexpr DimensionStep kInRouterBias0[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionSpec kInRouterBiasDims[] = {{"num_experts", kInRouterBias0}};
inline constexpr DimensionStep kInGateUpLevels0[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionStep kInGateUpLevels1[] = {{DimensionStep::kConstant, 2}, {DimensionStep::kSymbol, 1}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionStep kInGateUpLevels2[] = {{DimensionStep::kSymbol, 11}, {DimensionStep::kSymbol, 6}, {DimensionStep::kMultiply, 0}, {DimensionStep::kConstant, 8}, {DimensionStep::kDivide, 0}};
inline constexpr DimensionSpec kInGateUpLevelsDims[] = {{"num_experts", kInGateUpLevels0}, {"2*intermediate", kInGateUpLevels1}, {"hidden*bits//8", kInGateUpLevels2}};
inline constexpr DimensionStep kInGateUpScales0[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionStep kInGateUpScales1[] = {{DimensionStep::kConstant, 2}, {DimensionStep::kSymbol, 1}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionStep kInGateUpScales2[] = {{DimensionStep::kSymbol, 11}, {DimensionStep::kSymbol, 7}, {DimensionStep::kDivide, 0}};
inline constexpr DimensionSpec kInGateUpScalesDims[] = {{"num_experts", kInGateUpScales0}, {"2*intermediate", kInGateUpScales1}, {"hidden//block_size", kInGateUpScales2}};
inline constexpr DimensionStep kInDownLevels0[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionStep kInDownLevels1[] = {{DimensionStep::kSymbol, 11}};
inline constexpr DimensionStep kInDownLevels2[] = {{DimensionStep::kSymbol, 1}, {DimensionStep::kSymbol, 6}, {DimensionStep::kMultiply, 0}, {DimensionStep::kConstant, 8}, {DimensionStep::kDivide, 0}};
inline constexpr DimensionSpec kInDownLevelsDims[] = {{"num_experts", kInDownLevels0}, {"hidden", kInDownLevels1}, {"intermediate*bits//8", kInDownLevels2}};
inline constexpr DimensionStep kInDownScales0[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionStep kInDownScales1[] = {{DimensionStep::kSymbol, 11}};
inline constexpr DimensionStep kInDownScales2[] = {{DimensionStep::kSymbol, 1}, {DimensionStep::kSymbol, 7}, {DimensionStep::kDivide, 0}};
inline constexpr DimensionSpec kInDownScalesDims[] = {{"num_experts", kInDownScales0}, {"hidden", kInDownScales1}, {"intermediate//block_size", kInDownScales2}};
inline constexpr DimensionStep kInGateUpZeroPoints0[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionStep kInGateUpZeroPoints1[] = {{DimensionStep::kConstant, 2}, {DimensionStep::kSymbol, 1}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionStep kInGateUpZeroPoints2[] = {{DimensionStep::kSymbol, 11}, {DimensionStep::kSymbol, 7}, {DimensionStep::kDivide, 0}, {DimensionStep::kSymbol, 6}, {DimensionStep::kMultiply, 0}, {DimensionStep::kConstant, 7}, {DimensionStep::kAdd, 0}, {DimensionStep::kConstant, 8}, {DimensionStep::kDivide, 0}};
inline constexpr DimensionSpec kInGateUpZeroPointsDims[] = {{"num_experts", kInGateUpZeroPoints0}, {"2*intermediate", kInGateUpZeroPoints1}, {"(hidden//block_size*bits+7)//8", kInGateUpZeroPoints2}};
inline constexpr DimensionStep kInDownZeroPoints0[] = {{DimensionStep::kSymbol, 0}};
inline constexpr DimensionStep kInDownZeroPoints1[] = {{DimensionStep::kSymbol, 11}};
inline constexpr DimensionStep kInDownZeroPoints2[] = {{DimensionStep::kSymbol, 1}, {DimensionStep::kSymbol, 7}, {DimensionStep::kDivide, 0}, {DimensionStep::kSymbol, 6}, {DimensionStep::kMultiply, 0}, {DimensionStep::kConstant, 7}, {DimensionStep::kAdd, 0}, {DimensionStep::kConstant, 8}, {DimensionStep::kDivide, 0}};
inline constexpr DimensionSpec kInDownZeroPointsDims[] = {{"num_experts", kInDownZeroPoints0}, {"hidden", kInDownZeroPoints1}, {"(intermediate//block_size*bits+7)//8", kInDownZeroPoints2}};
inline constexpr PortSpec kInputs[] = {
    {"hidden_states", PortType::kT, false, kInHiddenStatesDims},
    {"router_weight", PortType::kT, false, kInRouterWeightDims},
    {"router_bias", PortType::kFloat32, false, kInRouterBiasDims},
    {"gate_up_levels", PortType::kUint8, false, kInGateUpLevelsDims},
    {"gate_up_scales", PortType::kFloat32, false, kInGateUpScalesDims},
    {"down_levels", PortType::kUint8, false, kInDownLevelsDims},
    {"down_scales", PortType::kFloat32, false, kInDownScalesDims},
    {"gate_up_zero_points", PortType::kUint8, true, kInGateUpZeroPointsDims},
    {"down_zero_points", PortType::kUint8, true, kInDownZeroPointsDims}};
inline constexpr DimensionStep kOutOutput0[] = {{DimensionStep::kSymbol, 9}};
inline constexpr DimensionStep kOutOutput1[] = {{DimensionStep::kSymbol, 10}};
inline constexpr DimensionStep kOutOutput2[] = {{DimensionStep::kSymbol, 11}};
inline constexpr DimensionSpec kOutOutputDims[] = {{"batch", kOutOutput0}, {"sequence", kOutOutput1}, {"hidden", kOutOutput2}};
inline constexpr PortSpec kOutputs[] = {
    {"output", PortType::kT, false, kOutOutputDims}};
inline constexpr const char* kChoicesOfActivations[] = {"float32", "int8"};
inline constexpr FieldSpec kFields[] = {
    {"num_experts", FieldType::kInt, 0, true, 0, 0.0f, {}},
    {"intermediate", FieldType::kInt, 1, true, 0, 0.0f, {}},
    {"top_k", FieldType::kInt, 2, true, 0, 0.0f, {}},
    {"n_group", FieldType::kInt, 3, true, 0, 0.0f, {}},
    {"topk_group", FieldType::kInt, 4, true, 0, 0.0f, {}},
    {"renormalize", FieldType::kInt, 5, true, 0, 0.0f, {}},
    {"routed_scaling_factor", FieldType::kFloat, -1, true, 0, 0.0f, {}},
    {"bits", FieldType::kInt, 6, true, 0, 0.0f, {}},
    {"block_size", FieldType::kInt, 7, true, 0, 0.0f, {}},
    {"symmetric", FieldType::kInt, 8, true, 0, 0.0f, {}},
    {"activations", FieldType::kString, -1, true, 0, 0.0f, kChoicesOfActivations},
    {"abi", FieldType::kString, -1, true, 0, 0.0f, {}}};
inline constexpr int kAliases[] = {-1};
inline constexpr OpSpec kSpec = {"QuantizedMixtureOfExperts", "kimi", "1",
    "0e10a6dfa8abd862", kInputs, kOutputs, kFields, kSymbols, kAliases, 11, -1, -1};

}  // namespace quantized_mixture_of_experts

inline constexpr const OpSpec* kOps[] = {&kimi_delta_attention::kSpec, &latent_attention::kSpec, &mixture_of_experts::kSpec, &quantized_mixture_of_experts::kSpec};

}  // namespace kimi
