"""build-engine: export folder in, engine.plan + manifest.json + tokenizer files out.

TensorRT's own API rather than Polygraphy's loaders: those choose between the two TensorRTs by an environment variable
that is read at import, and they can parse a graph that was changed in memory only when its weights are inside it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from kimi_deploy.contract import GraphContract
from kimi_deploy.cuda_driver import gpu_devices
from kimi_deploy.engine.backend import Backend, choose, load
from kimi_deploy.engine.load import PLAN_NAME
from kimi_deploy.engine.network import Graph, check_network, parse, read_graph
from kimi_deploy.engine.plugin_registry import PLUGIN_OPS, register_plugins
from kimi_deploy.engine.progress import Progress, deferred_interrupt, make_monitor
from kimi_deploy.engine.recipe import EngineRecipe, capabilities_for
from kimi_deploy.errors import BackendError, EngineError, UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.ops.registry import OPS
from kimi_deploy.output_folder import output_folder
from kimi_deploy.text.tokenizer import TOKENIZER_FILES

MODEL_NAME = "model.onnx"
# code that a plan holds per custom op that is not a plugin: 3 to 10 MB measured with TensorRT-RTX, rounded up
_CODE_BYTES = 16 << 20


def build_engine(folder: Path, output: Path, recipe: EngineRecipe, *, overwrite: bool, progress: Progress) -> Manifest:
    """Build one strongly typed engine with a prefill and a decode profile from the export in `folder`.

    The result in `output` is whole or not there. Raises UsageError, ManifestError, BackendError and EngineError before
    the build for an export, recipe, machine or disk that cannot give an engine, EngineError with TensorRT's messages
    when the build fails.
    """
    recipe.check("the engine recipe")
    source = Manifest.read(folder)
    source.check_kind("onnx")
    source.check_op_abi()
    if "quantization" in source.details:
        raise UsageError(
            "an engine cannot be built from a quantised export",
            seen=f"{folder} holds weights of {source.details['quantization']['bits']} bits",
            expected="an export without --quantize: TensorRT's parser does not import its operators on packed levels",
            fix="export again without --quantize",
        )
    backend = load(choose(recipe.backend))
    _check_machine(backend)
    with progress("checking the export", None, "bytes"):
        source.verify(folder)
    plugin_ops = PLUGIN_OPS if recipe.plugin == "auto" else frozenset()
    graph = read_graph(folder / MODEL_NAME, plugin_ops, in_place_state=recipe.in_place_state)
    recipe.check_against(graph.contract)
    capabilities = capabilities_for(
        backend.name, recipe.compute_capabilities, backend.offered_capabilities, graph.contract.dtype
    )
    with output_folder(output, overwrite=overwrite, known=Manifest.files_of("engine")) as target:
        _check_room(target, source, graph)
        plan, layers = _build(backend, graph, folder, recipe, capabilities, progress)
        with (target / PLAN_NAME).open("wb") as file:
            file.write(plan)
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
                "recipe": recipe.to_dict() | {"backend": backend.name, "compute_capabilities": list(capabilities)},
                "profiles": profile_table(recipe, graph.contract),
                "contract": json.loads(graph.contract.to_json()),
            },
        )
        return manifest.write(target)


def profile_table(recipe: EngineRecipe, contract: GraphContract) -> dict[str, Any]:
    """Profile name -> its index in the engine and the shapes of every input."""
    return {
        name: {"index": index, "shapes": {k: [list(s) for s in v] for k, v in profile.shapes(contract).items()}}
        for index, (name, profile) in enumerate(recipe.profiles.items())
    }


def _check_machine(backend: Backend) -> None:
    if backend.name == "tensorrt" and not gpu_devices():
        raise BackendError(
            "the full TensorRT builds only on a machine with a GPU",
            seen="no CUDA device",
            fix="use --backend tensorrt-rtx, which builds on any machine",
        )


def _check_room(folder: Path, source: Manifest, graph: Graph) -> None:
    """Raise EngineError when the plan cannot fit the disk, or the weights and the plan cannot fit the memory."""
    plan = sum(entry["bytes"] for entry in source.files.values()) + sum(graph.custom_nodes.values()) * _CODE_BYTES
    free = shutil.disk_usage(folder).free
    if free < plan:
        raise EngineError(
            "not enough disk space for the engine",
            seen=f"{free / 1e9:.2f} GB free in {folder.parent}",
            expected=f"{plan / 1e9:.2f} GB",
            fix="free some space, or give -o on another disk",
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # the network's weights and the finished plan are in memory at once; the build itself takes more
    if memory < 2 * plan:
        raise EngineError(
            "not enough memory to build the engine",
            seen=f"{memory / 1e9:.1f} GB",
            expected=f"{2 * plan / 1e9:.1f} GB at the very least, better twice that",
            fix="build on a larger machine with the same kimi-deploy and TensorRT; TensorRT-RTX needs no GPU there",
        )


def _build(
    backend: Backend,
    graph: Graph,
    folder: Path,
    recipe: EngineRecipe,
    capabilities: tuple[str, ...],
    progress: Progress,
) -> tuple[Any, dict[str, int]]:
    """The serialised engine and its plugin layers by name."""
    trt = backend.module
    backend.logger.errors.clear()
    plugin_ops = PLUGIN_OPS if recipe.plugin == "auto" else frozenset()
    if plugin_ops:
        register_plugins(backend)
    builder = trt.Builder(backend.logger)
    if not builder:
        raise EngineError(f"{backend.name} cannot start a build", seen="; ".join(backend.logger.errors[-4:]))
    with progress("parsing the graph", None, "steps"):
        network, parser = parse(backend, builder, graph, folder / MODEL_NAME)
    layers = check_network(backend, network, graph, plugin_ops)
    config = _config(backend, builder, graph.contract, recipe, capabilities)
    with deferred_interrupt() as interrupt:
        monitor = make_monitor(trt, progress, interrupt)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    del parser
    if plan is None:
        raise EngineError(
            f"{backend.name} {backend.version} could not build the engine",
            seen="; ".join(backend.logger.errors[-6:])[:3000] or "no message",
            fix="try --plugin none, smaller profiles, or another compute capability, and report this configuration",
        )
    return plan, layers


def _config(
    backend: Backend, builder: Any, contract: GraphContract, recipe: EngineRecipe, capabilities: tuple[str, ...]
) -> Any:
    trt = backend.module
    config = builder.create_builder_config()
    config.builder_optimization_level = recipe.optimization_level
    # on by default in TensorRT: float32 models would silently lose 13 bits in every product
    (config.set_flag if recipe.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if recipe.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_mib << 20)
    if recipe.in_place_state:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            name = "SM" + capability.replace(".", "")
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), index):
                raise EngineError(f"TensorRT-RTX refuses compute capability {capability}")
    for name, profile in recipe.profiles.items():
        shapes = builder.create_optimization_profile()
        for tensor, (smallest, likely, largest) in profile.shapes(contract).items():
            shapes.set_shape(tensor, smallest, likely, largest)
        if config.add_optimization_profile(shapes) < 0:
            raise EngineError(
                f"TensorRT refuses the profile {name}",
                seen="; ".join(backend.logger.errors[-4:]),
                fix="change its sizes",
            )
    return config
