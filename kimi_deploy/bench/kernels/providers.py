"""What is measured: an implementation prepared on given inputs, and this project's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kimi_deploy.bench.kernels.cases import Case
from kimi_deploy.bench.kernels.inputs import Tensors, attributes_of, packed

Run = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""One call; returns output and recurrent state. The output is padded [batch, steps, channels] or packed [1, tokens,
channels], the state [batch, heads, key, value]."""


@dataclass(frozen=True)
class Provider:
    """An implementation. Scope `op` is all of KimiDeltaAttention, `core` leaves out convolution and gated norm.

    `refuses` says why a case cannot be run, or nothing; `prepare` does what is not timed. `compiles_per` are the fields
    of a case that ask for machine code of their own, where that is made at the first call.
    """

    name: str
    scope: Literal["op", "core"]
    refuses: Callable[[Case], str]
    prepare: Callable[[Case, Tensors], Run]
    graphed: bool = True
    peer: bool = False
    compiles_per: tuple[str, ...] = ()


def cuda_provider() -> Provider:
    """The CUDA kernels; ragged prefills are packed. Raises BackendError when the library is not built."""
    from kimi_deploy.kernels.kda import arguments_of
    from kimi_deploy.kernels.library import KernelLibrary

    library = KernelLibrary.open(kind="cuda")

    def prepare(case: Case, tensors: Tensors) -> Run:
        arrays = dict(tensors)
        if case.ragged and case.kind == "prefill":
            arrays, arrays["cu_seqlens"] = packed(case, tensors)
        arrays["output"] = torch.empty_like(arrays["decay"])
        for state in ("conv_state", "recurrent_state"):
            arrays[f"present_{state}"] = torch.empty_like(arrays[f"past_{state}"])
        arguments = arguments_of(arrays, attributes_of(case))
        call = library.decode
        if case.kind == "prefill":
            call = library.prefill
            arrays["workspace"] = torch.empty(
                library.prefill_workspace(arguments), dtype=torch.uint8, device=arrays["qkv"].device
            )
            arguments.workspace, arguments.workspace_size = arrays["workspace"].data_ptr(), arrays["workspace"].numel()

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            arguments.stream = torch.cuda.current_stream().cuda_stream
            call(arguments)
            return arrays["output"], arrays["present_recurrent_state"]

        return run

    return Provider("cuda", "op", lambda case: "", prepare)


def triton_provider() -> Provider:
    """The Triton kernels, on padded rows. ImportError without Triton."""
    from kimi_deploy.ops.kimi_delta_attention.triton.launch import kimi_delta_attention

    compiles_per = ("kind", "gate", "ragged")
    return Provider("triton", "op", lambda case: "", _on_ports(kimi_delta_attention), compiles_per=compiles_per)


def reference_provider() -> Provider:
    """The op in plain torch, float32 inside. Small cases only: it is there to give the others a scale."""
    from kimi_deploy.ops.kimi_delta_attention.reference import kimi_delta_attention

    def refuses(case: Case) -> str:
        return "" if case.batch * case.steps * case.heads <= 65536 else "too slow"

    return Provider("reference", "op", refuses, _on_ports(kimi_delta_attention), graphed=False)


def _on_ports(op: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[[Case, Tensors], Run]:
    def prepare(case: Case, tensors: Tensors) -> Run:
        attributes = attributes_of(case)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            output, _, state = op(**tensors, **attributes)
            return output, state

        return run

    return prepare
