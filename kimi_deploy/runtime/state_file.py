"""A snapshot as one safetensors file: its tensors under their past names, the rest in the metadata."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from kimi_deploy.checkpoint.cast import SAFETENSORS_NAMES
from kimi_deploy.checkpoint.safetensors_file import (
    TensorInfo,
    layout_header,
    read_header,
    read_metadata,
)
from kimi_deploy.contract import GraphContract
from kimi_deploy.errors import CheckpointError, StateError
from kimi_deploy.output_file import whole_file
from kimi_deploy.runtime.finite import check_finite
from kimi_deploy.runtime.snapshot import Snapshot, zero_unused
from kimi_deploy.runtime.storage import NUMPY_DTYPES
from kimi_deploy.strict_json import parse_json_object

FORMAT = "kimi_deploy.state"
VERSION = "2"
_MAX_LENGTH = 2**31 - 1


def contract_hash(contract: GraphContract) -> str:
    """16 hex digits over everything that two models must share to share a state."""
    return hashlib.sha256(contract.to_json().encode()).hexdigest()[:16]


def save_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Write `path` whole or not at all. Raises StateError when it cannot be written."""
    states = snapshot.contract.states
    arrays = [np.ascontiguousarray(snapshot.tensors[s.past_name]) for s in states]
    # an empty array has no memory to view
    data = [a.view(np.uint8).data if a.size else b"" for a in arrays]
    digest = hashlib.sha256()
    for part in data:
        digest.update(part)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "contract": contract_hash(snapshot.contract),
        "fingerprint": snapshot.fingerprint,
        "lengths": json.dumps(snapshot.lengths.tolist()),
        "capacity": str(snapshot.capacity),
        "notes": json.dumps(snapshot.notes),
        "sha256": digest.hexdigest(),
    }
    table = [(s.past_name, SAFETENSORS_NAMES[s.dtype], a.shape) for s, a in zip(states, arrays, strict=True)]
    header, _ = layout_header(table, path.name, metadata)
    try:
        with whole_file(path) as temporary, temporary.open("wb") as file:
            file.write(header)
            for part in data:
                file.write(part)
    except OSError as error:
        raise StateError("the state cannot be saved", seen=f"{path}: {error.strerror}") from error


def load_snapshot(path: Path, contract: GraphContract, fingerprint: str) -> Snapshot:
    """Read a file of `save_snapshot` for the model of `contract` and `fingerprint`; the file is not trusted.

    Raises StateError when it is missing, damaged (the sha256 of the tensors' bytes, in the order of the
    contract's states, is in the metadata), no state, of another version or model, or holds names, shapes, dtypes,
    lengths or values that the model's states cannot have.
    """
    infos, metadata = _header(path)
    if metadata.get("contract") != contract_hash(contract) or metadata.get("fingerprint") != fingerprint:
        raise StateError(
            "the state file is of another model",
            seen=f"contract {metadata.get('contract', '')!a}, fingerprint {metadata.get('fingerprint', '')[:24]!a}"[
                :200
            ],
            expected=f"contract {contract_hash(contract)!r}, fingerprint {fingerprint[:24]!r}",
            fix="load it with the model, and the dtype, that saved it",
        )
    lengths = _lengths(path, metadata.get("lengths", ""))
    capacity = _capacity(path, metadata.get("capacity", ""))
    notes = _notes(metadata)
    tensors = _read_tensors(path, infos, contract, lengths, metadata.get("sha256", ""))
    for state in contract.states:
        check_finite(contract, state, tensors[state.past_name], lengths)
    return Snapshot(contract, fingerprint, capacity, lengths, tensors, notes)


def read_summary(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    """The lengths int32 [batch] and the notes of a file of `save_snapshot`, from its header alone.

    Raises StateError when it is missing, damaged, no state or of another version.
    """
    _, metadata = _header(path)
    return _lengths(path, metadata.get("lengths", "")), _notes(metadata)


def _header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        infos, metadata = read_header(path), read_metadata(path)
    except OSError as error:
        raise StateError("the state file cannot be read", seen=f"{path}: {error.strerror}") from error
    except CheckpointError as error:
        raise _refusal(path, f"{error.what}: {error.seen}", error.expected) from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise _refusal(
            path,
            f"format {metadata.get('format', 'none')!a}, version {metadata.get('version', 'none')!a}"[:200],
            f"format {FORMAT!r}, version {VERSION!r}",
        )
    return infos, metadata


def _notes(metadata: dict[str, str]) -> dict[str, str]:
    notes = parse_json_object(metadata.get("notes", "{}").encode(), "the notes of the state file", StateError)
    return {str(k): str(v) for k, v in notes.items()}


def _read_tensors(
    path: Path, infos: dict[str, TensorInfo], contract: GraphContract, lengths: np.ndarray, sha256: str
) -> dict[str, np.ndarray]:
    wanted = {
        s.past_name: (SAFETENSORS_NAMES[s.dtype], s.shape(len(lengths), int(lengths.max()))) for s in contract.states
    }
    seen = {name: (info.dtype, info.shape) for name, info in infos.items()}
    if seen != wanted:
        wrong = min(n for n in wanted.keys() | seen.keys() if wanted.get(n) != seen.get(n))
        raise _refusal(path, f"{wrong!a}: {seen.get(wrong, 'missing')}"[:300], str(wanted.get(wrong, "no such tensor")))
    tensors = {}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for state in contract.states:
            info = infos[state.past_name]
            file.seek(info.offset)
            data = file.read(info.nbytes)
            digest.update(data)
            value = np.frombuffer(data, NUMPY_DTYPES[state.dtype]).reshape(info.shape)
            tensors[state.past_name] = zero_unused(value, lengths) if state.kind == "latent" else value
    if digest.hexdigest() != sha256:
        raise _refusal(path, f"tensors of sha256 {digest.hexdigest()}", f"sha256 {sha256[:64]!a}, as its metadata says")
    return tensors


def _lengths(path: Path, text: str) -> np.ndarray:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    ok = isinstance(value, list) and value and all(type(i) is int and 0 <= i <= _MAX_LENGTH for i in value)
    if not ok:
        raise _refusal(path, f"lengths {text[:100]!a}", "a list of token counts, one per row")
    return np.array(value, np.int32)


def _capacity(path: Path, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 11 and 1 <= int(text) <= _MAX_LENGTH):
        raise _refusal(path, f"capacity {text[:100]!a}", "a token count of at least 1")
    return int(text)


def _refusal(path: Path, seen: str, expected: str) -> StateError:
    return StateError(
        f"{path.name} is not a usable state file",
        seen=seen,
        expected=expected,
        fix="save the state again, or start without it",
    )
