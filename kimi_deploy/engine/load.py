"""Open an engine folder: everything that can be refused is refused before the plan's bytes are given to TensorRT."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_deploy.contract import GraphContract
from kimi_deploy.cuda_driver import gpu_devices
from kimi_deploy.engine.backend import Backend, TensorRT, choose, load
from kimi_deploy.engine.plugin_library import default_path
from kimi_deploy.engine.plugin_registry import register_plugins, registered_kind
from kimi_deploy.engine.recipe import AMPERE, parse_capability
from kimi_deploy.errors import BackendError, EngineError, ManifestError, UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.ops.plugins import PLUGIN_OPS
from kimi_deploy.runtime.trt_session import ProfileLimits, limits_of


@dataclass(frozen=True)
class Engine:
    """The deserialised plans of an engine folder: an ICudaEngine each, and what must live as long as they do."""

    manifest: Manifest
    backend: Backend
    runtime: Any
    plans: dict[str, Any]


def detail(manifest: Manifest, key: str, kind: type) -> Any:
    """A value of the manifest's details. Raises ManifestError when it is missing or of another type."""
    value = manifest.details.get(key)
    if not isinstance(value, kind):
        raise ManifestError(
            f"the engine's manifest has no usable {key!r}", seen=repr(value)[:200], fix="build the engine again"
        )
    return value


def contract_of(manifest: Manifest) -> GraphContract:
    """The graph's interface, as the engine keeps it."""
    return GraphContract.from_json(json.dumps(detail(manifest, "contract", dict)))


