"""validate passes a right export and fails, at the right place, graphs that are wrong in ways shapes do not show."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kimi_deploy.cli.main import cli
from kimi_deploy.errors import ManifestError, UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.validate.faults.catalogue import FAULTS
from kimi_deploy.validate.faults.graph import Graph
from kimi_deploy.validate.report import Report
from kimi_deploy.validate.run import Settings, validate_export
from kimi_deploy.validate.selection import CHECKS, QUANTIZED_CHECKS, Selection
from tests.cli.test_help_needs_nothing_heavy import run_blocked
from tests.configs import config
from tests.graph.conftest import no_progress
from tests.models import write_model


def validate(model: Path, exported: Path, max_tokens: int = 24, text: Path | None = None) -> Report:
    settings = Settings(max_tokens=max_tokens, long_tokens=70, greedy_tokens=24, text=text, threads=1)
    return validate_export(model, exported, settings, no_progress)


def planted(exported: Path, target: Path, name: str) -> Path:
    """A copy of the export with a fault of the catalogue, and a manifest as if export itself had made it."""
    graph = Graph(exported)
    next(f for f in FAULTS if f.name == name).plant(graph)
    graph.save(target)
    return target


def test_a_right_export_passes_every_check(model: Path, exported: Path) -> None:
    report = validate(model, exported)
    assert report.passed, report.first_failure
    # PyTorch's own noise in the export's dtype is measured only where that is not float32
    assert [line["check"] for line in report.summary()] == [
        c for c in CHECKS if c not in ("reference-dtype", *QUANTIZED_CHECKS)
    ]
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
    ("fault", "check", "tensor", "looking"),
    [
        ("swapped state", "prefill", "1.recurrent_state", "the delta rule"),
        ("missing attention scale", "prefill", "logits", "attention and its projection"),
        ("ignored past", "split-prefill", "1.recurrent_state", "the delta rule"),
        ("counted padding", "ragged-batch", "1.conv_state", "layer 0"),
    ],
)
def test_the_first_wrong_tensor_is_named_and_the_command_shows_just_that(
    fault: str, check: str, tensor: str, looking: str, model: Path, exported: Path, tmp_path: Path
) -> None:
    wrong = planted(exported, tmp_path / "wrong", fault)
    report = validate(model, wrong)
    assert not report.passed
    assert report.failure is not None
    assert (report.failure.row.check, report.failure.row.tensor) == (check, tensor)
    assert looking in report.failure.where_to_look
    words = shlex.split(report.failure.command)
    assert words[:4] == ["kimi-deploy", "validate", str(model), str(wrong)]
    done = CliRunner().invoke(cli, [*words[1:], "--json"])
    again = json.loads(done.stdout)
    assert done.exit_code == 1
    assert {(r["check"], r["prompt_index"]) for r in again["rows"]} == {(check, report.failure.row.prompt_index)}
    assert again["first_failure"]["tensor"] == tensor
    if tensor != "logits":
        assert {r["tensor"].split(".")[0] for r in again["rows"]} == {tensor.split(".")[0]}
    # a part is no verdict on the whole
    assert not Manifest.read(wrong).reports


def test_files_that_changed_after_export_are_refused(model: Path, exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    data = bytearray((copy / "weights.bin").read_bytes())
    data[100] ^= 1
    (copy / "weights.bin").write_bytes(data)
    with pytest.raises(ManifestError, match=r"weights\.bin"):
        validate(model, copy)


def test_another_checkpoint_is_refused_with_both_names(exported: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", config(layers="KKM", vocab_size=264), seed=1)
    with pytest.raises(UsageError, match=r"another checkpoint(?s:.*)made from 'model'(?s:.*)expected: .*/other"):
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{export}", "{model}"], "the arguments are swapped"),
        (["{model}", "{export}", "--only", "nonsense"], "there is no such check"),
        (["{model}", "{export}", "--html", "/no/such/folder/page.html"], "--html: no folder"),
    ],
)
def test_what_needs_no_model_is_refused_before_torch_is_imported(
    words: list[str], message: str, model: Path, exported: Path
) -> None:
    """Importing it takes seconds."""
    done = run_blocked("validate", *(word.format(model=model, export=exported) for word in words))
    assert done.returncode == 2
    assert message in done.stderr


def test_an_empty_report_has_proven_nothing() -> None:
    from kimi_deploy.validate.tolerances import tolerance

    assert not Report("none", tolerance("graph_float32")).passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nonsense"], "--only with one of reference-forms"),
        (["--prompt-index", "99"], "--prompt-index is out of range"),
        (["--layer", "7"], "0 to 2"),
        (["--only", "reference-dtype"], "compares nothing"),
        (["--html", "/no/such/folder/page.html"], "--html: no folder"),
    ],
)
def test_a_part_that_does_not_exist_is_refused(arguments: list[str], message: str, model: Path, exported: Path) -> None:
    done = CliRunner().invoke(cli, ["validate", str(model), str(exported), *arguments])
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)


def test_a_graph_that_gives_nan_fails_with_a_report_that_is_json(model: Path, exported: Path, tmp_path: Path) -> None:
    graph = Graph(exported)
    name = "model.layers.1.self_attn.conv_weight"
    graph.set_weight(name, graph.weight(name) + np.float32(np.nan))
    graph.save(tmp_path / "nan")
    words = ["validate", str(model), str(tmp_path / "nan"), "--json", "--html", str(tmp_path / "page.html")]
    sizes = ["--max-tokens", "8", "--long-tokens", "8", "--greedy-tokens", "4", "--threads", "1"]
    done = CliRunner().invoke(cli, [*words, *sizes])
    assert done.exit_code == 1

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found = json.loads(done.stdout, parse_constant=refuse)
    json.loads((tmp_path / "nan" / "report-onnx-runtime-cpu.json").read_text(), parse_constant=refuse)
    assert found["first_failure"]["tensor"] == "1.recurrent_state"
    assert "not finite" in found["first_failure"]["note"]
    assert "not finite" in (tmp_path / "page.html").read_text()


def test_each_line_of_a_prompts_file_is_a_prompt(model: Path, exported: Path, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("first\n\nsecond line\n", encoding="utf-8")
    settings = Settings(max_tokens=8, long_tokens=8, prompts_file=lines, threads=1, selection=Selection(("prefill",)))
    report = validate_export(model, exported, settings, no_progress)
    own = [p for p in report.facts["prompts"] if p["name"].startswith("prompts.txt")]
    assert own == [{"name": "prompts.txt:1", "tokens": 5}, {"name": "prompts.txt:3", "tokens": 8}]
    assert report.passed


def test_the_command_exits_0_or_1_and_prints_json(model: Path, exported: Path, tmp_path: Path) -> None:
    wrong = planted(exported, tmp_path / "wrong", "zeroed slice")
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
                "--no-attach",
                "--kernels",
                "none",
                "--max-tokens",
                "8",
                "--long-tokens",
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
