"""bench measures what it says, in processes of their own, and says when a runtime cannot be measured."""

import ctypes
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from kimi_deploy.bench.curve import decode_curve
from kimi_deploy.bench.floors import Rates, Work, model_work
from kimi_deploy.bench.llama_cpp import CONVERTER, convert
from kimi_deploy.bench.report import SCHEMA_VERSION, read_report
from kimi_deploy.bench.run import _rates, run_bench
from kimi_deploy.bench.worker import Task
from kimi_deploy.cli.main import cli
from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.errors import BackendError, ContractError, ManifestError, UsageError
from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.weights import weight_table


def test_every_runtime_is_measured_at_every_point_and_compared_with_the_first(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the machine's rates are measured in the test of the command
    monkeypatch.setattr("kimi_deploy.bench.run._rates", lambda threads: Rates(3e10, 1e11))
    tasks = [
        Task(name, str(folder), prompt=8, steps=3, repeats=2, threads=1, batch=batch, kernels="none")
        for batch, name, folder in ((2, "ort", folders[1]), (2, "transformers", folders[0]), (1, "ort", folders[1]))
    ]
    calls: list[int] = []
    work = model_work(folders[1])
    report = run_bench(tasks, 1, work, {}, calls.append)
    assert calls == [1, 1, 1]
    shapes = [(p.batch, p.context, list(p.results)) for p in report.points]
    assert shapes == [(2, 8, ["ort", "transformers"]), (1, 8, ["ort"])]
    for point in report.points:
        ort, last = point.results["ort"], list(point.results.values())[-1]
        for result in point.results.values():
            # the warm-up is not counted
            assert result.prefill.count == result.time_to_first_token.count == 2
            assert result.decode.count == result.time_per_output_token.count == 2 * 3
            assert result.decode.p10 <= result.decode.median <= result.decode.p90
            # a token's time has its choice, the first one's also the making of the state
            assert result.time_to_first_token.median > result.prefill.median
            assert result.time_per_output_token.median > result.decode.median
            assert result.tokens_per_second.prefill == point.batch * 8 / result.prefill.median
            assert result.tokens_per_second.decode == point.batch / result.decode.median
        assert (ort.times_of_first.prefill, ort.times_of_first.decode) == (1, 1)
        assert last.times_of_first.decode == last.decode.median / ort.decode.median
        assert point.floor.decode_bytes == work.decode_bytes(point.batch)
        prefill = point.batch * 8 * work.prefill_multiply_adds / 1e11
        assert ort.times_of_floor.prefill == pytest.approx(ort.prefill.median / prefill)


def test_a_worker_that_fails_is_a_typed_error_with_its_reason(tmp_path: Path) -> None:
    tasks = [Task("ort", str(tmp_path), prompt=1, steps=1, repeats=1, threads=1)]
    with pytest.raises(BackendError, match=r"(?s)ort worker failed.*manifest"):
        run_bench(tasks, 1, Work(1, 1, 1, 1, 1), {})


@pytest.mark.parametrize(
    ("code", "stderr", "seen", "fix"),
    [
        (1, "Traceback ...\nModuleNotFoundError: No module named 'x'", "No module named 'x'", "install what it names"),
        (1, "Traceback ...\nValueError: no such shape", "no such shape", "report this as a bug"),
        (1, "RuntimeError: out of memory", "out of memory", "fewer or shorter"),
        (-9, "", "signal 9, Killed", "enough memory"),
    ],
)
def test_a_worker_that_dies_is_named_with_what_can_be_done(
    monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, seen: str, fix: str
) -> None:
    done = subprocess.CompletedProcess([], code, "", stderr)
    monkeypatch.setattr("kimi_deploy.bench.run.subprocess.run", lambda *_, **__: done)
    with pytest.raises(BackendError, match=f"(?s)the torch worker failed.*{seen}.*fix: .*{fix}"):
        run_bench([Task("torch", "m", prompt=1, steps=1, repeats=1, threads=1)], 1, Work(1, 1, 1, 1, 1), {})
    with pytest.raises(BackendError, match="the floors worker failed") as caught:
        _rates(1)
    assert "--backend" not in caught.value.fix


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--long-context 1024 --batch 2", "--batch is not of --long-context"),
        ("--long-context 1024 --curve", "--curve is not of --long-context"),
        ("--long-context 1024 --profile p", "--profile is not of --long-context"),
        ("--curve --output report.json", "--output is not of --curve"),
        ("--curve --plot p.png", "--plot is not of --curve"),
        ("--curve --prompt-tokens 512", "--prompt-tokens is not of --curve"),
        ("--profile p --output report.json", "--output is not of --profile"),
        ("--profile p --context 8", "--context is not of --profile"),
        ("--chunk 64", "--chunk is of --long-context"),
        ("--gguf-type f16", "--gguf-type is of --backend llama.cpp"),
        ("--context 8 --prompt-tokens 8", "--context and --prompt-tokens say the same"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(cli, ["bench", *map(str, folders), *words.split()], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


def test_the_curve_measures_each_length_at_two_capacities(folders: tuple[Path, Path]) -> None:
    points = decode_curve(OrtRunner(folders[1], threads=1), (4, 600), steps=2)
    assert [(p.cached, p.capacity) for p in points] == [(4, 6), (4, 2408), (600, 602), (600, 2408)]
    assert all(0 < p.fastest <= p.median for p in points)


def test_the_command_sweeps_saves_and_draws(folders: tuple[Path, Path], tmp_path: Path) -> None:
    saved, picture = tmp_path / "report.json", tmp_path / "report.png"
    sweep = ["--context", "4,6", "--decode-steps", "2", "--rounds", "1", "--repeats", "1"]
    arguments = ["--backend", "ort", "--kernels", "none", *sweep, "--json", "-o", str(saved), "--plot", str(picture)]
    done = subprocess.run(
        [sys.executable, "-m", "kimi_deploy", "bench", *map(str, folders), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = read_report(saved)
    assert report.to_dict() == json.loads(done.stdout)
    assert report.schema_version == SCHEMA_VERSION
    assert report.export["dtype"] == "float32"
    assert [(p.batch, p.context) for p in report.points] == [(1, 4), (1, 6)]
    for point in report.points:
        floor = point.floor.decode_bytes / report.rates.read_bytes_per_second
        assert point.results["ort"].times_of_floor.decode == point.results["ort"].decode.median / floor
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.png"]


@pytest.mark.parametrize("option", ["--output", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_the_measuring(
    folders: tuple[Path, Path], tmp_path: Path, option: str
) -> None:
    with pytest.raises(UsageError, match=f"{option}: no folder"):
        CliRunner().invoke(
            cli, ["bench", *map(str, folders), option, str(tmp_path / "none" / "file")], catch_exceptions=False
        )


@pytest.mark.parametrize("value", ["0", "1,,2", "-1", "two", ""])
def test_a_batch_list_that_is_none_is_wrong_usage(folders: tuple[Path, Path], value: str) -> None:
    done = CliRunner().invoke(cli, ["bench", *map(str, folders), "--batch", value])
    assert done.exit_code == 2
    assert "list of whole numbers" in done.output


def test_a_tokens_work_counts_the_chosen_experts_and_one_row_of_the_embedding(folders: tuple[Path, Path]) -> None:
    shape = KimiLinearConfig.from_folder(folders[1])
    sizes = {w.name: float(np.prod(w.shape)) for w in weight_table(shape)}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    idle = experts * (1 - shape.num_experts_per_token / shape.num_experts)
    everything = sum(sizes.values())
    work = model_work(folders[1])
    expected = 4 * (everything - idle - sizes["model.embed_tokens.weight"])
    # beside the weights the graph has a few shapes and indices
    assert expected <= work.decode_bytes(1) < expected + 1000
    # ever more sequences meet every expert, once each
    assert work.decode_bytes(1) < work.decode_bytes(2) < 2 * work.decode_bytes(1)
    assert work.decode_bytes(10**6) == pytest.approx(work.decode_bytes(1) + 4 * idle)
    vectors = sum(float(np.prod(w.shape)) for w in weight_table(shape) if len(w.shape) == 1)
    head = sizes["lm_head.weight"]
    assert work.prefill_multiply_adds == everything - idle - vectors - head - sizes["model.embed_tokens.weight"]
    assert work.decode_multiply_adds == work.prefill_multiply_adds + head


def test_llama_cpp_needs_its_own_source_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["bench", *map(str, folders), "--backend", "llama.cpp"]
    for more, message in (([], "go together"), (["--llama-cpp", str(tmp_path)], "not llama.cpp's source folder")):
        with pytest.raises(UsageError, match=message):
            CliRunner().invoke(cli, [*command, *more], catch_exceptions=False)


def test_an_export_of_another_checkpoint_is_refused_with_both_names(folders: tuple[Path, Path]) -> None:
    demo = Path(__file__).parents[2] / "models" / "demo"
    with pytest.raises(UsageError, match=r"another checkpoint(?s:.*)made from 'model'(?s:.*)expected: .*models/demo"):
        CliRunner().invoke(cli, ["bench", str(demo), str(folders[1]), "--backend", "torch"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("package", "backend"), [("transformers", "transformers"), ("llama_cpp", "llama.cpp"), ("torch", "torch")]
)
def test_a_package_that_is_missing_is_named_before_anything_is_measured(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, backend: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("kimi_deploy.optional_packages.find_spec", lambda name: None if name == package else find(name))
    monkeypatch.setattr("kimi_deploy.bench.run.run_bench", None)
    (tmp_path / CONVERTER).touch()
    more = ["--llama-cpp", str(tmp_path)] if backend == "llama.cpp" else []
    with pytest.raises(BackendError, match=f"needs {package}, which is not installed"):
        CliRunner().invoke(
            cli, ["bench", *map(str, folders), "--backend", "ort", "--backend", backend, *more], catch_exceptions=False
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "torch", "--kernels", "lib.so"], "ONNX Runtime alone(?s:.*)lib.so, --backend torch"),
        (["--backend", "torch", "--profile", "here", "--kernels", "lib.so"], "ONNX Runtime alone"),
        (["--backend", "ort", "--backend", "ort-bodies"], "the same here(?s:.*)no library(?s:.*)make cpu-kernels"),
        (["--backend", "ort", "--backend", "ort-bodies", "--kernels", "none"], "the same here"),
        (["--backend", "ort", "--kernels", "lib.so"], "library of CPU kernels is not there"),
        (["--backend", "torch", "--curve"], "run ONNX Runtime alone"),
        (["--backend", "torch", "--long-context", "1024"], "run ONNX Runtime alone"),
    ],
)
def test_kernels_that_nothing_would_run_or_that_change_nothing_are_refused(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr("kimi_deploy.bench.run.run_bench", None)
    with pytest.raises((UsageError, BackendError), match=message):
        CliRunner().invoke(cli, ["bench", *map(str, folders), *words], catch_exceptions=False)


def test_llama_cpp_takes_one_sequence(folders: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["bench", *map(str, folders), "--backend", "llama.cpp", "--llama-cpp", str(tmp_path), "--batch", "1,2"]
    with pytest.raises(UsageError, match=r"one sequence(?s:.*)--batch 2"):
        CliRunner().invoke(cli, command, catch_exceptions=False)


def test_q4_0_is_llama_cpps_quantisation_of_the_converted_float32_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "base.py").write_text("class TextModel:\n    _set_vocab_none = None\n")
    (tmp_path / "conversion" / "kimi_linear.py").write_text("class KimiLinearModel:\n    pass\n")
    # a converter that writes the type it was asked for
    (tmp_path / CONVERTER).write_text(
        "import sys\n"
        "value = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
        "open(value('--outfile'), 'w').write(value('--outtype'))\n"
    )
    quantised: list[str] = []

    def quantize(plain: bytes, output: bytes, parameters: object) -> int:
        quantised.append(Path(plain.decode()).read_text())
        Path(output.decode()).write_text("q4_0")
        return 0

    package = SimpleNamespace(
        llama_model_quantize_default_params=ctypes.c_int, LLAMA_FTYPE_MOSTLY_Q4_0=2, llama_model_quantize=quantize
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    output = tmp_path / "out" / "q4_0.gguf"
    output.parent.mkdir()
    convert(tmp_path, tmp_path, output, "q4_0")
    assert quantised == ["f32"]
    assert [p.name for p in output.parent.iterdir()] == ["q4_0.gguf"]
    assert output.read_text() == "q4_0"
    convert(tmp_path, tmp_path, output, "q8_0")
    assert output.read_text() == "q8_0"
    assert len(quantised) == 1
    package.llama_model_quantize = lambda *arguments: 1
    with pytest.raises(BackendError, match="did not quantise"):
        convert(tmp_path, tmp_path, output, "q4_0")


def test_a_converter_that_fails_is_named_with_its_reason(folders: tuple[Path, Path], tmp_path: Path) -> None:
    # the parts of llama.cpp that the conversion imports, with a converter that gives up
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "base.py").write_text("class TextModel:\n    _set_vocab_none = None\n")
    (tmp_path / "conversion" / "kimi_linear.py").write_text("class KimiLinearModel:\n    pass\n")
    (tmp_path / CONVERTER).write_text("raise SystemExit('no such architecture')\n")
    with pytest.raises(BackendError, match=r"(?s)converter failed.*no such architecture"):
        convert(folders[0], tmp_path, tmp_path / "model.gguf")


def test_an_export_whose_graph_is_damaged_is_refused_before_the_measuring(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    model, export = folders
    damaged = tmp_path / "damaged"
    shutil.copytree(export, damaged)
    # of the right size, which is all that is compared with the manifest
    (damaged / "model.onnx").write_bytes(b"\xff" * (damaged / "model.onnx").stat().st_size)
    with pytest.raises(ContractError, match="the graph cannot be read"):
        CliRunner().invoke(cli, ["bench", str(model), str(damaged), "--backend", "ort"], catch_exceptions=False)
    (damaged / "model.onnx").write_bytes(b"")
    with pytest.raises(ManifestError, match="does not match the manifest"):
        CliRunner().invoke(cli, ["bench", str(model), str(damaged), "--backend", "ort"], catch_exceptions=False)
