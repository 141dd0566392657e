"""The config that a printed Polygraphy command makes, beside that of a build; `python -m ... tensorrt|tensorrt-rtx`.

Of the full TensorRT's commands TensorRT-RTX's config stands in, which has the same members. A process of its own, since
Polygraphy takes one TensorRT when it is imported.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from kimi_deploy.engine import command_lines
from kimi_deploy.engine.backend import Backend, load
from kimi_deploy.engine.config import builder_config
from kimi_deploy.engine.polygraphy_loaders import polygraphy_of
from kimi_deploy.engine.recipe import EngineRecipe, Shapes

SHAPES: dict[str, Shapes] = {
    "prefill": {"ids": ((1, 1), (1, 8), (2, 32)), "cache": ((1, 1, 4), (1, 64, 4), (2, 64, 4))},
    "decode": {"ids": ((1, 1), (1, 1), (2, 1)), "cache": ((1, 1, 4), (1, 64, 4), (2, 64, 4))},
}
EVERYWHERE = [
    EngineRecipe(),
    EngineRecipe(tf32=True, optimization_level=5, profiling_verbosity="detailed"),
    EngineRecipe(in_place_state=True, profiling_verbosity="none", optimization_level=0),
    EngineRecipe(workspace_mib=64, tactic_shared_memory_kib=48, refit=True),
    EngineRecipe(strip_weights=True),
]
OF_THE_FULL_ONE = [
    EngineRecipe(version_compatible=True, hardware_compatibility="ampere+"),
    EngineRecipe(hardware_compatibility="sameComputeCapability", refit=True, strip_weights=True),
]


def parsed(words: list[str]) -> tuple[Any, list[Any]]:
    """What Polygraphy reads in the words behind `polygraphy`: its groups of arguments, and the profiles."""
    from polygraphy.tools.args import TrtConfigArgs
    from polygraphy.tools.convert.convert import Convert

    tool, parser = Convert(), argparse.ArgumentParser()
    tool.setup_parser(parser.add_subparsers())
    arguments, unknown = parser.parse_known_args(words)
    assert not unknown, unknown
    tool.parse(arguments)
    group = tool.arg_groups[TrtConfigArgs]
    profiles = [{name: [list(s) for s in shapes] for name, shapes in p.items()} for p in group.profile_dicts]
    return group, profiles


def said(trt: Any, config: Any) -> dict[str, Any]:
    """Everything that a config can be asked for."""
    flags = {name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)}
    return {
        "flags": sorted(flags),
        "capabilities": [str(config.get_compute_capability(i)) for i in range(config.num_compute_capabilities)],
        "pools": {n: config.get_memory_pool_limit(p) for n, p in trt.MemoryPoolType.__members__.items()},
        "preview": {n: config.get_preview_feature(f) for n, f in trt.PreviewFeature.__members__.items()},
        "verbosity": str(config.profiling_verbosity),
        "level": config.builder_optimization_level,
        "hardware": str(config.hardware_compatibility_level),
        "profiles": config.num_optimization_profiles,
    }


def compare(backend: Backend, recipe: EngineRecipe) -> list[Any]:
    """[recipe, the command's config, the build's, the command's profiles]."""
    trt = backend.module
    capabilities = ("8.6", "12.0") if backend.name == "tensorrt-rtx" else ()
    (command,) = command_lines.polygraphy(
        recipe, {"engine.plan": SHAPES}, Path("g.onnx"), Path("out"), None, backend.name, capabilities
    )
    builder = trt.Builder(backend.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network.add_input("ids", trt.int64, (-1, -1))
    network.add_input("cache", trt.float32, (-1, -1, 4))
    with polygraphy_of(backend):
        group, profiles = parsed(command[command.index("polygraphy") + 1 :])
        theirs = said(trt, group.create_config(builder, network))
    if "STRIP_PLAN" in theirs["flags"] and "REFIT" not in theirs["flags"]:
        # TensorRT sets it by itself then, which Polygraphy and trtexec leave to it
        theirs["flags"] = sorted({*theirs["flags"], "REFIT_IDENTICAL"})
    ours = said(trt, builder_config(backend, builder, network, recipe, SHAPES, capabilities))
    return [recipe.to_dict(), theirs, ours, profiles]


if __name__ == "__main__":
    rtx = load("tensorrt-rtx")
    if sys.argv[1] == "tensorrt":
        sys.modules["tensorrt"] = rtx.module
        # as Polygraphy knows that name
        rtx.module.__version__ = "10.13"
    chosen = replace(rtx, name=sys.argv[1])
    recipes = EVERYWHERE + (OF_THE_FULL_ONE if chosen.name == "tensorrt" else [])
    print(json.dumps([compare(chosen, recipe) for recipe in recipes]))
