"""bench measures what it says, in processes of their own, and says when a runtime cannot be measured."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kimi_deploy.bench.compare import compare_reports, read_report
from kimi_deploy.bench.curve import decode_curve
from kimi_deploy.bench.floors import model_work
from kimi_deploy.bench.llama_cpp import CONVERTER, convert
from kimi_deploy.bench.profile import profile_export
from kimi_deploy.bench.run import SCHEMA_VERSION, run_bench
from kimi_deploy.bench.worker import Task
from kimi_deploy.cli.main import cli
from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.errors import BackendError, UsageError
from kimi_deploy.weights import weight_table
from tests.configs import config
from tests.graph.conftest import export
from tests.models import write_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("bench")
    model = write_model(root / "model", config(layers="KM", rms_norm_eps=1e-5))
    return model, export(model, root / "export")


def test_every_runtime_is_measured_and_compared_with_the_first(folders: tuple[Path, Path]) -> None:
    model, exported = folders
    tasks = [
        Task("ort", str(exported), prompt=8, steps=3, repeats=2, threads=1),
        Task("transformers", str(model), prompt=8, steps=3, repeats=2, threads=1),
    ]
    calls: list[int] = []
    report = run_bench(tasks, rounds=1, progress=calls.append)
    assert calls == [1, 1]
    results = report["results"]
    assert isinstance(results, dict)
    for name in ("ort", "transformers"):
        # the warm-up is not counted
        assert results[name]["prefill"]["count"] == 2
        assert results[name]["decode"]["count"] == 2 * 3
        assert 0 < results[name]["decode"]["p10"] <= results[name]["decode"]["median"] <= results[name]["decode"]["p90"]
    ratios = report["times_of_first"]
    assert isinstance(ratios, dict)
    assert ratios["ort"] == {"prefill": 1.0, "decode": 1.0}
    expected = results["transformers"]["decode"]["median"] / results["ort"]["decode"]["median"]
    assert ratios["transformers"]["decode"] == expected


def test_a_worker_that_fails_is_a_typed_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"(?s)ort worker failed.*manifest"):
        run_bench([Task("ort", str(tmp_path), prompt=1, steps=1, repeats=1, threads=1)], rounds=1)


def test_the_curve_measures_each_length_at_two_capacities(folders: tuple[Path, Path]) -> None:
    points = decode_curve(folders[1], (4, 600), steps=2, threads=1)
    assert [(p.cached, p.capacity) for p in points] == [(4, 6), (4, 2408), (600, 602), (600, 2408)]
    assert all(0 < p.fastest <= p.median for p in points)


def test_the_command_prints_json(folders: tuple[Path, Path]) -> None:
    arguments = ["--backend", "ort", "--prompt-tokens", "4", "--decode-steps", "2", "--rounds", "1", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "kimi_deploy", "bench", *map(str, folders), *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema_version"] == SCHEMA_VERSION
    assert report["export"]["dtype"] == "float32"
    floor = report["floors"]["work"]["decode_bytes"] / report["floors"]["read_bytes_per_second"]
    assert report["times_of_floor"]["ort"]["decode"] == report["results"]["ort"]["decode"]["median"] / floor


def test_a_tokens_work_counts_the_chosen_experts_and_one_row_of_the_embedding(folders: tuple[Path, Path]) -> None:
    shape = KimiLinearConfig.from_folder(folders[1])
    sizes = {w.name: float(np.prod(w.shape)) for w in weight_table(shape)}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    idle = experts * (1 - shape.num_experts_per_token / shape.num_experts)
    everything = sum(sizes.values())
    work = model_work(folders[1])
    expected = 4 * (everything - idle - sizes["model.embed_tokens.weight"])
    # beside the weights the graph has a few shapes and indices
    assert expected <= work.decode_bytes < expected + 1000
    vectors = sum(float(np.prod(w.shape)) for w in weight_table(shape) if len(w.shape) == 1)
    head = sizes["lm_head.weight"]
    assert work.prefill_multiply_adds == everything - idle - vectors - head - sizes["model.embed_tokens.weight"]


def report_of(prefill: float, decode: float, **task: int) -> dict:
    return {
        "schema_version": SCHEMA_VERSION,
        "task": {"prompt": 512, "threads": 2} | task,
        "results": {"ort": {}},
        "times_of_floor": {"ort": {"prefill": prefill, "decode": decode}},
    }


def test_compare_finds_what_became_slower_beyond_the_threshold(tmp_path: Path) -> None:
    paths = []
    for name, report in (("before", report_of(2.0, 1.5)), ("after", report_of(2.1, 1.8))):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(report), encoding="utf-8")
    result = CliRunner().invoke(cli, ["bench", "compare", *map(str, paths), "--json"])
    assert [row["verdict"] for row in json.loads(result.stdout)] == ["same", "slower"]
    assert result.exit_code == 1
    assert CliRunner().invoke(cli, ["bench", "compare", *map(str, paths), "--threshold", "0.3"]).exit_code == 0
    backwards = CliRunner().invoke(cli, ["bench", "compare", *map(str, reversed(paths)), "--json"])
    assert [row["verdict"] for row in json.loads(backwards.stdout)] == ["same", "faster"]
    assert backwards.exit_code == 0


def test_reports_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    for text in ("{}", "[]", "no JSON", json.dumps({"schema_version": 1})):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError):
            read_report(path)
    with pytest.raises(UsageError, match="different work: prompt"):
        compare_reports(report_of(1, 1), report_of(1, 1, prompt=8), 0.1)


def test_a_profile_gives_every_kernel_to_an_operator_and_a_layer(folders: tuple[Path, Path], tmp_path: Path) -> None:
    report = profile_export(folders[1], tmp_path / "profile", prompt=8, steps=3, threads=1)
    assert json.loads((tmp_path / "profile" / "profile.json").read_text(encoding="utf-8")) == report
    for phase, trace in zip(("prefill", "decode"), report["traces"], strict=True):
        result = report["phases"][phase]
        assert {"LinearAttention", "MatMul"} <= result["operators"].keys()
        assert result["operators"]["LinearAttention"]["calls"] == 1
        for table in ("operators", "layers"):
            total = sum(entry["seconds"] for entry in result[table].values())
            assert total == pytest.approx(result["kernel_seconds"])
        assert result["layers"].keys() == {"layer 0", "layer 1", "embedding, last norm, head"}
        # the delta rule and its two projections are the first layer's, attention's softmax the second's
        assert all(result["layers"][f"layer {i}"]["calls"] > 20 for i in (0, 1))
        assert 0 < result["kernel_seconds"] < result["seconds"]
        events = json.loads(Path(trace).read_text(encoding="utf-8"))
        assert {"ts", "dur", "ph", "name", "pid", "tid"} <= events[-1].keys()
    glue = report["host_glue_seconds"]
    assert 0 < glue["p10"] <= glue["median"] <= glue["p90"] < report["phases"]["decode"]["seconds"]


def test_llama_cpp_needs_its_own_source_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["bench", *map(str, folders), "--backend", "llama.cpp"]
    for more, message in (([], "go together"), (["--llama-cpp", str(tmp_path)], "not llama.cpp's source folder")):
        with pytest.raises(UsageError, match=message):
            CliRunner().invoke(cli, [*command, *more], catch_exceptions=False)


def test_a_converter_that_fails_is_named_with_its_reason(folders: tuple[Path, Path], tmp_path: Path) -> None:
    # the parts of llama.cpp that the conversion imports, with a converter that gives up
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "base.py").write_text("class TextModel:\n    _set_vocab_none = None\n")
    (tmp_path / "conversion" / "kimi_linear.py").write_text("class KimiLinearModel:\n    pass\n")
    (tmp_path / CONVERTER).write_text("raise SystemExit('no such architecture')\n")
    with pytest.raises(BackendError, match=r"(?s)converter failed.*no such architecture"):
        convert(folders[0], tmp_path, tmp_path / "model.gguf")
