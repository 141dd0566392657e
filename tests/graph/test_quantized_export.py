"""A quantised export stores what the quantiser makes, says so, and nothing else changes."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from kimi_deploy.checkpoint import Checkpoint
from kimi_deploy.cli.main import cli
from kimi_deploy.errors import UsageError
from kimi_deploy.inspection import inspect_folder
from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx.export import export_model
from kimi_deploy.quantization.blocks import pack, quantize
from kimi_deploy.quantization.scheme import Scheme, parse_scheme
from tests.configs import config
from tests.graph.conftest import no_progress
from tests.models import write_model

SPEC = "int4,group=32,asymmetric,hqq,head,embeddings"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "model"
    return write_model(folder, config("KM", intermediate_size=64, moe_intermediate_size=96))


@pytest.fixture(scope="module")
def exported(model: Path) -> Path:
    output = model.parent / "export"
    done = CliRunner().invoke(cli, ["export", str(model), "-o", str(output), "--quantize", SPEC])
    assert done.exit_code == 0, done.output
    return output


def test_every_stored_value_is_the_quantisers(model: Path, exported: Path) -> None:
    checkpoint = Checkpoint.open(model)
    graph = ir.load(exported / "model.onnx").graph
    stored = {name: value.const_value.numpy() for name, value in graph.initializers.items() if value.const_value}
    found = 0
    for resolved in checkpoint.resolve():
        name = resolved.weight.name
        weight = checkpoint.load(name, "float32")
        if name in stored:
            assert np.array_equal(stored[name].ravel(), weight.ravel()) or np.array_equal(stored[name], weight.T)
            continue
        found += 1
        made = quantize(weight, 4, 32, symmetric=False, method="hqq")
        assert np.array_equal(stored[f"{name}_levels"].reshape(*weight.shape[:-1], -1), pack(made.levels, 4))
        assert np.array_equal(stored[f"{name}_scales"], made.scales)
        assert np.array_equal(stored[f"{name}_zero_points"], pack(made.zero_points, 4))
    # qkv, o, dense gate_up and down; q, kv_a, o, experts twice, shared twice; head, embeddings
    assert found == 4 + 7 + 2


def test_the_manifest_and_inspect_say_what_was_done(exported: Path) -> None:
    manifest = Manifest.read(exported)
    record = manifest.details["quantization"]
    assert Scheme.from_dict(record) == parse_scheme(SPEC)
    assert record["parameters"] == {"embeddings": 1, "product": 10, "experts": 2}
    assert {"router", "kv_b_proj"} <= set(record["excluded"])
    assert record["weight_bytes"] < record["weight_bytes_before"]
    assert "QuantizedMixtureOfExperts" in manifest.op_abi
    assert "MixtureOfExperts" not in manifest.op_abi
    assert not inspect_folder(exported)["problems"]
    shown = CliRunner().invoke(cli, ["inspect", str(exported)]).output
    assert f"{SPEC.replace(',head', ',activations=int8,head')}" in shown
    assert "not quantised" in shown


def test_a_scheme_that_does_not_fit_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="group=32"):
        export_model(
            model,
            tmp_path / "out",
            dtype="float32",
            flavour="ort",
            overwrite=False,
            progress=no_progress,
            quantization=parse_scheme("int4,group=64"),
        )
    done = CliRunner().invoke(cli, ["export", str(model), "-o", str(tmp_path / "out"), "--quantize", "int5"])
    assert isinstance(done.exception, UsageError)
    assert not list(tmp_path.iterdir())


def test_an_engine_is_refused_with_the_way_out(exported: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["build-engine", str(exported), "-o", str(tmp_path / "engine")])
    assert isinstance(done.exception, UsageError)
    assert "without --quantize" in str(done.exception)
