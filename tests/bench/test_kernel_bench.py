"""bench kernels: what is counted, what is compared, what stands in a report; all but the clock, which needs a GPU."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kimi_deploy.bench.kernels import run
from kimi_deploy.bench.kernels.ahead import compile_ahead, forms
from kimi_deploy.bench.kernels.cases import GATES, HEADS, MAX_TOKENS, TARGETS, Case, full_cases, quick_cases
from kimi_deploy.bench.kernels.device import Ceilings, require_device
from kimi_deploy.bench.kernels.errors import errors_of, relative_rms
from kimi_deploy.bench.kernels.inputs import make_inputs, packed
from kimi_deploy.bench.kernels.peers import core_inputs
from kimi_deploy.bench.kernels.providers import Provider, reference_provider
from kimi_deploy.bench.kernels.report import HEADERS, series, table_rows, write_json, write_plot
from kimi_deploy.bench.kernels.timing import MAX_SETS, input_sets, summary
from kimi_deploy.cli.bench import bench_command
from kimi_deploy.errors import BackendError
from kimi_deploy.ops.kimi_delta_attention.delta_rule import recurrent_kda
from kimi_deploy.ops.kimi_delta_attention.reference import l2_norm, log_decay
from tests.capabilities import needs_no_cuda

CEILINGS = Ceilings(4e12, 8e14, 2e-6)


def test_bytes_are_those_of_the_ports() -> None:
    case = Case("prefill", "softplus", 2, 3, 20, ragged=True)
    tensors, _ = packed(case, make_inputs(case, "initial", "cpu"))
    read = sum(x.numel() * x.element_size() for x in tensors.values())
    written = sum(tensors[name].nbytes for name in ("decay", "past_conv_state", "past_recurrent_state"))
    assert case.bytes == read + written


def test_rows_without_steps_cost_no_bytes() -> None:
    idle, all_active = Case("decode", "softplus", 2, 4, 1, ragged=True), Case("decode", "softplus", 2, 2, 1)
    assert idle.lengths == (1, 0, 1, 0)
    assert idle.bytes == all_active.bytes


def test_floors_and_their_multiples() -> None:
    case = Case("prefill", "softplus", 32, 1, 8192)
    # 8192 steps of 32 heads: 118,784 operations each, in tiles of 16
    assert case.matrix_operations == 8192 * 32 * 118_784
    floors = {"bytes": CEILINGS.byte_floor(case.bytes), "matrix": CEILINGS.matrix_floor(case.matrix_operations)}
    assert run.over_floors(2 * floors["bytes"], floors)["bytes"] == pytest.approx(2)
    assert Case("decode", "softplus", 32, 1, 1).matrix_operations == 0
    assert run.over_floors(1e-6, {"bytes": 1e-6, "matrix": 0.0})["matrix"] is None


def test_the_cases_cover_what_they_should() -> None:
    full, quick = full_cases(), quick_cases()
    assert len(set(full)) == len(full)
    assert len(set(quick)) == len(quick)
    assert {c.heads for c in full} == set(HEADS)
    assert {(c.gate, c.ragged, c.kind) for c in full} == {
        (g, r, k) for g in GATES for r in (False, True) for k in ("decode", "prefill")
    }
    assert max(c.batch * c.steps for c in full) == MAX_TOKENS
    for case in full:
        assert len(case.lengths) == case.batch
        assert max(case.lengths) <= case.steps
        assert not case.ragged or len(set(case.lengths)) > 1


def test_sets_of_inputs_outgrow_the_cache_but_not_the_memory() -> None:
    assert input_sets(set_bytes=10**6, l2_bytes=5 * 10**7) == 100
    assert input_sets(set_bytes=10**3, l2_bytes=5 * 10**7) == MAX_SETS
    assert input_sets(set_bytes=10**8, l2_bytes=5 * 10**7) == 4
    assert input_sets(set_bytes=6 * 2**30, l2_bytes=5 * 10**7) == 1


def test_summary_is_of_the_sorted_times() -> None:
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "p10": 1.0, "p90": 3.0, "count": 3}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "kind_and_shape", [("decode", 4, 1, True), ("prefill", 2, 40, True), ("prefill", 1, 33, False)]
)
def test_the_reference_errs_by_its_rounding_only(gate: str, kind_and_shape: tuple[str, int, int, bool]) -> None:
    kind, batch, steps, ragged = kind_and_shape
    case = Case(kind, gate, 2, batch, steps, ragged)  # type: ignore[arg-type]
    for distribution in ("initial", "slow"):
        errors = errors_of(reference_provider(), case, distribution, "cpu")  # type: ignore[arg-type]
        assert errors["output"] < 3e-3
        assert errors["state"] < 1e-6


def test_a_wrong_state_is_seen() -> None:
    def prepare(case, tensors):
        call = reference_provider().prepare(case, tensors)

        def transposed():
            output, state = call()
            return output, state.mT

        return transposed

    wrong = Provider("transposed", "op", lambda case: "", prepare)
    assert errors_of(wrong, Case("prefill", "softplus", 2, 1, 33), "initial", "cpu")["state"] > 0.1


def test_a_core_is_compared_with_the_core_alone() -> None:
    def prepare(case, tensors):
        def call():
            x = core_inputs(case, tensors, torch.float32)
            g = log_decay(tensors["decay"].float(), tensors["A_log"], tensors["dt_bias"], case.gate, -5.0)
            beta = torch.sigmoid(tensors["beta"].float())
            q, k = l2_norm(x["q"]), l2_norm(x["k"])
            o, state = recurrent_kda(q, k, x["v"], g, beta, tensors["past_recurrent_state"], 128**-0.5)
            return o.flatten(-2), state

        return call

    core = Provider("core", "core", lambda case: "", prepare, peer=True)
    errors = errors_of(core, Case("prefill", "bounded", 2, 2, 33), "initial", "cpu")
    assert max(errors.values()) < 1e-5


def test_relative_rms_of_nothing_finite_never_passes() -> None:
    assert not relative_rms(torch.tensor([float("nan")]), torch.ones(1)) < 1


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> list[Provider]:
    """The run without a device: measurements are given, not made."""
    own = reference_provider()
    peer = Provider("peer", "core", lambda case: "", own.prepare, peer=True)
    monkeypatch.setattr(run, "require_device", lambda: None)
    monkeypatch.setattr(run, "describe_device", lambda: {"name": "none", "l2_bytes": 10, "versions": {}})
    monkeypatch.setattr(run, "measure_ceilings", lambda: CEILINGS)
    monkeypatch.setattr(run, "Flush", lambda size: None)
    monkeypatch.setattr(run, "compile_ahead", lambda *_: None)
    own = Provider("cuda", "op", own.refuses, own.prepare)
    monkeypatch.setattr(run, "open_providers", lambda: ([own, peer], {"fla": "not importable: fla"}))

    def measure(provider, case, floors, flush):
        if provider.peer and case.gate == "bounded":
            return {"failed": "RuntimeError: no"}
        times = summary([4e-6])
        error = {"output": 1e-3, "state": 1e-4}
        return {
            "errors": {"initial": error, "slow": error},
            "eager": times,
            "best": 4e-6,
            "over_floor": run.over_floors(4e-6, floors),
        }

    monkeypatch.setattr(run, "measure", measure)
    return [own, peer]


def test_a_report_is_whole_after_every_measurement(no_device: list[Provider], tmp_path: Path) -> None:
    cases = [Case("prefill", "softplus", 32, 1, n) for n in (512, 128)] + [Case("decode", "bounded", 32, 1, 1)]
    saved: list[dict] = []
    report = run.run_kernel_bench(cases, save=lambda r: saved.append(json.loads(json.dumps(r))))
    assert [len(r["left_out"]) for r in saved] == [5, 4, 3, 2, 1, 0]
    assert saved[0]["left_out"][2] == {"case": cases[0].name, "kernel": "peer"}  # this project's own come first
    assert report["schema_version"] == 1
    assert report["providers"] == {"cuda": {"scope": "op", "peer": False}, "peer": {"scope": "core", "peer": True}}
    assert run.failures(report) == []  # a peer's failure is a result
    for r in saved:
        assert all(len(row) == len(HEADERS) for row in table_rows(r))
    times, floors = series(report, "steps", kind="prefill", heads=32)
    assert [x for x, _ in times["cuda"]] == [128, 512]
    assert set(floors) == {"bytes", "matrix"}
    write_json(report, tmp_path / "results")
    assert json.loads((tmp_path / "results/kernels.json").read_text()) == json.loads(json.dumps(report))
    write_plot(report, tmp_path / "results")
    assert (tmp_path / "results/kernels.png").stat().st_size > 10_000


def test_a_spent_budget_says_what_was_left_out(no_device: list[Provider]) -> None:
    report = run.run_kernel_bench([Case("decode", "softplus", 32, 1, 1)], budget=-1)
    assert report["cases"] == []
    assert len(report["left_out"]) == 2


def test_an_interrupted_run_reports_what_it_has(no_device: list[Provider], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = run.measure

    def interrupted(provider, case, floors, flush):
        if case.kind == "decode":
            raise KeyboardInterrupt
        return measured(provider, case, floors, flush)

    monkeypatch.setattr(run, "measure", interrupted)
    cases = [Case("prefill", "softplus", 8, 1, 128), Case("decode", "softplus", 8, 1, 1)]
    report = run.run_kernel_bench(cases)
    assert report["interrupted"]
    assert [case["name"] for case in report["cases"]] == [cases[0].name]
    assert len(report["left_out"]) == 3


def test_targets_come_first_and_with_everything() -> None:
    own = reference_provider()
    peer = Provider("peer", "core", own.refuses, own.prepare, peer=True)
    pairs = run.order(quick_cases(), [own, peer])
    assert [c for c, _ in pairs[: 2 * len(TARGETS)]] == [*TARGETS, *TARGETS]
    assert len(set(pairs)) == len(pairs)


def test_machine_code_is_made_once_for_all_that_share_it() -> None:
    own = reference_provider()
    jit = Provider("jit", "op", lambda case: "no" if case.heads == 8 else "", own.prepare, compiles_per=("gate",))
    cases = [Case("decode", gate, heads, 1, 1) for heads in (8, 16, 32) for gate in GATES]
    found = forms([(case, p) for case in cases for p in (own, jit)])
    assert [(c.gate, c.heads, p.name) for c, p in found] == [("softplus", 16, "jit"), ("bounded", 16, "jit")]


def test_a_form_that_cannot_be_compiled_ahead_is_noted() -> None:
    lost = Provider("lost", "op", lambda case: "", reference_provider().prepare, compiles_per=("gate",))
    lines: list[str] = []
    compile_ahead([(Case("decode", "softplus", 8, 1, 1), lost)], lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("lost failed at decode softplus H=8 1x1: KeyError")


def test_a_failure_of_an_own_kernel_is_named(no_device: list[Provider], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure", lambda *_: {"failed": "BackendError: launch"})
    report = run.run_kernel_bench([Case("decode", "softplus", 32, 1, 1)])
    assert run.failures(report) == ["decode softplus H=32 1x1, cuda: BackendError: launch"]


@needs_no_cuda
def test_without_a_device_the_error_is_one_line_with_the_next_step() -> None:
    with pytest.raises(BackendError) as raised:
        require_device()
    assert "\n" not in str(raised.value)
    assert "make gpu" in str(raised.value)
    result = CliRunner().invoke(bench_command, ["kernels", "--json"])
    assert isinstance(result.exception, BackendError)


def test_bench_with_two_folders_is_bench_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[list[str], Path]] = []
    monkeypatch.setattr("kimi_deploy.cli.bench_context.run_curve", lambda export, *_: seen.append((["curve"], export)))
    for arguments in (["m", "e", "--curve"], ["--curve", "m", "e"], ["model", "m", "e", "--curve"]):
        assert CliRunner().invoke(bench_command, arguments).exit_code == 0
    assert seen == [(["curve"], Path("e"))] * 3
    assert CliRunner().invoke(bench_command, ["m"]).exit_code == 2
