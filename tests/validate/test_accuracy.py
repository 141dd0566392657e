"""The report in an artefact's folder: attached by hash, stale when either changes, and no obstacle to anything else."""

import json
import os
import shutil
from pathlib import Path

import onnxruntime
import pytest
from click.testing import CliRunner, Result

from kimi_deploy.cli.main import cli
from kimi_deploy.manifest import Manifest, sha256
from kimi_deploy.validate import accuracy
from tests.graph.conftest import export

QUICK = ["--max-tokens", "8", "--long-tokens", "8", "--greedy-tokens", "4", "--threads", "1"]
NAME = "report-onnx-runtime-cpu.json"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(w) for w in words], catch_exceptions=False)


def standing(folder: Path) -> list[tuple[str, str]]:
    """What `inspect` says of the folder's reports."""
    return [(a["standing"], a["detail"]) for a in json.loads(run("inspect", folder, "--json").stdout)["accuracy"]]


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    assert not Manifest.read(exported).reports  # a test that attaches to the shared export would spoil the others
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.fixture
def validated(model: Path, copy: Path) -> Path:
    assert run("validate", model, copy, *QUICK).exit_code == 0
    return copy


def test_a_validated_export_names_its_report_by_hash(validated: Path) -> None:
    manifest = Manifest.read(validated)
    assert manifest.reports == {NAME: sha256(validated / NAME)}
    report = json.loads((validated / NAME).read_text())
    assert report["artefact"] == manifest.artefact_hash()
    assert report["passed"] is True
    assert report["whole"] is True
    manifest.verify(validated)
    assert standing(validated) == [("pass", "")]
    words = f"accuracy   ONNX Runtime (cpu): pass (onnxruntime {onnxruntime.__version__}, function bodies)"
    assert words in run("inspect", validated).stdout


def test_the_same_validation_writes_the_same_report(model: Path, validated: Path) -> None:
    before = (validated / NAME).read_bytes()
    run("validate", model, validated, *QUICK)
    assert (validated / NAME).read_bytes() == before
    assert str(validated).encode() not in before


def test_without_a_report_inspect_says_so(copy: Path) -> None:
    assert standing(copy) == []
    assert "no report (kimi-deploy validate writes one)" in run("inspect", copy).stdout


def test_a_changed_artefact_makes_its_report_stale(validated: Path) -> None:
    # made anew: files and manifest agree, and the report is of other files
    (validated / "config.json").write_text((validated / "config.json").read_text() + " ")
    assert standing(validated) == [("stale", "the artefact has changed since")]
    Manifest.read(validated).write(validated)
    assert run("inspect", validated).exit_code == 0
    assert standing(validated) == [("stale", "the artefact has changed since")]


def test_a_report_of_another_version_is_stale(validated: Path) -> None:
    report = json.loads((validated / NAME).read_text()) | {"report_version": 1, "kernels": []}
    accuracy.attach(validated, report)
    assert standing(validated) == [("stale", "the report is of version 1, not 2")]


def test_inspect_names_the_library_that_a_report_was_measured_with(validated: Path) -> None:
    used = {"ops": ["KimiDeltaAttention"], "library": "0123456789abcdef" * 4, "instruction_set": "x86-64-v3"}
    accuracy.attach(validated, json.loads((validated / NAME).read_text()) | {"kernels": used})
    assert "kernels of library 0123456789abcdef (x86-64-v3)" in run("inspect", validated).stdout


@pytest.mark.parametrize("gone", [True, False])
def test_a_changed_or_missing_report_is_not_believed(gone: bool, validated: Path) -> None:
    if gone:
        (validated / NAME).unlink()
    else:
        (validated / NAME).write_text((validated / NAME).read_text() + " ")
    expected = "the report is missing" if gone else "the report is not the one that was attached"
    assert standing(validated) == [("stale", expected)]


def test_a_failing_report_is_attached_too(model: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from kimi_deploy.validate.tolerances import tolerance

    tight = replace(tolerance("graph_float32"), peak=1e-12)
    monkeypatch.setattr("kimi_deploy.validate.run.tolerance", lambda name: tight)
    assert run("validate", model, copy, *QUICK).exit_code == 1
    assert standing(copy) == [("fail", "")]


@pytest.mark.parametrize("words", [["--no-attach"], ["--only", "prefill"], ["--prompt-index", "0"], ["--layer", "0"]])
def test_a_part_or_a_refusal_attaches_nothing(words: list[str], model: Path, copy: Path) -> None:
    assert run("validate", model, copy, *QUICK, *words).exit_code == 0
    assert not (copy / NAME).exists()
    assert standing(copy) == []


def test_a_folder_that_cannot_be_written_is_a_warning(model: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(accuracy, "write_text", refuse)
    done = run("validate", model, copy, *QUICK)
    assert done.exit_code == 0
    assert "warning: the report is not attached" in done.stderr
    assert "Read-only file system" in done.stderr


def test_an_export_with_a_report_can_be_replaced(model: Path, validated: Path) -> None:
    assert run("export", model, "-o", validated, "--force").exit_code == 0
    assert not (validated / NAME).exists()


def test_the_manifest_refuses_a_report_outside_the_folder(model: Path, tmp_path: Path) -> None:
    folder = export(model, tmp_path / "made")
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(raw | {"reports": {"../report.json": "0" * 64}}))
    done = CliRunner().invoke(cli, ["inspect", str(folder)])
    assert "the name of a file beside the manifest" in str(done.exception)
