"""A saved report is what its schema says, or refused by name; two of them are compared."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kimi_deploy.bench.chart import write_chart
from kimi_deploy.bench.compare import compare_reports
from kimi_deploy.bench.report import SCHEMA_VERSION, Report, json_schema, read_report
from kimi_deploy.cli.main import cli
from kimi_deploy.errors import UsageError

SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "benchmarks" / "report.schema.json"


def phases(prefill: float, decode: float) -> dict[str, float]:
    return {"prefill": prefill, "decode": decode}


def report_of(
    prefill: float = 2.0, decode: float = 1.5, threads: int = 2, shapes: tuple[tuple[int, int], ...] = ((1, 512),)
) -> Report:
    """A report whose only runtime takes the given times of the floor."""
    spread = {"median": 0.2, "p10": 0.1, "p90": 0.4, "count": 6}
    result = {
        **dict.fromkeys(("prefill", "decode", "time_to_first_token", "time_per_output_token"), spread),
        "tokens_per_second": phases(2560, 5),
        "times_of_first": phases(1, 1),
        "times_of_floor": phases(prefill, decode),
        "load": 0.5,
        "peak_bytes": 1000,
        "kernels": {"ops": ["KimiDeltaAttention"], "library": "0" * 64, "instruction_set": "x86-64-v3"},
    }
    floor = {"decode_bytes": 4.0, "prefill_multiply_adds": 9.0, "seconds": phases(0.1, 0.13)}
    return Report.model_validate(
        {
            "schema_version": SCHEMA_VERSION,
            "kimi_deploy": "0",
            "machine": {"processor": "x86_64", "cpus": 2},
            "settings": {"steps": 64, "repeats": 3, "rounds": 2, "threads": threads},
            "rates": {"read_bytes_per_second": 3e10, "multiply_adds_per_second": 1e11},
            "export": {"name": "tiny", "dtype": "float32"},
            "points": [{"batch": b, "context": c, "floor": floor, "results": {"ort": result}} for b, c in shapes],
        }
    )


def save(report: Any, path: Path) -> Path:
    path.write_text(json.dumps(report), encoding="utf-8")
    return path


def test_the_schema_file_is_the_models_schema() -> None:
    # python -m kimi_deploy.bench.report > docs/benchmarks/report.schema.json
    assert SCHEMA_FILE.read_text(encoding="utf-8") == json_schema()
    version = json.loads(json_schema())["properties"]["schema_version"]
    assert version["const"] == SCHEMA_VERSION


def test_a_saved_report_reads_back_the_same(tmp_path: Path) -> None:
    report = report_of(shapes=((1, 512), (8, 2048)))
    assert read_report(save(report.to_dict(), tmp_path / "report.json")) == report


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("points.0.results.ort.times_of_floor.decode", 0),
        ("points.0.results.ort.prefill.median", "0.2"),
        ("points.0.results.ort.time_to_first_token", None),
        ("points.0.batch", 1.5),
        ("points", []),
        ("settings.threads", True),
        ("points.0.results.ort.kernels.library", "a path"),
        ("rates.guess", 1.0),
    ],
)
def test_a_wrong_field_is_named_with_the_version(tmp_path: Path, path: str, value: object) -> None:
    report = copy.deepcopy(report_of().to_dict())
    *parents, last = path.split(".")
    target: Any = report
    for key in parents:
        target = target[int(key) if key.isdecimal() else key]
    target[last] = value
    with pytest.raises(UsageError, match=f"field {re.escape(path)} is wrong(?s:.*)schema_version {SCHEMA_VERSION}"):
        read_report(save(report, tmp_path / "report.json"))


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    report = report_of().to_dict()
    del report["machine"]
    with pytest.raises(UsageError, match=r"(?s)field machine is wrong.*required"):
        read_report(save(report, tmp_path / "report.json"))


@pytest.mark.parametrize("version", [None, 3, 99, "3", True])
def test_another_version_is_refused_as_such(tmp_path: Path, version: object) -> None:
    report = report_of().to_dict() | {"schema_version": version}
    with pytest.raises(UsageError, match=re.escape(f"schema_version {json.dumps(version)}")):
        read_report(save(report, tmp_path / "report.json"))


@pytest.mark.parametrize("text", ["[]", "no JSON", ""])
def test_what_is_no_report_is_refused_with_what_to_do(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"(?s)report\.json.*measure again"):
        read_report(path)


def test_compare_finds_what_became_slower_beyond_the_threshold(tmp_path: Path) -> None:
    shapes = ((1, 512), (4, 512))
    before = save(report_of(2.0, 1.5, shapes=shapes).to_dict(), tmp_path / "before.json")
    # a point that only one of them has is left out
    after = save(report_of(2.1, 1.8, shapes=(*shapes, (8, 512))).to_dict(), tmp_path / "after.json")

    def run(*arguments: object) -> tuple[list[tuple[int, str]], int]:
        done = CliRunner().invoke(cli, ["bench", "compare", *map(str, arguments), "--json"])
        return [(row["batch"], row["verdict"]) for row in json.loads(done.stdout)], done.exit_code

    assert run(before, after) == ([(1, "same"), (1, "slower"), (4, "same"), (4, "slower")], 1)
    assert run(before, after, "--threshold", "0.3") == ([(1, "same")] * 2 + [(4, "same")] * 2, 0)
    assert run(after, before) == ([(1, "same"), (1, "faster"), (4, "same"), (4, "faster")], 0)


def test_compare_says_when_a_run_spreads_by_more_than_is_looked_for(tmp_path: Path) -> None:
    calm, busy = report_of().to_dict(), report_of().to_dict()
    for report, highest in ((calm, 0.21), (busy, 0.25)):
        for phase in ("prefill", "decode"):
            report["points"][0]["results"]["ort"][phase] = {"median": 0.2, "p10": 0.19, "p90": highest, "count": 6}
    before, after = save(calm, tmp_path / "before.json"), save(busy, tmp_path / "after.json")

    def run(threshold: str) -> str:
        arguments = ["bench", "compare", str(before), str(after), "--threshold", threshold]
        return CliRunner().invoke(cli, arguments, catch_exceptions=False).stderr

    rows = compare_reports(read_report(before), read_report(after), 0.1)
    assert [row.spread for row in rows] == pytest.approx([0.3, 0.3])
    assert "2 of 2 rows" in run("0.29")
    assert "may be chance" in run("0.29")
    assert run("0.31") == ""


def test_compare_says_where_other_kernels_ran(tmp_path: Path) -> None:
    bodies = copy.deepcopy(report_of().to_dict())
    bodies["points"][0]["results"]["ort"]["kernels"] = None
    before = save(bodies, tmp_path / "before.json")
    after = save(report_of().to_dict(), tmp_path / "after.json")
    words = "ort ran function bodies before, kernels of library 0000000000000000 (x86-64-v3) after"
    assert words in CliRunner().invoke(cli, ["bench", "compare", str(before), str(after)]).stderr
    assert "ort ran" not in CliRunner().invoke(cli, ["bench", "compare", str(after), str(after)]).stderr


def test_reports_of_different_work_are_refused() -> None:
    with pytest.raises(UsageError, match="different work: threads"):
        compare_reports(report_of(), report_of(threads=1), 0.1)
    with pytest.raises(
        UsageError, match=r"(?s)in common.*ort at batch 1, context 512 against ort at batch 1, context 8"
    ):
        compare_reports(report_of(), report_of(shapes=((1, 8),)), 0.1)


@pytest.mark.parametrize(
    ("shapes", "lines", "axis"),
    [
        # the lines of each panel: the runtime's, and the floor's
        (((1, 512),), 0, ""),
        (((1, 512), (1, 2048)), 2, "context (tokens)"),
        (((1, 512), (4, 512), (1, 2048), (4, 2048)), 3, "batch (sequences)"),
    ],
)
def test_a_chart_has_bars_of_one_point_and_lines_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes: tuple[tuple[int, int], ...], lines: int, axis: str
) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save_figure = Figure.savefig

    def record(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save_figure(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    write_chart(report_of(shapes=shapes), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    for axes in figures[0].axes:
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert any("the weights' floor" in label for label in labels)
        if lines:
            assert (len(axes.lines), axes.get_xlabel()) == (lines, axis)
        else:
            assert [bar.get_height() for bar in axes.patches] == [200]
