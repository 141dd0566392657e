// Written by `python -m kimi_deploy.ops.cpp_header`; do not edit. A test keeps it current.
// clang-format off
#pragma once

#include "../tensorrt/op_spec.h"

namespace kimi {

inline constexpr int64_t kWorkspaceBlock = 256;  // bytes

namespace kimi_delta_attention {

enum Input { kInputQkv, kInputDecay, kInputBeta, kInputOutputGate, kInputConvWeight, kInputALog, kInputDtBias, kInputNormWeight, kInputPastConvState, kInputPastRecurrentState, kInputSequenceLengths };
enum Output { kOutputOutput, kOutputPresentConvState, kOutputPresentRecurrentState };
enum Field { kFieldNumHeads, kFieldHeadDim, kFieldNormEps, kFieldScale, kFieldGate, kFieldGateLowerBound, kFieldAbi, kFieldInPlaceState, kFieldWorkspaceBlocks };
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
    {"abi", FieldType::kString, -1, true, 0, 0.0f, {}},
    {"in_place_state", FieldType::kInt, -1, false, 0, 0.0f, {}},
    {"workspace_blocks", FieldType::kInt, -1, false, -1, 0.0f, {}}};
inline constexpr int kAliases[] = {-1, 8, 9};
inline constexpr OpSpec kSpec = {"KimiDeltaAttention", "kimi", "1",
    "03343c75e980d2e7", kInputs, kOutputs, kFields, kSymbols, kAliases, 6, 7, 8};

}  // namespace kimi_delta_attention

namespace mixture_of_experts {

enum Input { kInputHiddenStates, kInputRouterWeight, kInputRouterBias, kInputGateUpWeight, kInputDownWeight };
enum Output { kOutputOutput };
enum Field { kFieldNumExperts, kFieldIntermediate, kFieldTopK, kFieldNGroup, kFieldTopkGroup, kFieldRenormalize, kFieldRoutedScalingFactor, kFieldAbi, kFieldWorkspaceBlocks };
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
    {"abi", FieldType::kString, -1, true, 0, 0.0f, {}},
    {"workspace_blocks", FieldType::kInt, -1, false, -1, 0.0f, {}}};
inline constexpr int kAliases[] = {-1};
inline constexpr OpSpec kSpec = {"MixtureOfExperts", "kimi", "1",
    "d94cad42e62d7e89", kInputs, kOutputs, kFields, kSymbols, kAliases, 7, -1, 8};

}  // namespace mixture_of_experts