def recorded_profiles(manifest: Manifest) -> tuple[ProfileLimits, ...]:
    """The profiles that the engine was built with, from its manifest alone."""
    contract = contract_of(manifest)
    try:
        return tuple(
            limits_of(name, entry["index"], contract, entry["shapes"])
            for name, entry in detail(manifest, "profiles", dict).items()
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(
            "the engine's manifest does not say what its profiles hold", seen=str(error), fix="build the engine again"
        ) from error


def check_engine(folder: Path) -> tuple[Manifest, Backend]:
    """Check that the engine in `folder` can be opened by this installation, without reading its plans.

    Raises ManifestError for another kind of folder, a file that is missing or of another size, or another ABI of an
    op, BackendError when the TensorRT it was built with is not installed, EngineError when the one installed has
    another version or a plugin of the engine is not in this package.
    """
    manifest = Manifest.read(folder)
    manifest.check_kind("engine")
    manifest.check_op_abi()
    name: TensorRT = detail(manifest, "backend", str)
    if name not in ("tensorrt", "tensorrt-rtx"):
        raise ManifestError("the engine is of an unknown TensorRT", seen=repr(name), fix="build the engine again")
    unknown = sorted(set(detail(manifest, "plugins", dict)) - PLUGIN_OPS)
    if unknown:
        raise EngineError(
            "the engine has plugins that this package does not have",
            seen=str(unknown),
            expected=f"some of {sorted(PLUGIN_OPS)}",
            fix="use the version of kimi-deploy that built it, or build it again",
        )
    backend = load(choose(name))
    built_with = detail(manifest, "backend_version", str)
    later = bool(detail(manifest, "recipe", dict).get("version_compatible"))
    if built_with != backend.version and not (later and _numbers(built_with) < _numbers(backend.version)):
        raise EngineError(
            f"the engine was built with another version of {name}",
            seen=f"engine: {built_with}, installed: {backend.version}",
            expected="that version or a later one" if later else "the same version",
            fix=f"build the engine again, or pip install the {name} {built_with} packages",
        )
    manifest.verify(folder, hashes=False)
    return manifest, backend


def check_built_from(engine: Path, export: Path) -> None:
    """Raise UsageError unless the engine in one folder was built from the export in the other, of the same weights.

    Neither is read but for its manifest. Raises ManifestError where one is of another kind.
    """
    built, exported = Manifest.read(engine), Manifest.read(export)
    built.check_kind("engine")
    exported.check_kind("onnx")
    made_of = {"model.onnx": built.source.get("model.onnx"), "checkpoint": built.source["checkpoint"]}
    given = {"model.onnx": exported.files["model.onnx"]["sha256"], "checkpoint": exported.source["checkpoint"]}
    for what, expected in made_of.items():
        if given[what] != expected:
            raise UsageError(
                "the engine was built from another export",
                seen=f"{what} {str(given[what])[:16]} in {export}",
                expected=f"{str(expected)[:16]}, of {engine}",
                fix=f"give the export it was built from, or kimi-deploy build-engine {export} -o DIR",
            )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def check_gpu(manifest: Manifest, backend: Backend) -> None:
    """Raise BackendError without a GPU, EngineError when none has a compute capability of the engine.

    One that was built with hardware_compatibility = "ampere+" runs on that GPU and on every one from 8.0 on.
    """
    wanted = detail(manifest, "compute_capabilities", list)
    newer = detail(manifest, "recipe", dict).get("hardware_compatibility") == "ampere+"
    devices = gpu_devices()
    if not devices:
        raise BackendError(
            "running an engine needs an NVIDIA GPU and this machine has none: copy the engine folder to one with "
            f"compute capability {' or '.join(map(str, wanted))}, or run the export with `kimi-deploy generate`"
        )
    if not any(d.capability in wanted or (newer and parse_capability(d.capability) >= AMPERE) for d in devices):
        # measured on an H200 (9.0): TensorRT-RTX 1.7.1 calls every engine invalid there, also one built on the spot
        offered = backend.offered_capabilities
        rtx_runs = not offered or devices[0].capability in offered
        option = (
            f"--capability {devices[0].capability}" if offered and rtx_runs else "--backend tensorrt on this machine"
        )
        raise EngineError(
            "the engine was built for other GPUs",
            seen=", ".join(f"{d.name} ({d.capability})" for d in devices),
            expected=f"compute capability {' or '.join(map(str, wanted))}",
            fix=f"kimi-deploy build-engine EXPORT -o DIR {option}",
        )


def open_engine(folder: Path) -> Engine:
    """Open the engine in `folder` for the current GPU.

    Raises as `check_engine`, `check_gpu` and `read_engine` do.
    """
    manifest, backend = check_engine(folder)
    check_gpu(manifest, backend)
    return read_engine(folder, manifest, backend)


def read_engine(folder: Path, manifest: Manifest, backend: Backend) -> Engine:
    """Give the plans of a checked engine to TensorRT. Raises as `read_plans` does, and EngineError for a plan without
    weights.
    """
    if detail(manifest, "recipe", dict).get("strip_weights"):
        raise EngineError(
            "the engine was built without its weights (strip_weights)",
            fix=f"fill them in: kimi-deploy refit {folder} EXPORT -o DIR",
        )
    return read_plans(folder, manifest, backend)


def read_plans(folder: Path, manifest: Manifest, backend: Backend) -> Engine:
    """The plans of a checked engine, with weights or without.

    The plugins are those that this process has registered, as by a build before, else those of the C++ library where it
    was built, else Python ones. Raises ManifestError for a file that is not what was built, EngineError with TensorRT's
    messages when it refuses a plan.
    """
    manifest.verify(folder)
    register_plugins(backend, registered_kind(backend) or ("native" if default_path().is_file() else "python"))
    backend.logger.errors.clear()
    runtime = backend.module.Runtime(backend.logger)
    if detail(manifest, "recipe", dict).get("version_compatible"):
        # such a plan brings the runtime of the TensorRT that built it
        runtime.engine_host_code_allowed = True
    try:
        files = {str(p["plan"]) for p in detail(manifest, "profiles", dict).values()}
    except (KeyError, TypeError) as error:
        raise ManifestError(
            "the engine's manifest does not name the plan of each profile",
            seen=str(error),
            fix="build the engine again",
        ) from error
    return Engine(manifest, backend, runtime, {name: _read_plan(folder / name, backend, runtime) for name in files})


def _read_plan(path: Path, backend: Backend, runtime: Any) -> Any:
    trt = backend.module
    plan = path.read_bytes()
    if hasattr(runtime, "get_engine_validity"):
        validity, diagnostics = runtime.get_engine_validity(plan[: runtime.engine_header_size])
        if validity == trt.EngineValidity.INVALID:
            _refuse(backend, f"TensorRT calls the plan invalid here: {_reasons(trt, diagnostics)}")
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        _refuse(backend, "; ".join(backend.logger.errors[-6:])[:3000])
    return engine


def _reasons(trt: Any, diagnostics: int) -> str:
    members = trt.EngineInvalidityDiagnostics.__members__.items()
    return ", ".join(name for name, flag in members if int(diagnostics) & int(flag)) or str(diagnostics)


def _refuse(backend: Backend, seen: str) -> None:
    raise EngineError(
        f"{backend.name} {backend.version} does not open the engine",
        seen=seen or "no message",
        fix="build the engine again on or for this machine",
    )
