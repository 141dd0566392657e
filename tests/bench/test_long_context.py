"""A long prompt streamed in chunks: every token once, in bounded memory, with a KDA state that never grows."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kimi_deploy.bench import long_context
from kimi_deploy.bench.long_context import CHUNK, SCORE_BYTES, SHORTEST_CHUNK, Point, _chunks, _marks, stream
from kimi_deploy.cli.main import cli
from kimi_deploy.errors import UsageError
from kimi_deploy.quantization.scheme import parse_scheme
from kimi_deploy.runtime.base import Runner
from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.runtime.state import State
from kimi_deploy.validate.faults.catalogue import FAULTS
from kimi_deploy.validate.faults.graph import Graph
from kimi_deploy.validate.tolerances import tolerance
from tests.configs import config
from tests.graph.conftest import export
from tests.models import write_model

DEMO = Path(__file__).parents[2] / "models" / "demo"
STEPS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("long")
    model = write_model(root / "model", config(layers="KM"))
    return model, export(model, root / "export")


@pytest.mark.parametrize("tokens", [1024, 1025, 5000, 1 << 20])
@pytest.mark.parametrize("tiled_from", [None, 128])
def test_chunks_and_decode_steps_cover_every_token_once(tokens: int, tiled_from: int | None) -> None:
    expected, marks = 0, _marks(tokens, STEPS)
    for start, stop in _chunks(tokens, STEPS, 4, CHUNK, tiled_from):
        assert start == expected
        assert start < stop <= tokens
        assert stop - start <= CHUNK
        # what bounds the memory: the scores of a chunk, or that it keeps none
        tiled = tiled_from is not None and tiled_from <= stop - start <= start
        assert tiled or 4 * 4 * (stop - start) * stop <= 2 * SCORE_BYTES or stop - start <= SHORTEST_CHUNK
        expected = stop + STEPS if stop in marks else stop
    assert expected == tokens + STEPS
    assert marks[-1] == tokens


def test_the_kda_state_is_constant_and_the_cache_grows_by_the_token(folders: tuple[Path, Path]) -> None:
    report = stream(folders[1], 2100, STEPS, 1)
    points = report["points"]
    assert [p["context"] for p in points] == [1024 + STEPS, 2048 + STEPS, 2100 + STEPS]
    # two heads of 16 x 16 float32, and a window of three for three projections of 32
    assert {p["kda_bytes"] for p in points} == {4 * (2 * 16 * 16 + 3 * 3 * 32)}
    assert report["kda_constant"] is True
    assert [p["latent_bytes"] for p in points] == [4 * (16 + 8) * p["context"] for p in points]
    assert all(p["prefill_seconds"] > 0 and p["decode_seconds"] > 0 for p in points)


def test_a_prefill_in_chunks_is_the_prefill_in_one_call(folders: tuple[Path, Path]) -> None:
    seen = stream(folders[1], 1024, STEPS, 1)["chunked_against_whole"]
    assert (seen["tokens"], seen["wrong"], seen["passed"]) == (1024, [], True)
    assert max(seen["logits_peak"], seen["state_peak"]) <= seen["bound"] == tolerance("graph_float32").peak


def _ignored_past(graph: Graph) -> None:
    next(f for f in FAULTS if f.name == "ignored past").plant(graph)


def _nan_logits(graph: Graph) -> None:
    graph.set_weight("lm_head.weight", graph.weight("lm_head.weight") + np.float32(np.nan))


@pytest.mark.parametrize(
    ("plant", "wrong"),
    [(_ignored_past, ["1.latent", "logits"]), (_nan_logits, ["logits"])],
)
def test_a_prefill_in_chunks_that_differs_or_is_no_number_fails_and_is_named(
    folders: tuple[Path, Path], tmp_path: Path, plant: Callable[[Graph], None], wrong: list[str]
) -> None:
    graph = Graph(folders[1])
    plant(graph)
    graph.save(tmp_path / "wrong")
    words = ["bench", str(folders[0]), str(tmp_path / "wrong"), "--long-context", "1024", "--decode-steps", "4"]
    done = CliRunner().invoke(cli, [*words, "--threads", "1", "-o", str(tmp_path / "report.json")])
    assert done.exit_code == 1, done.output
    assert f"FAIL: {', '.join(wrong)}" in done.stdout
    seen = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)["chunked_against_whole"]
    assert (seen["passed"], seen["wrong"]) == (False, wrong)


def test_a_quantised_export_is_compared_without_the_rounding_of_inputs(tmp_path: Path) -> None:
    """With it an error of 1e-7 may move a value by a whole step: 6e-4 of the logits' peak in this model."""
    exported = export(DEMO, tmp_path / "int4", quantization=parse_scheme("int4"))
    assert stream(exported, 1024, STEPS, 1)["chunked_against_whole"]["passed"]


def test_the_command_prints_a_table_and_writes_report_and_plot(folders: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["bench", *map(str, folders), "--long-context", "1024", "--decode-steps", "4", "--threads", "1"]
    done = CliRunner().invoke(cli, [*words, "--plot", f"{tmp_path}/p.png", "-o", f"{tmp_path}/r.json"])
    assert done.exit_code == 0, done.output
    assert "KDA state (B)" in done.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "r.json").read_text())["points"][0]["context"] == 1028


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_ended(folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    stream(folders[1], 2048, STEPS, 1, checkpoint=whole)
    stream(folders[1], 1024, STEPS, 1, checkpoint=parts)
    consumed: list[int] = []
    report = stream(folders[1], 2048, STEPS, 1, consumed.append, checkpoint=parts)
    assert [p["context"] for p in report["points"]] == [1024 + STEPS, 2048 + STEPS]
    assert consumed[0] == 1024 + STEPS
    assert sum(consumed) == 2048 + STEPS
    runner = OrtRunner(folders[1], threads=1)
    once, twice = (runner.load_state(path).tensors() for path in (whole, parts))
    for name, value in once.items():
        assert np.array_equal(twice[name], value), name
    with pytest.raises(UsageError, match="other numbers"):
        stream(folders[1], 2048, STEPS + 1, 1, checkpoint=parts)


def test_a_run_with_other_kernels_does_not_go_on_from_the_checkpoint(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream(folders[1], 1024, STEPS, 1, checkpoint=tmp_path / "state", kernels="none")
    monkeypatch.setattr(long_context, "ops_run_as", lambda _: "kernels of another library")
    with pytest.raises(UsageError, match=r"function bodies(?s:.*)kernels of another library"):
        stream(folders[1], 2048, STEPS, 1, checkpoint=tmp_path / "state", kernels="none")


def test_a_kda_state_that_grows_fails(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = long_context._point

    def growing(runner: Runner, state: State, *seconds: float) -> Point:
        point = right(runner, state, *seconds)
        return replace(point, kda_bytes=point.kda_bytes + point.context)

    monkeypatch.setattr(long_context, "_point", growing)
    words = ["bench", *map(str, folders), "--long-context", "1030", "--decode-steps", "4", "--threads", "1"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 1, done.output
    assert "the KDA state grew: FAIL" in done.stdout


def test_what_cannot_be_measured_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="too short"):
        stream(folders[1], 100, STEPS, 1)
    with pytest.raises(UsageError, match="do not fit"):
        stream(folders[1], 2048, 600, 1)
    done = CliRunner().invoke(cli, ["bench", *map(str, folders), "--checkpoint", "state"])
    assert "--checkpoint is of --long-context" in str(done.exception)
