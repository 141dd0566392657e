"""The interchangeable function bodies of the ops: which flavours exist and what their functions import."""

from __future__ import annotations

from typing import Literal, get_args

from kimi_deploy.errors import UsageError

Flavour = Literal["ort", "onnx", "primitive"]
"""`ort`: ONNX Runtime's fused kernels (domain com.microsoft), each with a standard body beside it for every other
runtime. `onnx`: standard operators of opset 27, its linear-attention operators included. `primitive`: standard
operators that every runtime and TensorRT's parser know, no linear-attention operator at all."""
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)

ONNX_OPSET = 27
"""Opset of every body, and the one a model that carries them must import."""
MICROSOFT_DOMAIN = "com.microsoft"
MICROSOFT_OPSET = 1
INT8_ACTIVATIONS, FLOAT32_ACTIVATIONS = 4, 1
"""Values of `accuracy_level` in ONNX Runtime's quantised kernels."""


def check_flavour(flavour: str) -> Flavour:
    """The flavour of that name; UsageError names those that exist."""
    for known in FLAVOURS:
        if flavour == known:
            return known
    raise UsageError("there is no such body flavour", seen=repr(flavour), expected=f"one of {FLAVOURS}")
