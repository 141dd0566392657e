"""Running a kernel on host arrays, wherever the kernel runs, between guards that nothing may touch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kimi_deploy.kernels.kda import KdaKernels
from kimi_deploy.ops.spec import AttributeValue

GUARD = 256
PATTERN = 0xA5
STATES = ("conv_state", "recurrent_state")


@dataclass(frozen=True)
class EmulatedDevice:
    """Host memory. `seed` shuffles the threads."""

    kernels: KdaKernels
    name = "emulated"

    def set_seed(self, seed: int) -> None:
        self.kernels.library.set_seed(seed)

    def buffer(self, size: int):
        # 64-byte alignment, as from a device allocator
        raw = np.full(size + 2 * GUARD + 64, PATTERN, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + size + 2 * GUARD]

    def upload(self, buffer, array: np.ndarray):
        view = buffer[GUARD : GUARD + array.nbytes].view(array.dtype).reshape(array.shape)
        view[...] = array
        return view

    def download(self, buffer, view, like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return view.copy(), buffer


@dataclass(frozen=True)
class CudaDevice:
    """Device memory, through torch."""

    kernels: KdaKernels
    name = "cuda"

    def set_seed(self, seed: int) -> None:
        """The GPU orders its threads itself."""

    def buffer(self, size: int):
        import torch

        return torch.full((size + 2 * GUARD,), PATTERN, dtype=torch.uint8, device="cuda")

    def upload(self, buffer, array: np.ndarray):
        import torch

        bytes_ = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy())
        part = buffer[GUARD : GUARD + array.nbytes]
        part.copy_(bytes_)
        return part.view(getattr(torch, str(array.dtype))).reshape(array.shape)

    def download(self, buffer, view, like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raw = buffer.cpu().numpy()
        return raw[GUARD : GUARD + like.nbytes].copy().view(like.dtype).reshape(like.shape), raw


Device = EmulatedDevice | CudaDevice


def run_kernel(
    device: Device,
    mode: str,
    arrays: Mapping[str, np.ndarray],
    attributes: Mapping[str, AttributeValue],
    *,
    in_place: bool = False,
    snapshots: int | None = None,
    value_splits: int = 0,
) -> dict[str, np.ndarray]:
    """Runs decode or prefill of KDA on the op's input `arrays` (and cu_seqlens, slots). Returns the outputs by name.

    Outputs, snapshots and workspace start as NaN; with `in_place` the present states are the past ones. Asserts that
    nothing outside an array and no input was written.
    """
    outputs = {"output": np.full(arrays["decay"].shape, np.nan, arrays["qkv"].dtype)}
    for state in STATES:
        past = arrays[f"past_{state}"]
        outputs[f"present_{state}"] = np.full(past.shape, np.nan, past.dtype)
    if snapshots is not None:
        outputs["state_snapshots"] = np.full((snapshots, *arrays["past_recurrent_state"].shape[1:]), np.nan, np.float32)
    aliases = {f"present_{state}": f"past_{state}" for state in STATES} if in_place else {}
    if mode == "decode":
        return run_guarded(device, lambda v, _: device.kernels.decode(v, attributes), arrays, outputs, aliases)

    def prefill(views, workspace):
        device.kernels.prefill(views, attributes, workspace=workspace, value_splits=value_splits)

    def workspace_size(views):
        return device.kernels.workspace_size(views, attributes)

    return run_guarded(device, prefill, arrays, outputs, aliases, workspace_size)


def run_guarded(
    device: Device,
    call: Callable[[dict[str, Any], Any], None],
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    aliases: Mapping[str, str],
    workspace_size: Callable[[dict[str, Any]], int] = lambda views: 0,
) -> dict[str, np.ndarray]:
    """`call(views, workspace)` on device memory, between guards. Returns the outputs by name.

    `outputs`: what they hold before the call; those in `aliases` (output to input) are their inputs instead. The
    workspace starts as NaN. Asserts that nothing outside an array and no other input was written.
    """
    before = {name: a for name, a in inputs.items() if name not in aliases.values()}
    before |= {name: inputs[aliases[name]] if name in aliases else a for name, a in outputs.items()}
    buffers = {name: device.buffer(a.nbytes) for name, a in before.items()}
    views = {name: device.upload(buffers[name], a) for name, a in before.items()}
    views |= {past: views[present] for present, past in aliases.items()}
    poison = np.full(workspace_size(views), 0xFF, np.uint8)
    buffers["workspace"] = device.buffer(poison.nbytes)
    workspace = device.upload(buffers["workspace"], poison)
    call(views, workspace)
    results = {}
    for name, buffer in buffers.items():
        like = poison if name == "workspace" else before[name]
        content, raw = device.download(buffer, workspace if name == "workspace" else views[name], like)
        guards = np.concatenate([raw[:GUARD], raw[GUARD + like.nbytes :]])
        assert (guards == PATTERN).all(), f"{name}: written outside the array"
        if name in outputs:
            results[name] = content
        elif name != "workspace":
            assert content.tobytes() == like.tobytes(), f"{name}: an input was written"
    return results
