"""build-engine: export folder in, engine.plan + manifest.json + tokenizer files out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kimi_deploy.contract import GraphContract
from kimi_deploy.cuda_driver import gpu_devices
from kimi_deploy.engine.backend import choose, load
from kimi_deploy.engine.config import TimingCache
from kimi_deploy.engine.network import Graph, check_network, read_graph
from kimi_deploy.engine.plan import build_plan
from kimi_deploy.engine.plugin_executors import KERNELS_NEEDED, check_kernels, kernels_are_built
from kimi_deploy.engine.plugin_registry import register_plugins
from kimi_deploy.engine.progress import Progress
from kimi_deploy.engine.recipe import EngineRecipe, capabilities_for
from kimi_deploy.engine.requirements import check_machine, check_options, check_room, check_target, unusable_here
from kimi_deploy.engine.save_graph import save_graph
from kimi_deploy.errors import UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.ops.plugins import PLUGIN_OPS
from kimi_deploy.ops.registry import OPS
from kimi_deploy.output_folder import output_folder
from kimi_deploy.text.tokenizer import TOKENIZER_FILES

MODEL_NAME = "model.onnx"


def build_engine(
    folder: Path,
    output: Path,
    recipe: EngineRecipe,
    *,
    overwrite: bool,
    progress: Progress,
    warn: Callable[[str], object] = lambda text: None,
    graph_to: Path | None = None,
) -> Manifest:
    """Build strongly typed engines with a prefill and a decode profile from the export in `folder`.

    The result in `output` is whole or not there. `warn` is told when the engine will not run on this machine's GPU.
    `graph_to` is a folder for the graph that TensorRT is given. Raises UsageError, ManifestError, BackendError and
    EngineError, before the weights are read, for an export, recipe, machine or disk that cannot give an engine;
    ManifestError for changed weights; EngineError with TensorRT's messages when the build fails.
    """
    recipe.check("the engine recipe")
    source = read_export(folder)
    backend = load(choose(recipe.backend))
    check_machine(backend)
    check_options(backend.name, recipe)
    capabilities = capabilities_for(backend.name, recipe.compute_capabilities, backend.offered_capabilities)
    timing_cache = TimingCache(recipe)
    timing_cache.check_writable()
    if recipe.plugin != "none":
        if recipe.plugin_kind == "python":
            check_kernels(plugin_ops(recipe))
        register_plugins(backend, recipe.plugin_kind)
    check_graph_file(source, folder)
    graph = graph_for(folder, recipe)
    kernels = bool(plugin_ops(recipe)) and (recipe.plugin_kind == "native" or kernels_are_built())
    check_target(capabilities, bfloat16=graph.contract.dtype == "bfloat16", kernels=kernels)
    unusable = unusable_here(backend, capabilities)
    if unusable:
        warn(f"building for compute capability {', '.join(capabilities)}; {unusable}")
    plans = recipe.shapes_of_plans(graph.contract)
    with output_folder(output, overwrite=overwrite, known=Manifest.files_of("engine")) as target:
        weights = sum(entry["bytes"] for name, entry in source.files.items() if name != MODEL_NAME)
        bodies = sum(n for op, n in graph.custom_nodes.items() if op not in plugin_ops(recipe))
        check_room(target, weights, bodies, len(plans))
        if graph_to is None:
            check_weights(source, folder, progress)
        else:
            check = partial(check_weights, source, folder, progress)
            save_graph(graph.proto, folder, graph_to, overwrite=overwrite, check=check)
        layers: dict[str, int] = {}
        cached: dict[str, Any] = {}
        for plan, profiles in plans.items():
            data, layers, cached = build_plan(
                backend,
                (graph.proto, folder / MODEL_NAME),
                lambda network: check_network(backend, network, graph, plugin_ops(recipe)),
                recipe,
                profiles,
                capabilities,
                timing_cache,
                progress,
            )
            with (target / plan).open("wb") as file:
                file.write(data)
        for name in ("config.json", *TOKENIZER_FILES):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        manifest = Manifest(
            kind="engine",
            source=source.source | {"model.onnx": source.files[MODEL_NAME]["sha256"]},
            op_abi={op: OPS[op].abi for op in graph.custom_nodes},
            details={
                "backend": backend.name,
                "backend_version": backend.version,
                # the full TensorRT builds for the GPU at hand
                "compute_capabilities": list(capabilities) or [gpu_devices()[0].capability],
                "dtype": graph.contract.dtype,
                "plugins": layers,
                "recipe": recipe.to_dict()
                | {
                    "backend": backend.name,
                    "compute_capabilities": list(capabilities),
                    # refitting parses the same graph on another machine
                    "plugin_ops": sorted(plugin_ops(recipe)),
                },
                "profiles": profile_table(recipe, graph.contract),
                "contract": json.loads(graph.contract.to_json()),
                **cached,
            },
        )
        return manifest.write(target)


def read_export(folder: Path) -> Manifest:
    """The manifest of an export whose ops have this package's ABI, with weights as they are.

    Raises UsageError for a quantised export and ManifestError for anything else.
    """
    source = Manifest.read(folder)
    source.check_kind("onnx")
    source.check_op_abi()
    if "quantization" in source.details:
        raise UsageError(
            "an engine cannot be built from a quantised export",
            seen=f"{folder} holds weights of {source.details['quantization']['bits']} bits",
            expected="an export without --quantize: TensorRT's parser does not import the operators on packed levels",
            fix="export again without --quantize",
        )
    return source


def check_graph_file(source: Manifest, folder: Path) -> None:
    """Raise ManifestError where a file of the export is missing or of another size, or the graph has another hash.

    Weights are not read: what the graph says of sizes and types can be refused before.
    """
    source.verify(folder, hashes=False)
    replace(source, files={MODEL_NAME: source.files[MODEL_NAME]}).verify(folder)


def check_weights(source: Manifest, folder: Path, progress: Progress) -> None:
    """Raise ManifestError where the hash of any file of the export differs."""
    with progress("checking the export", None, "bytes"):
        source.verify(folder)


def plugin_ops(recipe: EngineRecipe) -> frozenset[str]:
    """The ops that a plugin is to run: the recipe's, or all that something can run here as fast as it should be."""
    if recipe.plugin == "none":
        return frozenset()
    if recipe.plugin_ops:
        return frozenset(recipe.plugin_ops)
    return PLUGIN_OPS if recipe.plugin_kind == "native" or kernels_are_built() else PLUGIN_OPS - KERNELS_NEEDED


def graph_for(folder: Path, recipe: EngineRecipe) -> Graph:
    """The export's graph as TensorRT is to parse it. Raises EngineError when the recipe's profiles do not fit it."""
    graph = read_graph(folder / MODEL_NAME, plugin_ops(recipe), in_place_state=recipe.in_place_state)
    recipe.check_against(graph.contract)
    return graph


def profile_table(recipe: EngineRecipe, contract: GraphContract) -> dict[str, Any]:
    """Profile name -> the file of its plan, its index in there and the shapes of every input."""
    table = {}
    for plan, profiles in recipe.shapes_of_plans(contract).items():
        for index, (name, shapes) in enumerate(profiles.items()):
            table[name] = {"plan": plan, "index": index, "shapes": {k: [list(s) for s in v] for k, v in shapes.items()}}
    return table