namespace linear_attention {

enum Input { kInputQuery, kInputKey, kInputValue, kInputPastState, kInputDecay, kInputBeta };
enum Output { kOutputOutput, kOutputPresentState };
enum Field { kFieldQNumHeads, kFieldKvNumHeads, kFieldUpdateRule, kFieldScale, kFieldChunkSize, kFieldWorkspaceBlocks };
enum Symbol { kSymbolQNumHeads, kSymbolKvNumHeads, kSymbolChunkSize, kSymbolBatch, kSymbolSequence, kSymbolQuerySize, kSymbolKeySize, kSymbolValueSize, kSymbolDecaySize, kSymbolBetaSize };
enum class UpdateRule { kLinear, kGated, kDelta, kGatedDelta };

inline constexpr const char* kSymbols[] = {"q_num_heads", "kv_num_heads", "chunk_size", "batch", "sequence", "query_size", "key_size", "value_size", "decay_size", "beta_size"};
inline constexpr DimensionStep kInQuery0[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionStep kInQuery1[] = {{DimensionStep::kSymbol, 4}};
inline constexpr DimensionStep kInQuery2[] = {{DimensionStep::kSymbol, 5}};
inline constexpr DimensionSpec kInQueryDims[] = {{"batch", kInQuery0}, {"sequence", kInQuery1}, {"query_size", kInQuery2}};
inline constexpr DimensionStep kInKey0[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionStep kInKey1[] = {{DimensionStep::kSymbol, 4}};
inline constexpr DimensionStep kInKey2[] = {{DimensionStep::kSymbol, 6}};
inline constexpr DimensionSpec kInKeyDims[] = {{"batch", kInKey0}, {"sequence", kInKey1}, {"key_size", kInKey2}};
inline constexpr DimensionStep kInValue0[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionStep kInValue1[] = {{DimensionStep::kSymbol, 4}};
inline constexpr DimensionStep kInValue2[] = {{DimensionStep::kSymbol, 7}};
inline constexpr DimensionSpec kInValueDims[] = {{"batch", kInValue0}, {"sequence", kInValue1}, {"value_size", kInValue2}};
inline constexpr DimensionStep kInPastState0[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionStep kInPastState1[] = {{DimensionStep::kSymbol, 1}};
inline constexpr DimensionStep kInPastState2[] = {{DimensionStep::kSymbol, 5}, {DimensionStep::kSymbol, 0}, {DimensionStep::kDivide, 0}};
inline constexpr DimensionStep kInPastState3[] = {{DimensionStep::kSymbol, 7}, {DimensionStep::kSymbol, 1}, {DimensionStep::kDivide, 0}};
inline constexpr DimensionSpec kInPastStateDims[] = {{"batch", kInPastState0}, {"kv_num_heads", kInPastState1}, {"query_size//q_num_heads", kInPastState2}, {"value_size//kv_num_heads", kInPastState3}};
inline constexpr DimensionStep kInDecay0[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionStep kInDecay1[] = {{DimensionStep::kSymbol, 4}};
inline constexpr DimensionStep kInDecay2[] = {{DimensionStep::kSymbol, 8}};
inline constexpr DimensionSpec kInDecayDims[] = {{"batch", kInDecay0}, {"sequence", kInDecay1}, {"decay_size", kInDecay2}};
inline constexpr DimensionStep kInBeta0[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionStep kInBeta1[] = {{DimensionStep::kSymbol, 4}};
inline constexpr DimensionStep kInBeta2[] = {{DimensionStep::kSymbol, 9}};
inline constexpr DimensionSpec kInBetaDims[] = {{"batch", kInBeta0}, {"sequence", kInBeta1}, {"beta_size", kInBeta2}};
inline constexpr PortSpec kInputs[] = {
    {"query", PortType::kT, false, kInQueryDims},
    {"key", PortType::kT, false, kInKeyDims},
    {"value", PortType::kT, false, kInValueDims},
    {"past_state", PortType::kS, true, kInPastStateDims},
    {"decay", PortType::kT, true, kInDecayDims},
    {"beta", PortType::kT, true, kInBetaDims}};
inline constexpr DimensionStep kOutOutput0[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionStep kOutOutput1[] = {{DimensionStep::kSymbol, 4}};
inline constexpr DimensionStep kOutOutput2[] = {{DimensionStep::kSymbol, 0}, {DimensionStep::kSymbol, 1}, {DimensionStep::kMax, 0}, {DimensionStep::kSymbol, 7}, {DimensionStep::kSymbol, 1}, {DimensionStep::kDivide, 0}, {DimensionStep::kMultiply, 0}};
inline constexpr DimensionSpec kOutOutputDims[] = {{"batch", kOutOutput0}, {"sequence", kOutOutput1}, {"max(q_num_heads, kv_num_heads)*(value_size//kv_num_heads)", kOutOutput2}};
inline constexpr DimensionStep kOutPresentState0[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionStep kOutPresentState1[] = {{DimensionStep::kSymbol, 1}};
inline constexpr DimensionStep kOutPresentState2[] = {{DimensionStep::kSymbol, 5}, {DimensionStep::kSymbol, 0}, {DimensionStep::kDivide, 0}};
inline constexpr DimensionStep kOutPresentState3[] = {{DimensionStep::kSymbol, 7}, {DimensionStep::kSymbol, 1}, {DimensionStep::kDivide, 0}};
inline constexpr DimensionSpec kOutPresentStateDims[] = {{"batch", kOutPresentState0}, {"kv_num_heads", kOutPresentState1}, {"query_size//q_num_heads", kOutPresentState2}, {"value_size//kv_num_heads", kOutPresentState3}};
inline constexpr PortSpec kOutputs[] = {
    {"output", PortType::kT, false, kOutOutputDims},
    {"present_state", PortType::kS, false, kOutPresentStateDims}};
inline constexpr const char* kChoicesOfUpdateRule[] = {"linear", "gated", "delta", "gated_delta"};
inline constexpr FieldSpec kFields[] = {
    {"q_num_heads", FieldType::kInt, 0, true, 0, 0.0f, {}},
    {"kv_num_heads", FieldType::kInt, 1, true, 0, 0.0f, {}},
    {"update_rule", FieldType::kString, -1, false, 3, 0.0f, kChoicesOfUpdateRule},
    {"scale", FieldType::kFloat, -1, false, 0, 0.0f, {}},
    {"chunk_size", FieldType::kInt, 2, false, 64, 0.0f, {}},
    {"workspace_blocks", FieldType::kInt, -1, false, -1, 0.0f, {}}};
inline constexpr int kAliases[] = {-1, -1};
inline constexpr OpSpec kSpec = {"LinearAttention", "", "1",
    nullptr, kInputs, kOutputs, kFields, kSymbols, kAliases, -1, -1, 5};

}  // namespace linear_attention

namespace causal_conv_with_state {

enum Input { kInputInput, kInputWeight, kInputBias, kInputPastState };
enum Output { kOutputOutput, kOutputPresentState };
enum Field { kFieldNdim, kFieldActivation, kFieldWorkspaceBlocks };
enum Symbol { kSymbolNdim, kSymbolBatch, kSymbolChannels, kSymbolLength, kSymbolKernelSize };
enum class Activation { kNone, kSilu, kSwish };

inline constexpr const char* kSymbols[] = {"ndim", "batch", "channels", "length", "kernel_size"};
inline constexpr DimensionStep kInInput0[] = {{DimensionStep::kSymbol, 1}};
inline constexpr DimensionStep kInInput1[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kInInput2[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionSpec kInInputDims[] = {{"batch", kInInput0}, {"channels", kInInput1}, {"length", kInInput2}};
inline constexpr DimensionStep kInWeight0[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kInWeight1[] = {{DimensionStep::kConstant, 1}};
inline constexpr DimensionStep kInWeight2[] = {{DimensionStep::kSymbol, 4}};
inline constexpr DimensionSpec kInWeightDims[] = {{"channels", kInWeight0}, {"1", kInWeight1}, {"kernel_size", kInWeight2}};
inline constexpr DimensionStep kInBias0[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionSpec kInBiasDims[] = {{"channels", kInBias0}};
inline constexpr DimensionStep kInPastState0[] = {{DimensionStep::kSymbol, 1}};
inline constexpr DimensionStep kInPastState1[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kInPastState2[] = {{DimensionStep::kSymbol, 4}, {DimensionStep::kConstant, 1}, {DimensionStep::kSubtract, 0}};
inline constexpr DimensionSpec kInPastStateDims[] = {{"batch", kInPastState0}, {"channels", kInPastState1}, {"kernel_size-1", kInPastState2}};
inline constexpr PortSpec kInputs[] = {
    {"input", PortType::kT, false, kInInputDims},
    {"weight", PortType::kT, false, kInWeightDims},
    {"bias", PortType::kT, true, kInBiasDims},
    {"past_state", PortType::kT, true, kInPastStateDims}};
inline constexpr DimensionStep kOutOutput0[] = {{DimensionStep::kSymbol, 1}};
inline constexpr DimensionStep kOutOutput1[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kOutOutput2[] = {{DimensionStep::kSymbol, 3}};
inline constexpr DimensionSpec kOutOutputDims[] = {{"batch", kOutOutput0}, {"channels", kOutOutput1}, {"length", kOutOutput2}};
inline constexpr DimensionStep kOutPresentState0[] = {{DimensionStep::kSymbol, 1}};
inline constexpr DimensionStep kOutPresentState1[] = {{DimensionStep::kSymbol, 2}};
inline constexpr DimensionStep kOutPresentState2[] = {{DimensionStep::kSymbol, 4}, {DimensionStep::kConstant, 1}, {DimensionStep::kSubtract, 0}};
inline constexpr DimensionSpec kOutPresentStateDims[] = {{"batch", kOutPresentState0}, {"channels", kOutPresentState1}, {"kernel_size-1", kOutPresentState2}};
inline constexpr PortSpec kOutputs[] = {
    {"output", PortType::kT, false, kOutOutputDims},
    {"present_state", PortType::kT, false, kOutPresentStateDims}};
inline constexpr const char* kChoicesOfActivation[] = {"none", "silu", "swish"};
inline constexpr FieldSpec kFields[] = {
    {"ndim", FieldType::kInt, 0, false, 1, 0.0f, {}},
    {"activation", FieldType::kString, -1, false, 0, 0.0f, kChoicesOfActivation},
    {"workspace_blocks", FieldType::kInt, -1, false, -1, 0.0f, {}}};
inline constexpr int kAliases[] = {-1, -1};
inline constexpr OpSpec kSpec = {"CausalConvWithState", "", "1",
    nullptr, kInputs, kOutputs, kFields, kSymbols, kAliases, -1, -1, 2};

}  // namespace causal_conv_with_state

inline constexpr const OpSpec* kOps[] = {&kimi_delta_attention::kSpec, &mixture_of_experts::kSpec, &linear_attention::kSpec, &causal_conv_with_state::kSpec};

}  // namespace kimi
