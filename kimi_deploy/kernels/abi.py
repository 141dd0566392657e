"""Mirror of `plugins/kernels/kimi_kernels.h`: the argument struct, codes and prototypes, as ctypes sees them."""

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


def declare(library: ctypes.CDLL) -> None:
    """Sets the prototypes of the header's functions on a loaded library. AttributeError if one is missing."""
    arguments = ctypes.POINTER(KdaArguments)
    for name, result, parameters in (
        ("kimi_abi_version", ctypes.c_uint32, ()),
        ("kimi_backend", ctypes.c_char_p, ()),
        ("kimi_last_error", ctypes.c_char_p, ()),
        ("kimi_kda_decode", ctypes.c_int32, (arguments,)),
        ("kimi_kda_prefill_workspace", ctypes.c_int32, (arguments, ctypes.POINTER(ctypes.c_size_t))),
        ("kimi_kda_prefill", ctypes.c_int32, (arguments,)),
        ("kimi_kda_workspace", ctypes.c_int32, (arguments, ctypes.POINTER(ctypes.c_size_t))),
        ("kimi_kda", ctypes.c_int32, (arguments,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, parameters
