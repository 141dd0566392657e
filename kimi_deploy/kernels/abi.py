"""Mirror of the headers `plugins/kernels/kimi_*.h`: the argument structs, codes and prototypes, as ctypes sees them."""

from __future__ import annotations

import ctypes

ABI_VERSION = 1

STATUS = {
    0: "ok",
    1: "abi",
    2: "argument",
    3: "shape",
    4: "dtype",
    5: "workspace",
    6: "launch",
}
DATA_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
GATES = {"softplus": 0, "bounded": 1}
UPDATE_RULES = {"linear": 0, "gated": 1, "delta": 2, "gated_delta": 3}
ACTIVATIONS = {"none": 0, "silu": 1, "swish": 1}

POINTERS = (
    "qkv",
    "decay",
    "beta",
    "output_gate",
    "conv_weight",
    "A_log",
    "dt_bias",
    "norm_weight",
    "past_conv_state",
    "past_recurrent_state",
    "sequence_lengths",
    "cu_seqlens",
    "slots",
    "output",
    "present_conv_state",
    "present_recurrent_state",
    "state_snapshots",
    "workspace",
)


class KdaArguments(ctypes.Structure):
    """KimiKdaArguments; the header says what each field means."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("data_type", ctypes.c_int32),
        ("state_type", ctypes.c_int32),
        ("gate", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("sequence", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("conv_width", ctypes.c_int32),
        ("num_slots", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("gate_lower_bound", ctypes.c_float),
        ("value_splits", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("workspace_size", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
    )


class LinearAttentionArguments(ctypes.Structure):
    """KimiLinearAttentionArguments; kimi_linear_attention.h says what each field means."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("data_type", ctypes.c_int32),
        ("state_type", ctypes.c_int32),
        ("update_rule", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("sequence", ctypes.c_int32),
        ("q_num_heads", ctypes.c_int32),
        ("kv_num_heads", ctypes.c_int32),
        ("key_num_heads", ctypes.c_int32),
        ("key_dim", ctypes.c_int32),
        ("value_dim", ctypes.c_int32),
        ("decay_per_key", ctypes.c_int32),
        ("beta_num_heads", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("past_state", ctypes.c_void_p),
        ("decay", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("present_state", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
    )


class CausalConvArguments(ctypes.Structure):
    """KimiCausalConvArguments; kimi_causal_conv.h says what each field means."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("data_type", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("sequence", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("input", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("past_state", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("present_state", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    )


class MoeArguments(ctypes.Structure):
    """KimiMoeArguments; kimi_moe.h says what each field means."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("data_type", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("num_experts", ctypes.c_int32),
        ("intermediate", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("n_group", ctypes.c_int32),
        ("topk_group", ctypes.c_int32),
        ("renormalize", ctypes.c_int32),
        ("routed_scaling_factor", ctypes.c_float),
        ("hidden_states", ctypes.c_void_p),
        ("router_weight", ctypes.c_void_p),
        ("router_bias", ctypes.c_void_p),
        ("gate_up_weight", ctypes.c_void_p),
        ("down_weight", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
    )


def declare(library: ctypes.CDLL) -> None:
    """Sets the prototypes of the header's functions on a loaded library. AttributeError if one is missing."""
    arguments, linear_attention = ctypes.POINTER(KdaArguments), ctypes.POINTER(LinearAttentionArguments)
    moe = ctypes.POINTER(MoeArguments)
    for name, result, parameters in (
        ("kimi_abi_version", ctypes.c_uint32, ()),
        ("kimi_backend", ctypes.c_char_p, ()),
        ("kimi_last_error", ctypes.c_char_p, ()),
        ("kimi_kda_decode", ctypes.c_int32, (arguments,)),
        ("kimi_kda_prefill_workspace", ctypes.c_int32, (arguments, ctypes.POINTER(ctypes.c_size_t))),
        ("kimi_kda_prefill", ctypes.c_int32, (arguments,)),
        ("kimi_kda_workspace", ctypes.c_int32, (arguments, ctypes.POINTER(ctypes.c_size_t))),
        ("kimi_kda", ctypes.c_int32, (arguments,)),
        ("kimi_linear_attention_workspace", ctypes.c_int32, (linear_attention, ctypes.POINTER(ctypes.c_size_t))),
        ("kimi_linear_attention", ctypes.c_int32, (linear_attention,)),
        ("kimi_moe_workspace", ctypes.c_int32, (moe, ctypes.POINTER(ctypes.c_size_t))),
        ("kimi_moe", ctypes.c_int32, (moe,)),
        ("kimi_causal_conv", ctypes.c_int32, (ctypes.POINTER(CausalConvArguments),)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, parameters
