"""A profile gives every kernel to an operator and a decoder layer, and its traces open in Perfetto."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result

from kimi_deploy.bench.host_glue import host_glue
from kimi_deploy.bench.profile import REST, decoder_layers, profile_export
from kimi_deploy.bench.trt_profile import UNNAMED, profile_engine
from kimi_deploy.cli.main import cli
from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.errors import BackendError, UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.runtime.ort_runner import MODEL_NAME
from kimi_deploy.validate.faults.fake_tensorrt import FakeDevice, FakeSession, profile
from kimi_deploy.weights import weight_table
from tests.bench.perfetto import query
from tests.capabilities import needs_chromium, needs_tensorrt_rtx

PROMPT, STEPS = 8, 3
PHASES = ("prefill", "decode")
RUNS = {"prefill": 3, "decode": STEPS}


@pytest.fixture(scope="module")
def profiles(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The reports of every runtime that can be profiled, an engine's with ONNX Runtime in TensorRT's place."""
    root = tmp_path_factory.mktemp("profiles")
    # the threads are those of this whole process: leave them as they are
    threads = str(torch.get_num_threads())
    sizes = ["--prompt-tokens", str(PROMPT), "--decode-steps", str(STEPS), "--threads", threads, "--json"]
    arguments = ["--backend", "torch", "--profile", str(root / "torch"), *sizes]
    done = CliRunner().invoke(cli, ["bench", *map(str, folders), *arguments])
    assert done.exit_code == 0, done.output
    engine = root / "engine"
    engine.mkdir()
    (engine / "engine.plan").write_bytes(bytes(1000))
    return {
        "torch": json.loads(done.stdout),
        "ort": profile_export(folders[1], root / "ort", PROMPT, STEPS, threads=1),
        "trt": profile_engine(engine, folders[1], *fake_engine(folders[1]), root / "trt", PROMPT, STEPS),
    }


def fake_engine(export: Path) -> tuple[FakeSession, FakeDevice]:
    """An engine of one layer per node, but for the three ways in which TensorRT names fused ones."""
    nodes = decoder_layers(onnx.load(export / MODEL_NAME, load_external_data=False).graph)
    first, second = ([n for n, layer in nodes.items() if layer == wanted] for wanted in (0, 1))
    layers = [{"Name": name, "LayerType": "gemm", "Metadata": f"[ONNX Layer: {name}]"} for name in nodes]
    inside = f"[ONNX Layer: matmul_3 | {second[0]} (LatentAttention)]"
    layers += [
        {"Name": "__myl_Fused", "LayerType": "kgen", "Metadata": f"[ONNX Layer: {first[1]}]\x1e{inside}"},
        {"Name": f"{{ForeignNode[{first[0]}...{first[-1]}]}}"},
        {"Name": "Reformatting CopyNode for Input Tensor 0"},
    ]
    device = FakeDevice()
    limits = (profile("prefill", 0, 1, 64, 64, 64), profile("decode", 1, 1, 1, 64, 1))
    fingerprint = str(Manifest.read(export).source["checkpoint"])
    return FakeSession(export / MODEL_NAME, device, limits, fingerprint, layers=layers), device


def assert_trace_of_whole_events(path: Path) -> None:
    """Chrome's trace format: an array of events or an object with one; every event whole, and ranges among them."""
    trace = json.loads(path.read_text(encoding="utf-8"))
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    for event in events:
        assert isinstance(event["name"], str)
        assert event["ph"] in "XMBEisft"
        assert {"pid", "tid"} <= event.keys()
        # what is not metadata happens at a time, in microseconds
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
    assert sum(event["ph"] == "X" and event["dur"] > 0 for event in events) > 20


