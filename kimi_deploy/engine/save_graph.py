"""The graph that TensorRT is given, as a file for trtexec and Polygraphy, which cannot change bodies in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx

from kimi_deploy.errors import EngineError, UsageError
from kimi_deploy.output_folder import output_folder

GRAPH_NAME = "model.onnx"


def save_graph(
    proto: bytes, export: Path, target: Path, *, overwrite: bool, check: Callable[[], object] = lambda: None
) -> Path:
    """Write a serialised graph and a copy of its weights to the folder `target`, whole or not at all.

    `export` is the folder of the weights; returns the graph's path. Raises UsageError when the folder is in use,
    EngineError when there is too little disk for the copy, and then what `check` raises, which may read the weights.
    """
    model = onnx.load_from_string(proto)
    sources: dict[str, Path] = {}
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                source = Path(os.path.abspath(export / entry.value))
                entry.value = source.name
                if sources.setdefault(source.name, source) != source:
                    raise UsageError("two weight files have one name", seen=f"{source} and {sources[source.name]}")
    known = {GRAPH_NAME, *sources}
    with output_folder(target, overwrite=overwrite, known=lambda folder: known) as folder:
        needed, free = sum(s.stat().st_size for s in sources.values()) + len(proto), shutil.disk_usage(folder).free
        if free < needed:
            raise EngineError(
                "not enough disk space for the graph and its weights",
                seen=f"{free / 1e9:.2f} GB free in {target.parent}",
                expected=f"{needed / 1e9:.2f} GB",
                fix="free some space, or give --save-onnx on another disk",
            )
        check()
        for name, source in sources.items():
            # no link: ONNX's readers refuse weights that have two names, the export's own from then on too
            shutil.copyfile(source, folder / name)
        (folder / GRAPH_NAME).write_bytes(model.SerializeToString())
    return target / GRAPH_NAME
