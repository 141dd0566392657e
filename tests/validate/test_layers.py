"""Layer by layer: an honest export passes, float32 and quantised, and a fault is reported for the layer it is in."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from kimi_deploy.checkpoint import Checkpoint
from kimi_deploy.cli.main import cli
from kimi_deploy.errors import ManifestError, UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.quantization.scheme import parse_scheme
from kimi_deploy.quantization.selection import quantized_parameters, settled
from kimi_deploy.validate.layers import LayerRow, validate_layers
from tests.configs import config
from tests.graph.conftest import export, no_progress
from tests.models import write_model

WIDE = {"hidden_size": 64, "kv_lora_rank": 32, "moe_intermediate_size": 32, "intermediate_size": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("layers") / "model", config("KKM", **WIDE))


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    root = tmp_path_factory.mktemp("exports")

    def get(scheme: str | None) -> Path:
        output = root / (scheme or "float32")
        if not output.exists():
            export(model, output, quantization=parse_scheme(scheme) if scheme else None)
        return output

    return get


def layers(model: Path, export: Path) -> list[LayerRow]:
    return validate_layers(model, export, tokens=20, threads=1, progress=no_progress)


@pytest.mark.parametrize("scheme", [None, "int4,group=32,head,embeddings", "int8,group=32,rtn"])
def test_every_layer_of_an_honest_export_agrees(
    scheme: str | None, model: Path, exported: Callable[[str | None], Path]
) -> None:
    rows = layers(model, exported(scheme))
    assert all(row.passed for row in rows), [r for r in rows if not r.passed]
    kda = [f"{layer}.{what}" for layer in (0, 1) for what in ("output", "conv_state", "recurrent_state")]
    wanted = {"embeddings", *kda, "2.output", "2.latent", "logits"}
    for step in ("prefill", "decode"):
        assert {row.tensor for row in rows if row.step == step} == wanted


@pytest.mark.parametrize(
    ("weight", "tensor"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("model.layers.1.mlp.experts.down_proj", "1.output"),
        ("model.layers.2.self_attn.o_proj.weight", "2.output"),
        ("lm_head.weight", "logits"),
    ],
)
def test_a_wrong_weight_is_reported_for_its_layer_alone(
    weight: str, tensor: str, model: Path, exported: Callable[[str | None], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(exported(None), tmp_path / "wrong")
    stored = ir.load(folder / "model.onnx").graph.initializers[weight].const_value
    assert isinstance(stored, ir.ExternalTensor)
    values = np.memmap(folder / stored.location, np.float32, "r+", stored.offset or 0, tuple(stored.shape))
    values *= np.float32(1.01)
    values.flush()
    Manifest.read(folder).write(folder)
    done = CliRunner().invoke(
        cli, ["validate", str(model), str(folder), "--layer-by-layer", "--threads", "1", "--json"]
    )
    assert done.exit_code == 1
    failed = {row["tensor"] for row in json.loads(done.stdout)["rows"] if not row["passed"]}
    assert failed == {tensor}


def test_quantised_embeddings_that_forget_their_zero_points_are_reported(
    model: Path, exported: Callable[[str | None], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(exported("int4,group=32,head,embeddings"), tmp_path / "wrong")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    (node,) = [n for n in graph.graph.node if n.op_type == "GatherBlockQuantized"]
    del node.input[3:]
    onnx.save(graph, folder / "model.onnx")
    Manifest.read(folder).write(folder)
    assert {row.tensor for row in layers(model, folder) if not row.passed} == {"embeddings"}


def test_levels_of_other_weights_are_reported_for_their_parameter(
    model: Path, exported: Callable[[str | None], Path], tmp_path: Path
) -> None:
    """Two experts changed places: the layer is computed rightly, from the wrong levels."""
    folder = shutil.copytree(exported("int4,group=32,head,embeddings"), tmp_path / "wrong")
    name = "model.layers.1.mlp.experts.down_proj"
    for part in ("levels", "scales", "zero_points"):
        stored = ir.load(folder / "model.onnx").graph.initializers[f"{name}_{part}"].const_value
        assert isinstance(stored, ir.ExternalTensor)
        shape = tuple(stored.shape)
        dtype = np.float32 if part == "scales" else np.uint8
        values = np.memmap(folder / stored.location, dtype, "r+", stored.offset or 0, shape)
        values[[0, 1]] = values[[1, 0]]
        values.flush()
    with pytest.raises(ManifestError, match="another sha256"):
        layers(model, folder)
    Manifest.read(folder).write(folder)
    assert {(row.step, row.tensor) for row in layers(model, folder) if not row.passed} == {("weights", name)}


@pytest.mark.parametrize("scheme", ["int4,group=32,head,embeddings", "int8,group=32,rtn"])
def test_the_levels_of_every_quantised_parameter_are_compared(
    scheme: str, model: Path, exported: Callable[[str | None], Path]
) -> None:
    wanted = settled(parse_scheme(scheme), Checkpoint.open(model).config, "float32")
    seen = [row.tensor for row in layers(model, exported(scheme)) if row.step == "weights"]
    assert sorted(seen) == sorted(quantized_parameters(Checkpoint.open(model).config, wanted))


def test_another_checkpoint_and_another_dtype_are_refused(
    model: Path, exported: Callable[[str | None], Path], tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", config("KKM", **WIDE), seed=3)
    with pytest.raises(UsageError, match="another checkpoint"):
        layers(other, exported(None))
    folder = shutil.copytree(exported(None), tmp_path / "half")
    manifest = Manifest.read(folder)
    manifest.details["dtype"] = "float16"
    manifest.write(folder)
    with pytest.raises(UsageError, match="float32"):
        layers(model, folder)