@pytest.mark.parametrize("runtime", ["ort", "torch", "trt"])
def test_every_kernel_belongs_to_an_operator_and_a_layer(profiles: dict[str, dict[str, Any]], runtime: str) -> None:
    report = profiles[runtime]
    folder = Path(report["traces"][0]).parent
    assert json.loads((folder / "profile.json").read_text(encoding="utf-8")) == report
    for phase, trace in zip(PHASES, report["traces"], strict=True):
        result = report["phases"][phase]
        for table in ("operators", "layers"):
            assert sum(e["seconds"] for e in result[table].values()) == pytest.approx(result["kernel_seconds"])
        assert {"layer 0", "layer 1", REST} <= result["layers"].keys()
        assert 0 < result["kernel_seconds"] < result["seconds"]
        assert_trace_of_whole_events(Path(trace))


@needs_chromium
@pytest.mark.parametrize("runtime", ["ort", "torch", "trt"])
def test_perfetto_reads_every_event_of_a_trace(profiles: dict[str, dict[str, Any]], runtime: str) -> None:
    trace = Path(profiles[runtime]["traces"][1])
    events = json.loads(trace.read_text(encoding="utf-8"))
    # a moment is a slice of no length
    slices = [e for e in (events["traceEvents"] if isinstance(events, dict) else events) if e["ph"] in "Xi"]
    rows = query(
        trace,
        "select count(*) as slices, sum(name = 'model_run') as runs, "
        "(select count(*) from slice as inner join slice as outer on inner.parent_id = outer.id "
        " where inner.ts < outer.ts or inner.ts + inner.dur > outer.ts + outer.dur) as over_the_edge, "
        "(select coalesce(sum(value), 0) from stats where severity in ('error', 'data_loss')) as errors from slice",
    )
    # ONNX Runtime's trace has the first call and the prompt's too
    runs = RUNS["decode"] + (2 if runtime == "ort" else 0)
    assert rows == [{"slices": len(slices), "runs": runs, "over_the_edge": 0, "errors": 0}]


@needs_chromium
def test_perfetto_refuses_what_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text("no trace\n")
    with pytest.raises(AssertionError, match="Unknown trace type"):
        query(tmp_path / "trace.json", "select 1 as one")


@pytest.mark.parametrize("runtime", ["ort", "torch"])
def test_memory_by_component_adds_up(
    profiles: dict[str, dict[str, Any]], folders: tuple[Path, Path], runtime: str
) -> None:
    memory = dict(profiles[runtime]["memory"])
    assert memory.pop("peak resident") == sum(memory.values())
    assert all(size > 0 for size in memory.values())
    shape = KimiLinearConfig.from_folder(folders[0])
    # an export has a few shapes and indices beside them
    assert 0 <= memory["weights"] - 4 * sum(torch.Size(w.shape).numel() for w in weight_table(shape)) < 4096


def test_operators_are_pytorchs_and_onnx_runtimes_own(profiles: dict[str, dict[str, Any]]) -> None:
    for phase in PHASES:
        # each run looks tokens up in the embedding once
        assert profiles["torch"]["phases"][phase]["operators"]["aten::embedding"]["calls"] == 1
        ort = profiles["ort"]["phases"][phase]
        assert {"LinearAttention", "MatMul"} <= ort["operators"].keys()
        assert ort["operators"]["LinearAttention"]["calls"] == 1
        # the delta rule and its two projections are the first layer's, attention's softmax the second's
        assert all(ort["layers"][f"layer {i}"]["calls"] > 20 for i in (0, 1))
    glue = profiles["ort"]["host_glue_seconds"]
    assert 0 < glue["p10"] <= glue["median"] <= glue["p90"]


