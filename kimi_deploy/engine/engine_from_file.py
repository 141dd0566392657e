"""build-engine FILE.onnx: a plan from any exporter's graph with LinearAttention or CausalConvWithState nodes.

Such a graph has no contract of ours: its inputs and axes are its own, and so are the profiles. The plan is run by the
user's program, with our plugins registered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kimi_deploy.contract import METADATA_KEY
from kimi_deploy.cuda_driver import gpu_devices
from kimi_deploy.engine.backend import Backend, choose, load
from kimi_deploy.engine.config import TimingCache
from kimi_deploy.engine.network import plugin_layers
from kimi_deploy.engine.plan import build_plan
from kimi_deploy.engine.plugin_executors import check_kernels
from kimi_deploy.engine.plugin_registry import register_plugins
from kimi_deploy.engine.progress import Progress
from kimi_deploy.engine.recipe import (
    EngineRecipe,
    Range,
    Shapes,
    capabilities_for,
    check_addressable,
    parse_ranges,
    shapes_of,
)
from kimi_deploy.engine.requirements import check_machine, check_options, check_room, check_target, unusable_here
from kimi_deploy.engine.save_graph import save_graph
from kimi_deploy.engine.standard_nodes import ask_for_plugins, prepare_standard_nodes
from kimi_deploy.errors import EngineError, UsageError
from kimi_deploy.manifest import Manifest, sha256
from kimi_deploy.ops.standard import STANDARD_OPS
from kimi_deploy.output_folder import output_folder

PLAN_NAME = "engine.plan"

Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class StandardGraph:
    """A graph ready for TensorRT's parser: its protobuf, the layers its plugins must have, and its interface.

    `inputs` and `outputs` have a name for every axis that is not fixed: the graph's own, or INPUT.NUMBER.
    """

    proto: bytes
    layers: dict[str, int]
    inputs: dict[str, Dims]
    outputs: dict[str, Dims]
    weight_bytes: int
    bfloat16: bool

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis that a profile gives a range for."""
        return tuple(dict.fromkeys(d for dims in self.inputs.values() for d in dims if isinstance(d, str)))


