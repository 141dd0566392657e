"""What a folder holds: a checkpoint, an export or an engine, as plain data. Needs neither torch nor TensorRT."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kimi_deploy.errors import KimiDeployError
from kimi_deploy.folder_kind import CONFIG_NAME, MANIFEST_NAME, no_model
from kimi_deploy.manifest import Manifest
from kimi_deploy.model_folder import require_folder
from kimi_deploy.validate.accuracy import read_accuracy


def inspect_folder(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Describe `folder`: "kind" is checkpoint, onnx or engine, "problems" lists what is wrong with it.

    `hashes` false compares only the sizes of an artefact's files with its manifest. Raises UsageError when the path
    is no folder, WrongArtefactError when no model is in it, ConfigError, CheckpointError or ManifestError when it
    cannot be read at all.
    """
    require_folder(folder, "a checkpoint, an export or an engine")
    if not any((folder / name).is_file() for name in (MANIFEST_NAME, CONFIG_NAME)):
        raise no_model(folder)
    if not (folder / MANIFEST_NAME).is_file():
        return {"path": str(folder), **_checkpoint(folder)}
    manifest = Manifest.read(folder)
    problems = [str(e) for e in (_attempt(manifest.check_op_abi), _attempt(manifest.verify, folder, hashes)) if e]
    reports = read_accuracy(folder, manifest, whole=not problems)
    found = {
        "path": str(folder),
        "kind": manifest.kind,
        "problems": problems,
        "manifest": manifest.to_dict(),
        "accuracy": [a.to_dict() for a in reports],
    }
    return found | ({"contract": _contract(folder)} if manifest.kind == "onnx" else {})


def _attempt(check: Any, *arguments: Any) -> KimiDeployError | None:
    try:
        check(*arguments)
    except KimiDeployError as error:
        return error
    return None


def _checkpoint(folder: Path) -> dict[str, Any]:
    from kimi_deploy.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    problem = _attempt(checkpoint.resolve)
    tensors = checkpoint.tensors.values()
    elements: Counter[str] = Counter()
    for tensor in tensors:
        count = 1
        for size in tensor.shape:
            count *= size
        elements[tensor.dtype] += count
    config = checkpoint.config
    return {
        "kind": "checkpoint",
        "problems": [str(problem)] if problem else [],
        "config": asdict(config),
        "layers": {
            "linear_attention": config.layer_types.count("linear_attention"),
            "full_attention": config.layer_types.count("full_attention"),
            "dense": config.mlp_types.count("dense"),
            "sparse": config.mlp_types.count("sparse"),
        },
        "tensors": len(checkpoint.tensors),
        "files": sorted({t.file for t in tensors}),
        "bytes": sum(t.nbytes for t in tensors),
        "parameters": sum(elements.values()),
        "parameters_by_dtype": dict(elements),
    }


def _contract(folder: Path) -> dict[str, Any]:
    """The interface in the graph's metadata."""
    import json

    from kimi_deploy.contract import METADATA_KEY, GraphContract
    from kimi_deploy.onnx.read import read_graph

    text = next((p.value for p in read_graph(folder).metadata_props if p.key == METADATA_KEY), "")
    result: dict[str, Any] = json.loads(GraphContract.from_json(text).to_json())
    return result