def test_host_glue_is_a_step_without_what_onnx_runtime_takes(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a clock that goes on by one whenever it is read: once in the run, and before, between and after
    ticks = itertools.count()
    monkeypatch.setattr("kimi_deploy.bench.host_glue.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert host_glue(folders[1], PROMPT, STEPS, threads=1) == {"median": 2, "p10": 2, "p90": 2}


def test_an_engines_layers_are_found_in_whatever_form_tensorrt_names_them(
    profiles: dict[str, dict[str, Any]], folders: tuple[Path, Path]
) -> None:
    nodes = decoder_layers(onnx.load(folders[1] / MODEL_NAME, load_external_data=False).graph)
    report = profiles["trt"]
    for phase in PHASES:
        operators, layers = (report["phases"][phase][table] for table in ("operators", "layers"))
        assert operators["gemm"]["calls"] == pytest.approx(len(nodes))
        assert operators["kgen"]["calls"] == pytest.approx(1)
        # of a layer without a type the name
        assert operators["Reformatting CopyNode for Input Tensor 0"]["calls"] == pytest.approx(1)
        assert layers[UNNAMED]["calls"] == pytest.approx(1)
        assert layers["layers 0 to 1"]["calls"] == pytest.approx(1)
        # every node of the first decoder layer, and all of them fused
        assert layers["layer 0"]["calls"] == pytest.approx(sum(layer == 0 for layer in nodes.values()) + 1)
    memory = report["memory"]
    assert memory["plan"] == 1000
    assert min(memory["KDA state"], memory["latent cache"], memory["peak resident (host)"]) > 0


def test_watched_runs_are_not_recorded_as_graphs(folders: tuple[Path, Path], tmp_path: Path) -> None:
    session, device = fake_engine(folders[1])
    profile_engine(tmp_path, folders[1], session, device, tmp_path / "profile", PROMPT, STEPS)
    assert device.launches == device.captures == 0
    assert session.runs == ["prefill"] * (RUNS["prefill"] + 1) + ["decode"] * (STEPS + 1)


def bench(folders: tuple[Path, Path], *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, folders), *arguments], catch_exceptions=False)


def test_a_runtime_without_a_profile_is_refused_before_it_runs(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for names in (("torch", "ort"), ("llama.cpp",), ("transformers",)):
        with pytest.raises(UsageError, match="one runtime that can be profiled"):
            bench(folders, "--profile", str(tmp_path / "p"), *(f"--backend={name}" for name in names))
    for arguments in (["--backend=trt"], ["--engine", str(tmp_path)]):
        with pytest.raises(UsageError, match="go together"):
            bench(folders, "--profile", str(tmp_path / "p"), *arguments)
    assert not (tmp_path / "p").exists()


@needs_tensorrt_rtx
def test_an_engines_profile_needs_a_gpu_and_its_own_export(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a real plan; of what a GPU would do, ONNX Runtime in its place."""
    built = CliRunner().invoke(cli, ["build-engine", str(folders[1]), "-o", str(tmp_path / "engine")])
    assert built.exit_code == 0, built.output
    arguments = ["--profile", str(tmp_path / "p"), "--backend", "trt", "--engine", str(tmp_path / "engine")]
    monkeypatch.setattr("kimi_deploy.cuda_driver.gpu_devices", tuple)
    with pytest.raises(BackendError, match=r"only on a machine with an NVIDIA GPU.*profile the export") as error:
        bench(folders, *arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "p").exists()
    monkeypatch.setattr("kimi_deploy.cuda_driver.gpu_devices", lambda: ("a GPU",))
    monkeypatch.setattr("kimi_deploy.engine.load.check_gpu", lambda *_: None)
    monkeypatch.setattr("kimi_deploy.runtime.trt_runner.open_trt_session", lambda _: fake_engine(folders[1]))
    done = bench(folders, *arguments, "--prompt-tokens", "4", "--decode-steps", "2")
    assert done.exit_code == 0
    assert "layers 0 to 1" in done.stdout
    assert (tmp_path / "p" / "decode-trace.json").is_file()
    manifest = Manifest.read(folders[1])
    other = tmp_path / "other"
    other.mkdir()
    (other / MODEL_NAME).write_bytes(b"another graph")
    (other / "weights.bin").write_bytes(bytes(4))
    Manifest(manifest.kind, manifest.source, manifest.op_abi, manifest.details, {}, {}).write(other)
    monkeypatch.setattr("kimi_deploy.bench.run.run_bench", lambda *_: pytest.fail("something was measured"))
    for given in (arguments, ["--backend", "ort", *arguments[2:]]):
        with pytest.raises(UsageError, match="another export"):
            bench((folders[0], other), *given)
