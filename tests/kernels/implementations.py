"""Every implementation of the op behind one call, so that one list of cases serves all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from kimi_deploy.ops.kimi_delta_attention.reference import kimi_delta_attention as reference
from kimi_deploy.ops.spec import AttributeValue

from ..ops.triton_cases import DECODE_STEPS
from ..ops.triton_cases import kimi_delta_attention as triton
from .cases import Arrays
from .device import Device, run_kernel

OUTPUTS = ("output", "present_conv_state", "present_recurrent_state")
SLOW = ("slow", "correlated", "repeated")


@dataclass(frozen=True)
class Implementation:
    """`dtypes` are those it takes. Subclasses run it and say how accurate it must be."""

    name: str
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    in_place = True
    """Whether present states may be given as the past ones."""

    def run(self, arrays: Arrays, attributes: Mapping[str, AttributeValue], *, in_place: bool = False) -> Arrays:
        """Outputs by name. Whatever it allocates starts as NaN; no input is written but states in place."""
        raise NotImplementedError

    def bounds(self, dtype: str, steps: int, distribution: str) -> tuple[str, str]:
        """Entries of tolerances.toml for output and recurrent state."""
        raise NotImplementedError


@dataclass(frozen=True)
class Reference(Implementation):
    form: str = "recurrent"
    in_place = False

    def run(self, arrays: Arrays, attributes: Mapping[str, AttributeValue], *, in_place: bool = False) -> Arrays:
        results = reference(**to_torch(arrays), **attributes, form=self.form)  # type: ignore[arg-type]
        return dict(zip(OUTPUTS, map(to_numpy, results), strict=True))

    def bounds(self, dtype: str, steps: int, distribution: str) -> tuple[str, str]:
        return "float32" if dtype == "float32" else f"op_{dtype}", "float32"


@dataclass(frozen=True)
class Triton(Implementation):
    """One call of the op's Triton form: decode up to DECODE_STEPS, else prefill."""

    device: str = "cpu"

    def run(self, arrays: Arrays, attributes: Mapping[str, AttributeValue], *, in_place: bool = False) -> Arrays:
        tensors = {name: x.to(self.device) for name, x in to_torch(arrays).items()}
        kept = {name: x.clone() for name, x in tensors.items()}
        given = {}
        if in_place:
            given = {f"present_{s}": tensors[f"past_{s}"] for s in ("conv_state", "recurrent_state")}
        # fills what is allocated with NaN
        torch.use_deterministic_algorithms(True)
        try:
            results = triton(**tensors, **attributes, **given)
        finally:
            torch.use_deterministic_algorithms(False)
        for name, x in tensors.items():
            if not (in_place and name.startswith("past_")):
                assert torch.equal(x.view(torch.uint8), kept[name].view(torch.uint8)), f"{name}: an input was written"
        return dict(zip(OUTPUTS, (to_numpy(x.cpu()) for x in results), strict=True))

    def bounds(self, dtype: str, steps: int, distribution: str) -> tuple[str, str]:
        if steps > DECODE_STEPS and dtype == "float32":
            return "float32", "float32"
        return kernel_bounds("decode" if steps <= DECODE_STEPS else "prefill", dtype, distribution)


@dataclass(frozen=True)
class Cuda(Implementation):
    """`mode` decode or prefill of the C ABI, emulated or on a GPU, between guards (`device.run_kernel`)."""

    device: Device | None = None
    mode: str = "prefill"

    def run(self, arrays: Arrays, attributes: Mapping[str, AttributeValue], *, in_place: bool = False) -> Arrays:
        assert self.device is not None
        return run_kernel(self.device, self.mode, arrays, attributes, in_place=in_place)

    def bounds(self, dtype: str, steps: int, distribution: str) -> tuple[str, str]:
        output, state = kernel_bounds(self.mode, dtype, distribution)
        if self.mode == "decode" and distribution == "repeated":
            state = "kda_decode_repeated_state"
        return output, state


def kernel_bounds(mode: str, dtype: str, distribution: str) -> tuple[str, str]:
    if mode == "prefill" and dtype == "bfloat16" and distribution in SLOW:
        dtype = "correlated"
    return f"kda_{mode}_{dtype}_output", f"kda_{mode}_{dtype}_state"


def to_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Copies; bfloat16 by its bits, since numpy has no type that torch knows."""

    def convert(a: np.ndarray) -> torch.Tensor:
        if a.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(np.ascontiguousarray(a).copy())

    return {name: convert(a) for name, a in arrays.items()}


def to_numpy(x: Any) -> np.ndarray:
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.contiguous().numpy()
