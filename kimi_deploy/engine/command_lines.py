"""The command lines of trtexec and Polygraphy that build what a recipe builds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from kimi_deploy.engine import no_tf32
from kimi_deploy.engine.backend import TensorRT
from kimi_deploy.engine.config import TimingCache
from kimi_deploy.engine.recipe import EngineRecipe, Shapes

Plans = Mapping[str, Mapping[str, Shapes]]
"""File name of each plan -> its profiles by name."""


def trtexec(recipe: EngineRecipe, plans: Plans, graph: Path, output: Path, library: Path | None) -> list[list[str]]:
    """One trtexec command per plan, of the full TensorRT; `library` holds the plugins that the graph asks for.

    Raises EngineError for a timing cache that is not the recipe's. A cache that is there is copied, since trtexec
    writes into the one it reads.
    """
    commands = pin_of(recipe)
    cache_is_there = TimingCache(recipe).found
    for plan, profiles in plans.items():
        words = ["trtexec", f"--onnx={graph}", f"--saveEngine={output / plan}", "--skipInference"]
        words += ["--stronglyTyped", f"--builderOptimizationLevel={recipe.optimization_level}"]
        words += [] if recipe.tf32 else ["--noTF32"]
        words += [f"--profilingVerbosity={recipe.profiling_verbosity}"]
        words += ["--versionCompatible"] * recipe.version_compatible
        if recipe.hardware_compatibility != "none":
            words.append(f"--hardwareCompatibilityLevel={recipe.hardware_compatibility}")
        words += ["--refit"] * recipe.refit + ["--stripWeights"] * recipe.strip_weights
        pools = [f"workspace:{recipe.workspace_mib}M"] if recipe.workspace_mib else []
        pools += [f"tacticSharedMem:{recipe.tactic_shared_memory_kib}K"] if recipe.tactic_shared_memory_kib else []
        words += [f"--memPoolSize={','.join(pools)}"] if pools else []
        if recipe.timing_cache and cache_is_there:
            copy = f"{output / plan}.timing_cache"
            commands.append(["cp", recipe.timing_cache, copy])
            words.append(f"--timingCacheFile={copy}")
        elif recipe.timing_cache:
            words.append(f"--timingCacheFile={recipe.timing_cache}")
            cache_is_there = True
        # Polygraphy turns every preview feature off that it is not given
        words += ["--preview=+aliasedPluginIO1003,-runtimeActivationResize"] if recipe.in_place_state else []
        words += [f"--staticPlugins={library}"] if library else []
        for index, profile in enumerate(profiles.values()):
            # trtexec takes the three that stand right behind their --profile
            words.append(f"--profile={index}")
            for option, shapes in _by_bound(profile, ("--minShapes", "--optShapes", "--maxShapes")).items():
                listed = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
                words.append(f"{option}={listed}")
        commands.append(words)
    return commands


def pin_of(recipe: EngineRecipe) -> list[list[str]]:
    """The command that fails where the timing cache is another than the recipe's; none for a recipe without a hash."""
    if not recipe.timing_cache_sha256:
        return []
    line = shlex.quote(f"{recipe.timing_cache_sha256}  {recipe.timing_cache}")
    return [["sh", "-c", f"echo {line} | sha256sum --check --quiet"]]


def polygraphy(
    recipe: EngineRecipe,
    plans: Plans,
    graph: Path,
    output: Path,
    library: Path | None,
    backend: TensorRT,
    capabilities: tuple[str, ...],
) -> list[list[str]]:
    """One `polygraphy convert` per plan. The variable in front of it is how Polygraphy is told of TensorRT-RTX.

    With a library it is called through `engine.polygraphy_tools`, which says why. Raises EngineError for a timing cache
    that is not the recipe's.
    """
    tool = ["python", "-m", "kimi_deploy.engine.polygraphy_tools"] if library else ["polygraphy"]
    commands = pin_of(recipe)
    cache_is_there = TimingCache(recipe).found
    for plan, profiles in plans.items():
        words = ["env", "POLYGRAPHY_USE_TENSORRT_RTX=1"] if backend == "tensorrt-rtx" else []
        words += [*tool, "convert", str(graph), "--convert-to", "trt", "-o", str(output / plan)]
        words += ["--strongly-typed", "--builder-optimization-level", str(recipe.optimization_level)]
        if backend == "tensorrt":
            words += ["--tf32"] * recipe.tf32
        elif not recipe.tf32:
            words += ["--trt-config-postprocess-script", str(Path(no_tf32.__file__).resolve())]
        words += ["--version-compatible"] * recipe.version_compatible
        words += ["--profiling-verbosity", recipe.profiling_verbosity]
        if recipe.hardware_compatibility != "none":
            level = {"ampere+": "ampere_plus", "sameComputeCapability": "same_compute_capability"}
            words += ["--hardware-compatibility-level", level[recipe.hardware_compatibility]]
        words += ["--refittable"] * recipe.refit + ["--strip-plan"] * recipe.strip_weights
        pools = [f"workspace:{recipe.workspace_mib}M"] if recipe.workspace_mib else []
        pools += [f"tactic_shared_memory:{recipe.tactic_shared_memory_kib}K"] * bool(recipe.tactic_shared_memory_kib)
        words += ["--pool-limit", *pools] if pools else []
        if recipe.timing_cache:
            words += ["--load-timing-cache" if cache_is_there else "--save-timing-cache", recipe.timing_cache]
            cache_is_there = True
        words += ["--preview-features", "aliased_plugin_io_10_03"] if recipe.in_place_state else []
        words += ["--compute-capabilities", *capabilities] if capabilities else []
        words += ["--plugins", str(library)] if library else []
        for profile in profiles.values():
            bounds = ("--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes")
            for option, shapes in _by_bound(profile, bounds).items():
                words.append(option)
                words += [f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items()]
        commands.append(words)
    return commands


def _by_bound(profile: Shapes, options: tuple[str, str, str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The smallest, likely and largest shape of every input, by option."""
    return {option: {name: s[i] for name, s in profile.items()} for i, option in enumerate(options)}
