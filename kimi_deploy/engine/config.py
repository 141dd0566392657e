"""An IBuilderConfig from a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_deploy.engine.backend import Backend
from kimi_deploy.engine.recipe import EngineRecipe, Shapes
from kimi_deploy.errors import EngineError
from kimi_deploy.manifest import sha256

_HARDWARE = {"ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"}


def builder_config(
    backend: Backend,
    builder: Any,
    recipe: EngineRecipe,
    profiles: Mapping[str, Shapes],
    capabilities: tuple[str, ...],
) -> Any:
    """The config of one plan. Raises EngineError for what TensorRT refuses to be told."""
    trt = backend.module
    config = builder.create_builder_config()
    config.builder_optimization_level = recipe.optimization_level
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, recipe.profiling_verbosity.upper())
    # on by default in TensorRT: float32 models would silently lose 13 bits in every product
    (config.set_flag if recipe.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    for flag, wanted in (
        ("VERSION_COMPATIBLE", recipe.version_compatible),
        ("REFIT", recipe.refit),
        # a plan without weights takes the same ones back; other ones where it is refittable too
        ("REFIT_IDENTICAL", recipe.strip_weights and not recipe.refit),
        ("STRIP_PLAN", recipe.strip_weights),
    ):
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if recipe.hardware_compatibility != "none":
        level = _HARDWARE[recipe.hardware_compatibility]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if recipe.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_mib << 20)
    if recipe.tactic_shared_memory_kib:
        config.set_memory_pool_limit(trt.MemoryPoolType.TACTIC_SHARED_MEMORY, recipe.tactic_shared_memory_kib << 10)
    if recipe.in_place_state:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            name = "SM" + capability.replace(".", "")
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), index):
                raise EngineError(f"TensorRT-RTX refuses compute capability {capability}")
    for name, shapes in profiles.items():
        profile = builder.create_optimization_profile()
        for tensor, (smallest, likely, largest) in shapes.items():
            profile.set_shape(tensor, smallest, likely, largest)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(
                f"TensorRT refuses the profile {name}",
                seen="; ".join(backend.logger.errors[-4:]),
                fix="change its sizes",
            )
    return config


class TimingCache:
    """The timing cache file of a recipe: two builds with one cache choose the same kernels wherever it has timings."""

    def __init__(self, recipe: EngineRecipe) -> None:
        """Raises EngineError when the file is not the one whose hash the recipe names, or is missing with one."""
        self.path = Path(recipe.timing_cache) if recipe.timing_cache else None
        self.found = self.path is not None and self.path.is_file()
        wanted = recipe.timing_cache_sha256
        if wanted:
            assert self.path is not None
            seen = sha256(self.path) if self.found else "no such file"
            if seen != wanted:
                raise EngineError(
                    f"the timing cache {self.path} is not the recipe's",
                    seen=seen,
                    expected=f"sha256 {wanted}",
                    fix="give the file that the recipe was made with, or leave timing_cache_sha256 out",
                )

    def load(self, backend: Backend, config: Any) -> None:
        """Give the file's content to `config`. Raises EngineError when it is of another TensorRT or GPU."""
        if self.path is None:
            return
        cache = config.create_timing_cache(self.path.read_bytes() if self.found else b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise EngineError(
                "TensorRT refuses the timing cache",
                seen=f"{self.path}: {'; '.join(backend.logger.errors[-2:])}"[:1000],
                fix="use a file of this TensorRT version and GPU, or delete it to start another",
            )

    def save(self, config: Any) -> dict[str, Any]:
        """Write a new file, never over one that was there; returns what the manifest says of it."""
        if self.path is None:
            return {}
        if not self.found:
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
            os.replace(temporary, self.path)
            self.found = True
        return {"timing_cache": {"file": str(self.path), "sha256": sha256(self.path)}}
