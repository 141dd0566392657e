"""KimiDeltaAttention on CUDA tensors: the Triton kernels, or the reference where they do not apply."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from kimi_deploy.errors import BackendError, install_line
from kimi_deploy.ops.kimi_delta_attention.reference import kimi_delta_attention as reference

MAX_HEAD_DIM = 256
"""Largest head that the kernels take: a whole state stays in the registers of one thread block."""


def kimi_delta_attention(*tensors: torch.Tensor | None, **attributes: Any) -> tuple[torch.Tensor, ...]:
    """The op; ports and attributes as in `spec.SPEC`.

    float64 and heads that the kernels do not take run the reference. Raises BackendError without Triton: the
    reference would be right, and hundreds of times slower than what a GPU is used for.
    """
    first, head_dim = tensors[0], attributes["head_dim"]
    assert first is not None
    if first.dtype == torch.float64 or head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return reference(*tensors, **attributes)  # type: ignore[arg-type]
    if importlib.util.find_spec("triton") is None:
        raise BackendError(
            "KimiDeltaAttention on CUDA tensors needs Triton, which is not installed",
            seen=f"tensors on {first.device}",
            expected="the triton package",
            fix=f"{install_line('triton')}, or run the model on the CPU",
        )
    from kimi_deploy.ops.kimi_delta_attention.triton.launch import kimi_delta_attention as kernels

    return kernels(*tensors, **attributes)  # type: ignore[arg-type]
