"""Which safetensors files of a model folder hold which tensors, checked against the index."""

from __future__ import annotations

from pathlib import Path

from kimi_deploy.checkpoint.safetensors_file import MAX_HEADER_BYTES, TensorInfo, read_header
from kimi_deploy.errors import CheckpointError, ManifestError, UsageError
from kimi_deploy.manifest import MANIFEST_NAME, Manifest
from kimi_deploy.model_folder import file_in_folder
from kimi_deploy.strict_json import read_json_object

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint in `folder`, from `model.safetensors` or from the shards of its index.

    Raises CheckpointError when there is neither or both, when a shard is missing or damaged, when a name
    leaves the folder, and when the index and the shards do not say the same; UsageError when the folder is an
    export or an engine.
    """
    single, index = (_find(folder, name) for name in (SINGLE_NAME, INDEX_NAME))
    if single and index:
        raise _error(
            "two checkpoints in one folder",
            seen=f"{SINGLE_NAME} and {INDEX_NAME}",
            expected="one of them",
            fix="remove the one that is out of date",
        )
    if single:
        return read_header(single)
    if index:
        return _read_shards(folder, index)
    _refuse_artefact(folder)
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise _error(
            "the checkpoint is a pickle, which can run code when it is read",
            seen=", ".join(pickles[:3]),
            expected="safetensors files",
            fix="convert it to safetensors on a machine that you trust it on",
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    raise _error(
        "no weights in the model folder",
        seen=", ".join(map(ascii, others[:3])) or str(folder),
        expected=f"{SINGLE_NAME}, or shards with {INDEX_NAME}",
        fix="download the whole checkpoint",
    )


def _refuse_artefact(folder: Path) -> None:
    """An export's weights.bin is no pickle, and what is wrong is the folder."""
    try:
        kind = Manifest.read(folder).kind
    except ManifestError:
        return
    if kind in ("onnx", "engine"):
        raise UsageError(
            f"the folder is {'an export' if kind == 'onnx' else 'an engine'}, not a checkpoint",
            seen=f"{MANIFEST_NAME} of kind {kind!r} in {folder}",
            expected=f"{SINGLE_NAME}, or shards with {INDEX_NAME}",
            fix="give the checkpoint folder that it was made from",
        )


def _read_shards(folder: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json_object(index, MAX_HEADER_BYTES, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise _error(
            f"{INDEX_NAME} has no usable weight_map",
            seen=type(weight_map).__name__,
            expected="an object from tensor to file",
        )
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(set(weight_map.values())):
        path = _find(folder, name)
        if path is None or path.suffix != ".safetensors":
            raise _error(
                "a shard of the index is missing" if path is None else "the index names a file of another kind",
                seen=ascii(name)[:200],
                expected="a safetensors file in the folder",
            )
        for tensor in read_header(path).values():
            if weight_map.get(tensor.name) != name:
                raise _error(
                    f"{INDEX_NAME} and the shards do not agree",
                    seen=f"{ascii(tensor.name)[:200]} is in {name}",
                    expected=f"{ascii(weight_map.get(tensor.name, 'not in the index'))[:200]}",
                )
            tensors[tensor.name] = tensor
    absent = [n for n in weight_map if n not in tensors]
    if absent:
        raise _error(
            f"{INDEX_NAME} and the shards do not agree",
            seen=f"{len(absent)} tensors are in no shard: {absent[:10]!a}",
            expected="every tensor in the shard that the index says",
        )
    stale = sorted({p.name for p in folder.glob("model*.safetensors")} - set(weight_map.values()))
    if stale:
        raise _error(
            "shards that the index does not name",
            seen=ascii(stale[:10]),
            expected="only the shards of the index",
            fix="remove them, or download the whole checkpoint again",
        )
    return tensors


def _find(folder: Path, name: str) -> Path | None:
    try:
        return file_in_folder(folder, name)
    except FileNotFoundError:
        return None


def _error(what: str, *, seen: str, expected: str, fix: str = "download the whole checkpoint again") -> CheckpointError:
    return CheckpointError(what, seen=seen, expected=expected, fix=fix)
