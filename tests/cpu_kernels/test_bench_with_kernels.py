"""bench runs the library that --kernels names, in every mode, and says which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kimi_deploy.bench.floors import Rates
from kimi_deploy.cli.main import cli
from kimi_deploy.errors import UsageError
from kimi_deploy.runtime.ort_kernels import OrtKernels
from tests.configs import config
from tests.graph.conftest import export
from tests.models import write_model

OPS = ["KimiDeltaAttention", "LatentAttention", "MixtureOfExperts"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("kernels")
    model = write_model(root / "model", config(layers="KM"), tokenizer=False)
    return model, export(model, root / "export")


def bench(folders: tuple[Path, Path], library: OrtKernels, *words: str) -> str:
    """What the command prints with `library`."""
    arguments = ["bench", *map(str, folders), "--kernels", str(library.path), "--threads", "1", *words]
    return CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout


def kernels_of(library: OrtKernels) -> dict[str, object]:
    return {"ops": OPS, "library": library.sha256, "instruction_set": library.instruction_set}


def test_kernels_and_bodies_are_measured_beside_each_other(
    folders: tuple[Path, Path], library: OrtKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_deploy.bench.run._rates", lambda threads: Rates(3e10, 1e11))
    sizes = ["--context", "8", "--decode-steps", "2", "--rounds", "1", "--repeats", "1"]
    saved = tmp_path / "report.json"
    text = bench(folders, library, "--backend", "ort", "--backend", "ort-bodies", *sizes, "-o", str(saved))
    results = json.loads(saved.read_text())["points"][0]["results"]
    assert results["ort"]["kernels"] == kernels_of(library)
    assert results["ort-bodies"]["kernels"] is None
    assert f"\nort: kernels of library {library.sha256[:16]} ({library.instruction_set})\n" in text
    assert "\nort-bodies: function bodies\n" in text


def test_a_library_that_an_export_has_no_use_for_is_refused(
    folders: tuple[Path, Path], library: OrtKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_deploy.bench.run.run_bench", lambda *_: pytest.fail("something was measured"))
    half = folders[0], export(folders[0], tmp_path / "half", dtype="float16")
    with pytest.raises(UsageError, match="no kernel for this export"):
        bench(half, library, "--backend", "ort")


def test_a_profile_shows_kernels_as_the_operators_they_are(
    folders: tuple[Path, Path], library: OrtKernels, tmp_path: Path
) -> None:
    words = ["--profile", str(tmp_path / "p"), "--prompt-tokens", "8", "--decode-steps", "2", "--json"]
    report = json.loads(bench(folders, library, *words))
    assert report["kernels"] == kernels_of(library)
    for phase in ("prefill", "decode"):
        operators, layers = (report["phases"][phase][table] for table in ("operators", "layers"))
        assert [operators[op]["calls"] for op in ("KimiDeltaAttention", "LatentAttention", "MixtureOfExperts")] == [
            1
        ] * 3
        assert "LinearAttention" not in operators
        assert {"layer 0", "layer 1"} <= layers.keys()


def test_curve_and_long_context_say_which_kernels_ran(
    folders: tuple[Path, Path], library: OrtKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_deploy.cli.bench_context.CURVE_LENGTHS", (4,))
    for mode in (["--curve"], ["--long-context", "1024"]):
        report = json.loads(bench(folders, library, *mode, "--decode-steps", "2", "--json"))
        assert report["kernels"] == kernels_of(library)
