"""What export promises about its files, and that its own check sees what is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import xxhash

from kimi_deploy.checkpoint import Checkpoint
from kimi_deploy.contract import METADATA_KEY, GraphContract
from kimi_deploy.errors import ExportError, KimiDeployError, UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx.check import check_graph
from kimi_deploy.onnx.weight_files import check_weights, layout_of
from kimi_deploy.onnx.weights import plan_weights
from kimi_deploy.ops.registry import OPS
from tests.graph.conftest import export


@pytest.fixture
def copy(exported: Callable[..., Path], tmp_path: Path) -> Path:
    """A private copy of the float32 export of "softplus"."""
    return shutil.copytree(exported("softplus"), tmp_path / "copy")


def test_the_graph_does_not_say_where_it_was_made(copy: Path) -> None:
    assert str(Path(onnx.__file__).parents[1]).encode() not in (copy / "model.onnx").read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in (copy / "model.onnx").read_bytes()


def check(folder: Path, model: Path) -> None:
    """The checks of export on files that exist, with the digests of what the checkpoint says anew."""
    checkpoint = Checkpoint.open(model)
    graph = check_graph(folder / "model.onnx", GraphContract.of(checkpoint.config, "float32"))
    plan = plan_weights(graph, checkpoint, "float32")
    digests = {
        index: tuple(xxhash.xxh3_128_hexdigest(value.tobytes()) for value in piece.produce())
        for index, piece in enumerate(plan.pieces)
    }
    check_weights(plan, layout_of(graph, plan, folder), folder, digests.__getitem__, lambda n: None)


def edit(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    onnx.save(model, folder / "model.onnx")


def test_the_files_are_there_and_match_the_manifest(exported: Callable[..., Path]) -> None:
    folder = exported("softplus")
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    assert {"model.onnx", "weights.bin", "config.json"} <= set(manifest.files)
    assert manifest.op_abi == {n: s.abi for n, s in OPS.items() if n != "QuantizedMixtureOfExperts"}


def test_nodes_name_their_plugin_and_abi_and_carry_every_attribute(exported: Callable[..., Path]) -> None:
    model = ir.load(exported("softplus") / "model.onnx")
    nodes = [n for n in model.graph if n.domain == "kimi"]
    assert [n.op_type for n in nodes].count("KimiDeltaAttention") == 2
    for node in nodes:
        spec = OPS[node.op_type]
        assert node.attributes["plugin_namespace"].value == "kimi"
        assert node.attributes["abi"].value == spec.abi
        assert {a.name for a in spec.attributes} <= set(node.attributes)


def test_no_dimension_but_the_contracts_is_fixed(exported: Callable[..., Path]) -> None:
    model = ir.load(exported("softplus") / "model.onnx")
    dims = {d.value for v in (*model.graph.inputs, *model.graph.outputs) for d in v.shape if not isinstance(d, int)}
    assert dims == {"batch", "sequence", "capacity", "num_logits"}


def test_an_untouched_export_passes_its_check(copy: Path, models: dict[str, Path]) -> None:
    check(copy, models["softplus"])


def test_one_flipped_weight_bit_is_found(copy: Path, models: dict[str, Path]) -> None:
    data = bytearray((copy / "weights.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "weights.bin").write_bytes(data)
    with pytest.raises(ExportError, match="other values"):
        check(copy, models["softplus"])


def stored(folder: Path, name: str) -> np.ndarray:
    """The initializer `name` where it lies in its file: writing to it changes the file."""
    tensor = ir.load(folder / "model.onnx").graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return np.memmap(folder / tensor.location, tensor.dtype.numpy(), "r+", tensor.offset or 0, tuple(tensor.shape))


def drop(experts: np.ndarray) -> None:
    experts[2] = 0


def swap(experts: np.ndarray) -> None:
    experts[[0, 3]] = experts[[3, 0]]


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("fault", [drop, swap])
def test_a_dropped_or_swapped_expert_is_found(
    fault: Callable[[np.ndarray], None], part: str, copy: Path, models: dict[str, Path]
) -> None:
    """The tensor keeps its name, shape and count: only values can tell."""
    name = f"model.layers.1.mlp.experts.{part}"
    fault(stored(copy, name))
    with pytest.raises(ExportError, match=name):
        check(copy, models["softplus"])


def test_a_weight_nobody_reads_is_found(copy: Path, models: dict[str, Path]) -> None:
    def unhook(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name == "model.layers.1.input_layernorm.weight":
                    node.input[index] = "model.layers.0.input_layernorm.weight"

    edit(copy, unhook)
    with pytest.raises(ExportError, match=r"layers\.1\.input_layernorm"):
        check(copy, models["softplus"])


@pytest.mark.parametrize("part", ["input", "output"])
def test_a_renamed_state_is_found(part: str, copy: Path, models: dict[str, Path]) -> None:
    def rename(model: onnx.ModelProto) -> None:
        value = getattr(model.graph, part)[-1]
        old, value.name = value.name, "renamed"
        for node in model.graph.node:
            names = node.input if part == "input" else node.output
            for index, name in enumerate(names):
                if name == old:
                    names[index] = "renamed"

    edit(copy, rename)
    with pytest.raises(ExportError, match=f"{part}s differ"):
        check(copy, models["softplus"])


def test_a_fixed_batch_is_found(copy: Path, models: dict[str, Path]) -> None:
    def fix(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2

    edit(copy, fix)
    with pytest.raises(ExportError):
        check(copy, models["softplus"])


def test_missing_metadata_is_found(copy: Path, models: dict[str, Path]) -> None:
    def strip(model: onnx.ModelProto) -> None:
        kept = [p for p in model.metadata_props if p.key != METADATA_KEY]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)

    edit(copy, strip)
    with pytest.raises(ExportError, match="metadata"):
        check(copy, models["softplus"])


def test_an_output_that_exists_is_kept_unless_forced(copy: Path, models: dict[str, Path]) -> None:
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="--force"):
        export(models["softplus"], copy)
    assert (copy / "manifest.json").read_bytes() == before


def test_a_bad_checkpoint_is_refused_before_anything_is_written(models: dict[str, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(models["softplus"], tmp_path / "broken")
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(KimiDeployError):
        export(broken, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def test_a_full_disk_is_refused_before_anything_is_written(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match="disk space"):
        export(models["softplus"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_exports_of_one_checkpoint_are_byte_identical(models: dict[str, Path], tmp_path: Path) -> None:
    first, second = (export(models["tied"], tmp_path / name) for name in ("a", "b"))
    for name in ("model.onnx", "weights.bin"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