def read_standard_graph(path: Path) -> StandardGraph:
    """Read another exporter's graph and rewrite its nodes of both operators for TensorRT's parser.

    Raises UsageError for a file that is no such graph, or whose weights are not where it says, ContractError for a node
    that the plugins cannot run.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's errors have no common type
        raise UsageError("this is not an ONNX model", seen=f"{path}: {error}"[:500]) from error
    # no bytes at all are a model to protobuf
    if not len(model.graph):
        raise UsageError("this is not an ONNX model", seen=f"{path}: a graph without nodes", fix="give another file")
    if METADATA_KEY in model.metadata_props:
        raise UsageError(
            "this file is part of an export, whose folder says more",
            seen=str(path),
            fix=f"give the folder: kimi-deploy build-engine {path.parent}",
        )
    if not prepare_standard_nodes(model):
        raise UsageError(
            "the graph has no node that needs this project's plugins",
            seen=f"{path}: no {' and no '.join(STANDARD_OPS)}",
            fix="build it with TensorRT's own tools: trtexec, or polygraphy convert",
        )
    layers = ask_for_plugins(model)
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    for weight in weights:
        if isinstance(weight, ir.ExternalTensor):
            _check_stored(weight)
    # an older form lists the weights among the inputs
    inputs = {_name(v): _dims(v) for v in model.graph.inputs if v.name not in model.graph.initializers}
    values = [*model.graph.inputs, *model.graph.outputs]
    return StandardGraph(
        ir.to_proto(model).SerializeToString(),
        layers,
        inputs,
        {_name(v): _dims(v) for v in model.graph.outputs},
        sum(w.nbytes for w in weights),
        ir.DataType.BFLOAT16 in [*(v.dtype for v in values), *(w.dtype for w in weights)],
    )


def parse_profiles(graph: StandardGraph, texts: Sequence[str]) -> dict[str, Shapes]:
    """The profiles of `--profile` options, each "AXIS=MIN:OPT:MAX,...", by their numbers; one if nothing is open.

    Raises UsageError for an axis that is missing or not the graph's, EngineError for tensors beyond TensorRT's reach.
    """
    if not texts and graph.axes:
        raise UsageError(
            "a graph with open axes needs a profile",
            expected=f"--profile {','.join(f'{axis}=MIN:OPT:MAX' for axis in graph.axes)}",
        )
    profiles = {}
    for index, text in enumerate(texts or ("",)):
        ranges: dict[str, Range] = parse_ranges(text, "--profile") if text else {}
        if set(ranges) != set(graph.axes):
            raise UsageError(
                "--profile does not give every open axis of the graph a range",
                seen=f"{text}; missing {sorted(set(graph.axes) - set(ranges))}, "
                f"unknown {sorted(set(ranges) - set(graph.axes))}",
                expected=",".join(f"{axis}=MIN:OPT:MAX" for axis in graph.axes),
            )
        check_addressable(graph.inputs, ranges, str(index), "--profile")
        profiles[str(index)] = shapes_of(graph.inputs, ranges)
    return profiles


def check_recipe(recipe: EngineRecipe) -> None:
    """Raise UsageError for settings that only an export can have."""
    for key, wanted, why in (
        ("plugin", recipe.plugin != "none", "the nodes have no other body"),
        ("plans", recipe.plans == "one", "give --profile twice"),
        ("in_place_state", not recipe.in_place_state, "the plugins of these operators have two buffers"),
    ):
        if not wanted:
            raise UsageError(f"{key} = {getattr(recipe, key)!r} is for an export, not for a file", seen=why)


def build_engine_from_file(
    path: Path,
    output: Path,
    recipe: EngineRecipe,
    profiles: Sequence[str],
    *,
    overwrite: bool,
    progress: Progress,
    warn: Callable[[str], object] = lambda text: None,
    graph_to: Path | None = None,
) -> Manifest:
    """Build one strongly typed plan from another exporter's graph; `profiles` as `parse_profiles` reads them.

    `graph_to` is a folder for the graph that TensorRT is given. The folder `output`, with engine.plan and
    manifest.json, is whole or not there. Raises as `read_standard_graph` and `parse_profiles` do, BackendError and
    EngineError before the build for a machine or disk that cannot give a plan, EngineError with TensorRT's messages
    when the build fails.
    """
    recipe.check("the engine recipe")
    check_recipe(recipe)
    graph = read_standard_graph(path)
    shapes = parse_profiles(graph, profiles)
    backend = load(choose(recipe.backend))
    check_machine(backend)
    check_options(backend.name, recipe)
    timing_cache = TimingCache(recipe)
    timing_cache.check_writable()
    if recipe.plugin_kind == "python":
        check_kernels(frozenset(graph.layers))
    register_plugins(backend, recipe.plugin_kind)
    capabilities = capabilities_for(backend.name, recipe.compute_capabilities, backend.offered_capabilities)
    check_target(capabilities, bfloat16=graph.bfloat16, kernels=True)
    unusable = unusable_here(backend, capabilities)
    if unusable:
        warn(f"building for compute capability {', '.join(capabilities)}; {unusable}")
    with output_folder(output, overwrite=overwrite, known=Manifest.files_of("plan")) as target:
        check_room(target, graph.weight_bytes, 0, 1)
        if graph_to is not None:
            save_graph(graph.proto, path.parent, graph_to, overwrite=overwrite)
        plan, layers, cached = build_plan(
            backend,
            (graph.proto, path),
            lambda network: _check_layers(backend, network, graph),
            recipe,
            shapes,
            capabilities,
            timing_cache,
            progress,
        )
        with (target / PLAN_NAME).open("wb") as file:
            file.write(plan)
        manifest = Manifest(
            kind="plan",
            source={"model": path.name, "sha256": sha256(path)},
            op_abi={},
            details={
                "backend": backend.name,
                "backend_version": backend.version,
                "compute_capabilities": list(capabilities) or [gpu_devices()[0].capability],
                "plugins": layers,
                "inputs": {name: list(dims) for name, dims in graph.inputs.items()},
                "outputs": {name: list(dims) for name, dims in graph.outputs.items()},
                "profiles": {n: {k: [list(s) for s in v] for k, v in p.items()} for n, p in shapes.items()},
                **cached,
            },
        )
        return manifest.write(target)


def _check_layers(backend: Backend, network: Any, graph: StandardGraph) -> dict[str, int]:
    layers: Mapping[str, int] = plugin_layers(backend, network)
    seen = {name: layers.get(name, 0) for name in graph.layers}
    if seen != graph.layers:
        raise EngineError(
            f"{backend.name} did not import every node as a plugin", seen=str(seen), expected=str(graph.layers)
        )
    return dict(layers)


def _check_stored(weight: ir.ExternalTensor) -> None:
    """Raise UsageError unless the file of a weight outside the graph reaches to its end."""
    path, end = Path(weight.path), (weight.offset or 0) + weight.nbytes
    size = path.stat().st_size if path.is_file() else None
    if size is None or size < end:
        raise UsageError(
            f"the graph's weight {weight.name} is not in its file",
            seen=f"{path}: {'no such file' if size is None else f'{size} bytes'}",
            expected=f"{end} bytes or more",
            fix="copy the graph again with the files of its weights, which lie beside it",
        )


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _dims(value: ir.Value) -> Dims:
    """Sizes and names; an axis without either is named for its place."""
    return tuple(
        dim if isinstance(dim, int) else dim.value or f"{value.name}.{axis}"
        for axis, dim in enumerate(value.shape if value.shape is not None else ())
    )
