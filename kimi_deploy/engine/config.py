"""An IBuilderConfig from a recipe, made by Polygraphy; what its loader does not set or does not check is done here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_deploy.engine.backend import Backend
from kimi_deploy.engine.polygraphy_loaders import polygraphy_of
from kimi_deploy.engine.recipe import EngineRecipe, Shapes, parse_capability
from kimi_deploy.errors import EngineError
from kimi_deploy.manifest import sha256
from kimi_deploy.output_file import check_writable, whole_file

_HARDWARE = {"ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"}


def builder_config(
    backend: Backend,
    builder: Any,
    network: Any,
    recipe: EngineRecipe,
    profiles: Mapping[str, Shapes],
    capabilities: tuple[str, ...],
    monitor: Any = None,
) -> Any:
    """The config of one plan. Raises EngineError for what TensorRT refuses to be told, such as a profile."""
    trt = backend.module
    limits = {
        trt.MemoryPoolType.WORKSPACE: recipe.workspace_mib << 20,
        trt.MemoryPoolType.TACTIC_SHARED_MEMORY: recipe.tactic_shared_memory_kib << 10,
    }
    level = _HARDWARE.get(recipe.hardware_compatibility)
    options: dict[str, Any] = {
        "builder_optimization_level": recipe.optimization_level,
        "profiling_verbosity": getattr(trt.ProfilingVerbosity, recipe.profiling_verbosity.upper()),
        "version_compatible": recipe.version_compatible,
        "hardware_compatibility_level": level and getattr(trt.HardwareCompatibilityLevel, level),
        "refittable": recipe.refit,
        "strip_plan": recipe.strip_weights,
        "memory_pool_limits": {pool: size for pool, size in limits.items() if size},
        "preview_features": [trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03] if recipe.in_place_state else None,
        "progress_monitor": monitor,
    }
    with polygraphy_of(backend) as polygraphy:
        options["profiles"] = [polygraphy.profile(shapes) for shapes in profiles.values()]
        if capabilities:
            options["compute_capabilities"] = [parse_capability(c) for c in capabilities]
        try:
            config = polygraphy.create_config(**options)(builder, network)
        except polygraphy.error as error:
            raise EngineError(
                "TensorRT refuses a profile of the recipe",
                seen="; ".join(backend.logger.errors[-4:]) or str(error),
                fix=f"change the sizes of {' or '.join(profiles)}",
            ) from error
    # on by default, and nothing that Polygraphy touches for TensorRT-RTX: float32 models would silently lose 13 bits
    # in every product
    (config.set_flag if recipe.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if recipe.strip_weights and not recipe.refit:
        # a plan without weights takes the same ones back; other ones where it is refittable too
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if capabilities and config.num_compute_capabilities != len(capabilities):
        raise EngineError("TensorRT-RTX refuses the compute capabilities", seen=", ".join(capabilities))
    return config


class TimingCache:
    """The timing cache file of a recipe: two builds with one cache choose the same kernels wherever it has timings.

    Polygraphy's loaders read and write one too, but ignore what TensorRT refuses, and write over a file that is there.
    """

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

    def check_writable(self) -> None:
        """Raise UsageError where the file is to be written and cannot be: the build would be over when that shows."""
        if self.path is not None and not self.found:
            check_writable("timing_cache", self.path)

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
            with whole_file(self.path) as temporary:
                temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
            self.found = True
        return {"timing_cache": {"file": str(self.path), "sha256": sha256(self.path)}}
