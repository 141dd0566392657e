"""refit: weights of an export into the plans of an engine that was built without them, or built to have them exchanged.

TensorRT's ONNX parser finds every weight by the name it had when the plan was built, so it is given the same graph.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from kimi_deploy.cuda_driver import gpu_devices
from kimi_deploy.engine.backend import Backend
from kimi_deploy.engine.engine_from_onnx import MODEL_NAME, check_graph_file, check_weights, graph_for, read_export
from kimi_deploy.engine.load import check_engine, check_gpu, detail, read_plans
from kimi_deploy.engine.progress import Progress
from kimi_deploy.engine.recipe import EngineRecipe
from kimi_deploy.errors import BackendError, EngineError, UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.output_folder import output_folder


def refit_engine(folder: Path, export: Path, output: Path, *, overwrite: bool, progress: Progress) -> Manifest:
    """Write to `output` the engine of `folder` with the weights of the export in `export`.

    The result is whole or not there. Raises UsageError for an engine whose weights are fixed, BackendError without a
    GPU, EngineError for an export of another graph, or whose weights are not those that the engine was optimised for,
    and with TensorRT's messages when it refuses a weight; otherwise as `check_engine` and `check_gpu` do.
    """
    source = read_export(export)
    manifest, backend = check_engine(folder)
    recipe = EngineRecipe.from_dict(detail(manifest, "recipe", dict), "the engine's manifest")
    if not (recipe.strip_weights or recipe.refit):
        raise UsageError(
            "the engine's weights cannot be exchanged",
            seen=f"{folder}: built with neither refit nor strip_weights",
            fix="build it with --refit or --strip-weights",
        )
    if not gpu_devices():
        raise BackendError(
            "refitting an engine needs an NVIDIA GPU and this machine has none: run the same command on one with "
            f"compute capability {' or '.join(map(str, detail(manifest, 'compute_capabilities', list)))}, or build "
            "the engine with its weights"
        )
    check_gpu(manifest, backend)
    check_graph_file(source, export)
    graph = graph_for(export, recipe)
    made_from = source.source | {MODEL_NAME: source.files[MODEL_NAME]["sha256"]}
    if json.loads(graph.contract.to_json()) != detail(manifest, "contract", dict):
        raise EngineError(
            "the export is of another graph than the engine",
            seen="other inputs, outputs or states",
            fix="give an export of the same model, dtype and body",
        )
    same = ("checkpoint", MODEL_NAME)
    if not recipe.refit and {k: manifest.source.get(k) for k in same} != {k: made_from[k] for k in same}:
        raise EngineError(
            "the engine takes only the weights it was built from",
            seen=f"{export}: {made_from['checkpoint']}",
            expected=str(manifest.source.get("checkpoint")),
            fix="give that export, or build an engine with --refit --strip-weights, which takes others",
        )
    with output_folder(output, overwrite=overwrite, known=Manifest.files_of("engine")) as target:
        check_weights(source, export, progress)
        opened = read_plans(folder, manifest, backend)
        for name, engine in opened.plans.items():
            with progress(f"filling {name}", None, "steps"):
                plan = _refitted(backend, engine, graph.proto, export / MODEL_NAME, refittable=recipe.refit)
            with (target / name).open("wb") as file:
                file.write(plan)
        for name in manifest.files.keys() - opened.plans.keys():
            shutil.copyfile(folder / name, target / name)
        details = manifest.details | {"recipe": manifest.details["recipe"] | {"strip_weights": False}}
        return replace(manifest, source=made_from, details=details, reports={}).write(target)


def _refitted(backend: Backend, engine: Any, proto: bytes, path: Path, *, refittable: bool) -> Any:
    """The serialised plan of `engine` with the weights of a model, whose external ones lie beside `path`."""
    trt = backend.module
    backend.logger.errors.clear()
    refitter = trt.Refitter(engine, backend.logger)
    parser = trt.OnnxParserRefitter(refitter, backend.logger)
    found = parser.refit_from_bytes(proto, str(path))
    missing = list(refitter.get_missing_weights())
    if not found or missing or not refitter.refit_cuda_engine():
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)] + backend.logger.errors[-4:]
        raise EngineError(
            f"{backend.name} {backend.version} does not take the export's weights",
            seen=f"{len(missing)} weights missing {missing[:8]}; {'; '.join(errors) or 'no message'}"[:3000],
            fix="give the export that the engine was built from, or build the engine with its weights",
        )
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    # TensorRT before 10.14 keeps a plan refittable unasked
    if refittable and hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    plan = engine.serialize_with_config(config)
    if plan is None:
        raise EngineError(
            f"{backend.name} {backend.version} cannot write the engine", seen="; ".join(backend.logger.errors[-4:])
        )
    return plan
