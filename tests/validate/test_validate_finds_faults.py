"""validate passes a right export and fails, at the right place, graphs that are wrong in ways shapes do not show."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kimi_deploy.errors import ManifestError, UsageError, ValidationError
from kimi_deploy.manifest import Manifest
from kimi_deploy.validate.report import Report
from kimi_deploy.validate.run import Settings, validate_export
from kimi_deploy.validate.selection import CHECKS
from tests.configs import config
from tests.graph.conftest import no_progress
from tests.models import write_model


def validate(model: Path, exported: Path, max_tokens: int = 24, text: Path | None = None) -> Report:
    settings = Settings(max_tokens=max_tokens, long_tokens=70, greedy_tokens=24, text=text, threads=1)
    return validate_export(model, exported, settings, no_progress)


Fault = Callable[[Path], None]
"""Edits the model.onnx and weights.bin of a folder."""


def planted(exported: Path, target: Path, fault: Fault) -> Path:
    """A copy of the export with a fault and the manifest written anew, as if export itself had made it."""
    shutil.copytree(exported, target)
    fault(target)
    Manifest.read(target).write(target)
    return target


def scale_weight(name: str, factor: float) -> Fault:
    def fault(folder: Path) -> None:
        model = ir.load(folder / "model.onnx")
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(np.array(value.const_value.numpy()) * np.float32(factor), name=name)
        ir.save(model, folder / "model.onnx", external_data="weights.bin")

    return fault


def swap_key_and_value_of_the_state(folder: Path) -> None:
    """Square, so that every shape check passes."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    name = "present.1.recurrent_state"
    for node in model.graph.node:
        if name in node.output:
            node.output[list(node.output).index(name)] = "unswapped"
    model.graph.node.append(onnx.helper.make_node("Transpose", ["unswapped"], [name], perm=[0, 1, 3, 2]))
    onnx.save(model, folder / "model.onnx")


def test_a_right_export_passes_every_check(model: Path, exported: Path) -> None:
    report = validate(model, exported)
    assert report.passed, report.first_failure
    # PyTorch's own noise in the export's dtype is measured only where that is not float32
    assert [line["check"] for line in report.summary()] == [c for c in CHECKS if c != "reference-dtype"]
    assert {r.prompt for r in report.rows if r.check == "greedy"} == {"corpus 3"}  # the first passage of full length
    states = {r.tensor for r in report.rows if r.check == "prefill"}
    assert states == {
        "logits",
        "0.conv_state",
        "0.recurrent_state",
        "1.conv_state",
        "1.recurrent_state",
        "2.latent",
    }
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


@pytest.mark.parametrize(
    ("fault", "check", "tensor"),
    [
        (scale_weight("model.layers.1.self_attn.conv_weight", 1.01), "prefill", "1.recurrent_state"),
        (scale_weight("model.layers.1.mlp.gate.e_score_correction_bias", 0.0), "prefill", "2.latent"),
        (scale_weight("model.layers.2.self_attn.kv_b_proj.weight", 1.01), "prefill", "logits"),
        (swap_key_and_value_of_the_state, "prefill", "1.recurrent_state"),
    ],
    ids=["conv weight", "router bias", "kv_b weight", "state order"],
)
def test_a_wrong_graph_fails_and_the_first_wrong_tensor_is_named(
    fault: Fault, check: str, tensor: str, model: Path, exported: Path, tmp_path: Path
) -> None:
    report = validate(model, planted(exported, tmp_path / "wrong", fault))
    assert not report.passed
    first = report.first_failure
    assert first is not None
    assert (first.check, first.tensor) == (check, tensor)


def test_files_that_changed_after_export_are_refused(model: Path, exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    data = bytearray((copy / "weights.bin").read_bytes())
    data[100] ^= 1
    (copy / "weights.bin").write_bytes(data)
    with pytest.raises(ManifestError, match=r"weights\.bin"):
        validate(model, copy)


def test_another_checkpoint_is_refused(exported: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", config(layers="KKM", vocab_size=264), seed=1)
    with pytest.raises(ValidationError, match="another checkpoint"):
        validate(other, exported)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"\xff\xfe\x00", "not UTF-8"), (b"", "empty")]
)
def test_a_text_that_cannot_be_used_is_named_before_a_model_is_loaded(
    content: bytes | None, message: str, model: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for runner in ("open_runner", "TorchRunner"):
        monkeypatch.setattr(f"kimi_deploy.validate.run.{runner}", None)
    text = tmp_path / "own.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(UsageError, match=rf"{message}(.|\n)*own\.txt"):
        validate(model, exported, text=text)


def test_folders_of_the_wrong_kind_are_told_apart(model: Path, exported: Path) -> None:
    with pytest.raises(UsageError, match="the arguments are swapped"):
        validate(exported, model)
    with pytest.raises(UsageError, match="MODEL is an export"):
        validate(exported, exported)
    with pytest.raises(UsageError, match="EXPORT is a checkpoint"):
        validate(model, model)


def test_an_empty_report_has_proven_nothing() -> None:
    from kimi_deploy.validate.tolerances import tolerance

    assert not Report("none", tolerance("graph_float32")).passed


def test_the_command_exits_0_or_1_and_prints_json(model: Path, exported: Path, tmp_path: Path) -> None:
    wrong = planted(exported, tmp_path / "wrong", scale_weight("model.layers.1.self_attn.conv_weight", 1.01))
    for folder, code in ((exported, 0), (wrong, 1)):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "kimi_deploy",
                "validate",
                str(model),
                str(folder),
                "--json",
                "--max-tokens",
                "8",
                "--greedy-tokens",
                "4",
                "--threads",
                "1",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert json.loads(done.stdout)["passed"] is (code == 0)
