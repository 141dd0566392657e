"""What a build needs, checked before it starts: a GPU, options that the TensorRT has, disk, memory."""

from __future__ import annotations

import shutil
from pathlib import Path

from kimi_deploy.cuda_driver import gpu_devices
from kimi_deploy.engine.backend import Backend, TensorRT
from kimi_deploy.engine.recipe import AMPERE, EngineRecipe, parse_capability
from kimi_deploy.errors import BackendError, EngineError, UsageError
from kimi_deploy.memory import machine_memory

# kernels that a plan holds per custom op that is not a plugin, in source form: 3 to 6 MB for two profiles, rounded up
CODE_BYTES = 8 << 20
# peak of a build over its weights, measured from 0.25 to 3.4 GB of weights: 4 to 5, falling
PEAK_OVER_WEIGHTS = 4
# the process itself, with TensorRT loaded
BASE_BYTES = 300 << 20


def check_machine(backend: Backend) -> None:
    """Raise BackendError where the full TensorRT has no GPU."""
    if backend.name == "tensorrt" and not gpu_devices():
        raise BackendError(
            "the full TensorRT builds only on a machine with a GPU",
            seen="no CUDA device",
            fix="use --backend tensorrt-rtx, which builds on any machine",
        )


def check_options(tensorrt: TensorRT, recipe: EngineRecipe, *, here: bool = True) -> None:
    """Raise EngineError for an option that this TensorRT does not have, or, for a build `here`, not on this machine."""
    rtx, gpus = tensorrt == "tensorrt-rtx", len(gpu_devices())
    compiles = "TensorRT compiles kernels of weights that may change on a GPU"
    elsewhere, gpu = "build with the full TensorRT", "build on a machine with a GPU"
    for option, asked, possible, why, instead in (
        ("version_compatible", recipe.version_compatible, not rtx, "TensorRT-RTX ships no lean runtime", elsewhere),
        (
            "hardware_compatibility",
            recipe.hardware_compatibility != "none",
            not rtx,
            "it has a list of GPUs",
            elsewhere,
        ),
        ("timing_cache", recipe.timing_cache, not rtx, "TensorRT-RTX times no kernels", elsewhere),
        ("refit", recipe.refit, gpus or not here, compiles, gpu),
        ("strip_weights", recipe.strip_weights, gpus or not here, compiles, gpu),
    ):
        if asked and not possible:
            raise EngineError(
                f"{option} is not possible here: {why}",
                seen=f"{tensorrt}, GPUs: {gpus}",
                fix=f"leave {option} out, or {instead}",
            )


def check_target(capabilities: tuple[str, ...], *, bfloat16: bool, kernels: bool) -> None:
    """Raise UsageError for a GPU that lacks bfloat16 where the graph has it, or that the plugins' kernels are not for.

    `capabilities` are those to build for; empty where the full TensorRT builds for the GPU of this machine.
    """
    for capability in capabilities or tuple(d.capability for d in gpu_devices()[:1]):
        if parse_capability(capability) >= AMPERE:
            continue
        if bfloat16:
            raise UsageError(
                f"compute capability {capability} has no bfloat16",
                seen="a bfloat16 graph",
                expected="8.0 or higher",
                fix="export again with --dtype float16",
            )
        if kernels:
            raise UsageError(
                f"the plugins' kernels do not run on compute capability {capability}",
                expected="8.0 or higher",
                fix="build an export with --plugin none; another exporter's graph needs them",
            )


def unusable_here(backend: Backend, capabilities: tuple[str, ...]) -> str:
    """A sentence about this machine's GPU when the engine will not run on it, else an empty string."""
    devices = gpu_devices()
    if not devices or not capabilities or any(d.capability in capabilities for d in devices):
        return ""
    device = devices[0]
    if device.capability in backend.offered_capabilities:
        return f"this machine's {device.name} is not among them: add --capability {device.capability}"
    return (
        f"this machine's {device.name} ({device.capability}) runs no TensorRT-RTX engine: use --backend tensorrt, "
        "or ONNX Runtime"
    )


def check_room(target: Path, weights: int, custom_nodes: int, plans: int) -> None:
    """Raise EngineError when disk or memory cannot hold the build.

    `weights` are bytes, `custom_nodes` how many custom ops have no plugin, `plans` how many plans hold all weights.
    """
    plan = weights + custom_nodes * CODE_BYTES
    free = shutil.disk_usage(target).free
    if free < plan * plans:
        raise EngineError(
            "not enough disk space for the engine",
            seen=f"{free / 1e9:.2f} GB free in {target.parent}",
            expected=f"{plan * plans / 1e9:.2f} GB",
            fix="free some space, or give -o on another disk",
        )
    memory, peak = machine_memory(), BASE_BYTES + PEAK_OVER_WEIGHTS * weights + 2 * custom_nodes * CODE_BYTES
    if memory < peak:
        raise EngineError(
            "not enough memory to build the engine",
            seen=f"{memory / 1e9:.1f} GB, swap included",
            expected=f"{peak / 1e9:.1f} GB: {PEAK_OVER_WEIGHTS} times the weights, as measured",
            fix="build on a larger machine with the same versions, or add swap; TensorRT-RTX needs no GPU there",
        )
