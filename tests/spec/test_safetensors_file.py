"""The safetensors reader refuses every file that is damaged or made to deceive."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_deploy.checkpoint.files import INDEX_NAME, SINGLE_NAME, find_tensors
from kimi_deploy.checkpoint.safetensors_file import read_header
from kimi_deploy.errors import CheckpointError, UsageError
from kimi_deploy.manifest import ArtefactKind, Manifest
from tests.checkpoints import safetensors_bytes, write_safetensors


def entry(begin: int, end: int, dtype: object = "F32", shape: object = None) -> dict[str, Any]:
    size = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": size, "data_offsets": [begin, end]}


def refused(tmp_path: Path, data: bytes, match: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=match):
        read_header(tmp_path / "x.safetensors")


def test_a_file_of_the_safetensors_library_is_read(tmp_path: Path) -> None:
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((), np.float16), "c": np.ones((0, 4))}
    safetensors.numpy.save_file(values, tmp_path / "x.safetensors", {"format": "np"})
    table = read_header(tmp_path / "x.safetensors")
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in table.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("F16", (), 2),
        "c": ("F64", (0, 4), 0),
    }
    data = (tmp_path / "x.safetensors").read_bytes()
    assert data[table["a"].offset :][:24] == values["a"].tobytes()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = safetensors_bytes({"a": entry(0, 40)}, bytes(40))
    for length in range(len(whole)):
        refused(tmp_path, whole[:length], "not a valid safetensors file")


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, safetensors_bytes({"a": entry(0, 8)}, bytes(9)), "bytes, as the header says")


@pytest.mark.parametrize("length", [100_000_001, 1 << 63, (1 << 64) - 1])
def test_a_header_that_is_too_long_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    refused(tmp_path, length.to_bytes(8, "little") + b"{}", "at most 100000000")


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, (3).to_bytes(8, "little") + b"{}", "a header of 3 bytes in a file of 10")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"a\xff": 1}',
        b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, '
        b'"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [0], "data_offsets": [0, 0]}}',
        b'{"a":' * 50_000,
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
    ids=["empty", "list", "cut", "not utf-8", "name not utf-8", "tensor twice", "key twice", "deep", "long number"],
)
def test_a_header_that_is_not_strict_json_is_refused(tmp_path: Path, header: bytes) -> None:
    refused(tmp_path, safetensors_bytes(header), "the header of x.safetensors is not valid")


def test_the_reason_is_quoted_whole(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(b"{"))
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "x.safetensors")
    assert caught.value.seen.startswith("Expecting property name")
    assert caught.value.seen.endswith("(char 1)")


@pytest.mark.parametrize(
    ("header", "size", "match"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "'b' leaves a gap"),
        ({"a": entry(4, 8)}, 8, "'a' leaves a gap"),
        ({"a": entry(0, 8)}, 4, "12 bytes|as the header says"),
        ({"a": entry(0, 1 << 50)}, 4, "as the header says"),
        ({"a": entry(0, 8, "BF16", [2])}, 8, "4 bytes for BF16"),
        ({"a": entry(0, 8, "F32", [3])}, 8, "12 bytes for F32"),
        ({"a": entry(0, 8, "F32", [1 << 40, 1 << 40])}, 8, "bytes for F32"),
        ({"a": entry(0, 8, "F32", [-1, -2])}, 8, "shape"),
        ({"a": entry(0, 8, "F32", [2.0])}, 8, "shape"),
        ({"a": entry(0, 4, "F32", [True])}, 4, "shape"),
        ({"a": entry(0, 8, "F32", "2")}, 8, "shape"),
        ({"a": entry(0, 4, "F32", [1] * 9)}, 4, "shape"),
        ({"a": entry(0, 0, "F32", [0, 10**30])}, 0, "shape"),
        ({"a": entry(0, 8, "F31")}, 8, "dtype 'F31'"),
        ({"a": entry(0, 8, ["F32"])}, 8, "dtype"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, 8, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, 8, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, 8, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, float("nan")]}}, 8, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "dtype, shape and data_offsets"),
        ({"a": entry(0, 8) | {"sparse": True}}, 8, "dtype, shape and data_offsets"),
        ({"a": 3}, 8, "dtype, shape and data_offsets"),
    ],
)
def test_a_table_that_does_not_add_up_is_refused(tmp_path: Path, header: dict, size: int, match: str) -> None:
    refused(tmp_path, safetensors_bytes(header, bytes(size)), match)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=4), st.booleans())
def test_no_damage_is_read_past_the_file_or_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, position: int, patch: bytes, insert: bool
) -> None:
    whole = safetensors_bytes({"a": entry(0, 40), "b": entry(40, 48, "BF16", [2, 2])}, bytes(48))
    position %= len(whole)
    rest = whole[position if insert else position + len(patch) :]
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(whole[:position] + patch + rest)
    try:
        table = read_header(path)
    except CheckpointError:
        return
    assert all(8 <= t.offset <= t.offset + t.nbytes <= path.stat().st_size for t in table.values())


def shards(folder: Path, weight_map: object = None) -> Path:
    write_safetensors(folder / "model-1.safetensors", {"a": np.ones(2), "b": np.ones(3)})
    write_safetensors(folder / "model-2.safetensors", {"c": np.ones(4)})
    default = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    index = {"metadata": {}, "weight_map": default if weight_map is None else weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    assert {n: t.file for n, t in find_tensors(shards(tmp_path)).items()} == {
        "a": "model-1.safetensors",
        "b": "model-1.safetensors",
        "c": "model-2.safetensors",
    }


ONE, TWO = "model-1.safetensors", "model-2.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": ONE, "b": ONE, "c": TWO, "d": TWO}, "1 tensors are in no shard: \\['d'\\]"),
        ({"a": ONE, "c": TWO}, "'b' is in model-1.safetensors"),
        ({"a": ONE, "b": TWO, "c": TWO}, "'b' is in model-1.safetensors"),
        ({"a": ONE, "b": ONE}, "shards that the index does not name"),
        ({"a": ONE, "b": ONE, "c": "model-3.safetensors"}, "a shard of the index is missing"),
        ({"a": ONE, "b": ONE, "c": "../model-2.safetensors"}, "leaves the model folder"),
        ({"a": ONE, "b": ONE, "c": "/etc/passwd"}, "leaves the model folder"),
        ({"a": ONE, "b": ONE, "c": "sub/model-2.safetensors"}, "leaves the model folder"),
        ({"a": ONE, "b": ONE, "c": "C:\\model-2.safetensors"}, "leaves the model folder"),
        ({"a": ONE, "b": ONE, "c": ".."}, "leaves the model folder"),
        ({"a": ONE, "b": ONE, "c": ""}, "leaves the model folder"),
        ({"a": ONE, "b": ONE, "c": "model-2.safetensors\u0000"}, "leaves the model folder"),
        ({"a": ONE, "b": ONE, "c": INDEX_NAME}, "another kind"),
        ({"a": ONE, "b": ONE, "c": 3}, "no usable weight_map"),
        ([], "no usable weight_map"),
    ],
)
def test_an_index_that_is_not_true_is_refused(tmp_path: Path, weight_map: object, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        find_tensors(shards(tmp_path, weight_map))


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(tmp_path / "x.safetensors", {"a": np.ones(2)})
    (folder / SINGLE_NAME).symlink_to("../x.safetensors")
    with pytest.raises(CheckpointError, match="a link leaves the model folder"):
        find_tensors(folder)
    (tmp_path / "x.safetensors").rename(folder / "x.safetensors")
    (folder / SINGLE_NAME).unlink()
    (folder / SINGLE_NAME).symlink_to("x.safetensors")
    assert set(find_tensors(folder)) == {"a"}


def test_the_links_of_a_hub_cache_are_followed_into_its_own_blobs_only(tmp_path: Path) -> None:
    folder = tmp_path / "models--m" / "snapshots" / "abc"
    blobs = tmp_path / "models--m" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    write_safetensors(blobs / "0123", {"a": np.ones(2)})
    (folder / SINGLE_NAME).symlink_to("../../blobs/0123")
    assert set(find_tensors(folder)) == {"a"}
    write_safetensors(tmp_path / "elsewhere", {"a": np.ones(2)})
    (folder / SINGLE_NAME).unlink()
    (folder / SINGLE_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a link leaves the model folder"):
        find_tensors(folder)


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).symlink_to(SINGLE_NAME)
    with pytest.raises(CheckpointError):
        find_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match="is a pickle") as caught:
        find_tensors(tmp_path)
    assert "safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "files", "words"),
    [
        ("onnx", ("model.onnx", "weights.bin"), "is an export, not a checkpoint"),
        ("engine", ("engine.plan", "weights.bin"), "is an engine, not a checkpoint"),
    ],
)
def test_an_export_or_an_engine_is_named_as_such(
    tmp_path: Path, kind: ArtefactKind, files: tuple[str, ...], words: str
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    Manifest(kind, {"checkpoint": "f" * 64}, {}, {"dtype": "float32", "body": "ort"}).write(tmp_path)
    with pytest.raises(UsageError, match=words):
        find_tensors(tmp_path)


def test_no_weights_and_two_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        find_tensors(tmp_path)
    write_safetensors(shards(tmp_path) / SINGLE_NAME, {"a": np.ones(2)})
    with pytest.raises(CheckpointError, match="two checkpoints"):
        find_tensors(tmp_path)
