"""Which implementation CUDA tensors reach, and what a machine without Triton says."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch

from kimi_deploy.errors import BackendError, ContractError, install_line
from kimi_deploy.ops.kimi_delta_attention import cuda
from kimi_deploy.ops.kimi_delta_attention.reference import kimi_delta_attention as reference
from tests.ops.torch_cases import kda_attributes, kda_inputs, same_bits
from tests.ops.triton_cases import DEVICES, kimi_delta_attention, prepared


def call(tensors: dict[str, torch.Tensor], attributes: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    return cuda.kimi_delta_attention(*tensors.values(), **attributes)


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    attributes = kda_attributes()
    tensors = kda_inputs(1, 3, attributes)
    with pytest.raises(BackendError, match=re.escape(install_line("triton"))):
        call(prepared(tensors, torch.float32), attributes)


@pytest.mark.parametrize(("head_dim", "dtype"), [(8, torch.float64), (264, torch.float32), (12, torch.float32)])
def test_what_the_kernels_do_not_take_runs_on_the_reference(head_dim: int, dtype: torch.dtype) -> None:
    attributes = kda_attributes(heads=1, head_dim=head_dim)
    tensors = kda_inputs(1, 2, attributes)
    tensors = tensors if dtype == torch.float64 else prepared(tensors, dtype)
    for a, e in zip(call(tensors, attributes), reference(**tensors, **attributes), strict=True):
        assert same_bits(a, e)


@pytest.mark.parametrize("device", DEVICES)
def test_all_else_runs_on_the_kernels(device: str) -> None:
    attributes = kda_attributes()
    tensors = {n: t.to(device) for n, t in prepared(kda_inputs(2, 3, attributes), torch.bfloat16).items()}
    expected = kimi_delta_attention(**tensors, **attributes)
    for a, e in zip(call(tensors, attributes), expected, strict=True):
        assert same_bits(a.cpu(), e.cpu())


@pytest.mark.parametrize("device", DEVICES)
def test_a_head_too_large_or_a_state_with_gaps_is_refused(device: str) -> None:
    attributes = kda_attributes()
    tensors = {n: t.to(device) for n, t in prepared(kda_inputs(1, 3, attributes), torch.float32).items()}
    with pytest.raises(ContractError, match="head size"):
        kimi_delta_attention(**tensors, **(attributes | {"head_dim": 264}))
    state = tensors["past_recurrent_state"].transpose(2, 3)
    with pytest.raises(ContractError, match="not contiguous"):
        kimi_delta_attention(**tensors, **attributes, present_recurrent_state=state)
