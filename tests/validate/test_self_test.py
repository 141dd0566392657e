"""Every planted fault is caught, by the right check at the right tensor; one that is missed is called missed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kimi_deploy.cli.main import cli
from kimi_deploy.errors import UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.runtime.open import Backend
from kimi_deploy.validate.faults import self_test
from kimi_deploy.validate.faults.catalogue import FAULTS, Fault, Planted
from kimi_deploy.validate.faults.self_test import SELF_TESTED, TESTED_CHECKS, run_self_test
from kimi_deploy.validate.selection import PARITY_CHECKS
from tests.configs import raw_config
from tests.graph.conftest import no_progress

# of each check a fault that it is the first to see
OF_CHECK = {
    "reference-forms": "wrong chunkwise decay",
    "prefill": "swapped state",
    "split-prefill": "ignored past",
    "decode-steps": "graph with old inputs",
    "ragged-batch": "counted padding",
    "padding": "waiting row goes on",
    "chunk-boundaries": "full chunk dropped",
    "resume": "restored beside the state",
    "full-cache": "token beyond the cache",
    "greedy": "wrong greedy choice",
}


def test_every_fault_is_caught_and_named_and_the_right_export_passes(model: Path, exported: Path) -> None:
    control, *outcomes = run_self_test(model, exported, 1, no_progress, ("ort",))
    assert control.passed
    assert [o.fault for o in outcomes] == [f.name for f in FAULTS]
    assert [o for o in outcomes if not o.passed] == []
    notes = {o.fault: o.note for o in outcomes}
    assert notes["swapped state"] == "key and value axes are swapped"
    assert notes["late convolution window"] == "the window is one token late"
    assert notes["bfloat16 state"] == "every value has only a bfloat16's bits"
    assert notes["stale cache slot"] == "only token 71 of 72 is wrong, which was never written"
    assert notes["zeroed slice"].endswith("are zero")


def test_following_expert_choices_hides_no_fault_of_a_16_bit_export(tiny: Path, tiny_float16: Path) -> None:
    control, *outcomes = run_self_test(tiny, tiny_float16, 1, no_progress, ("ort",))
    assert control.passed
    assert [o.fault for o in outcomes] == [f.name for f in FAULTS if not f.fine]
    assert [o for o in outcomes if not o.passed] == []


def test_the_command_needs_no_model_and_reports_each_fault() -> None:
    done = CliRunner().invoke(cli, ["validate", "--self-test", "--threads", "1", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["passed"] is True
    names = {b: [f["fault"] for f in found["faults"] if f["backend"] == b] for b in SELF_TESTED}
    assert names["torch"] == ["none", "wrong chunkwise decay"]
    assert names["ort"] == ["none", *(f.name for f in FAULTS)]
    # the same faults in the engine's graph, then those of its runner
    assert names["trt"][: len(FAULTS) + 1] == names["ort"]
    assert len(names["trt"]) == len(FAULTS) + 1 + 12
    # each check is the first to see something, so that none can be left out unnoticed
    assert {f["check"] for f in found["faults"]} >= set(OF_CHECK) == {*PARITY_CHECKS, "reference-forms"}


@pytest.mark.parametrize("check", OF_CHECK)
def test_no_check_can_be_left_out(check: str, model: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a fault that it is the first to see escapes, or is found somewhere else than where it is."""
    monkeypatch.setattr(self_test, "TESTED_CHECKS", tuple(c for c in TESTED_CHECKS if c != check))
    backend: Backend = "torch" if check == "reference-forms" else "trt"
    *_, outcome = run_self_test(model, exported, 1, no_progress, (backend,), (OF_CHECK[check],))
    assert outcome.fault == OF_CHECK[check]
    assert not outcome.passed
    assert outcome.check in ("", *TESTED_CHECKS[TESTED_CHECKS.index(check) + 1 :])


def test_only_pytorchs_own_noise_shows_logits_of_16_bits_that_are_a_hundredth_too_large(
    tiny: Path, tiny_float16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that no export in float32 needs."""
    _, found = run_self_test(tiny, tiny_float16, 1, no_progress, ("ort",), ("scaled logits",))
    assert found.passed
    assert "times PyTorch's own noise, 4 allowed" in found.note
    monkeypatch.setattr(self_test, "TESTED_CHECKS", tuple(c for c in TESTED_CHECKS if c != "reference-dtype"))
    _, escaped = run_self_test(tiny, tiny_float16, 1, no_progress, ("ort",), ("scaled logits",))
    assert (escaped.passed, escaped.note) == (False, "escaped")


def test_a_fault_is_planted_again_alone(model: Path, exported: Path) -> None:
    words = ["validate", str(model), str(exported), "--self-test", "--backend", "trt", "--threads", "1"]
    done = CliRunner().invoke(cli, [*words, "--fault", "wrong greedy choice", "--json"])
    assert done.exit_code == 0, done.output
    control, fault = json.loads(done.stdout)["faults"]
    assert (control["fault"], fault["fault"]) == ("none", "wrong greedy choice")
    again = f"kimi-deploy validate {model} {exported} --self-test --backend trt"
    assert (control["command"], fault["command"]) == (again, f"{again} --fault 'wrong greedy choice'")
    with pytest.raises(UsageError, match=r"no such fault here(?s:.*)wrong greedy choice"):
        CliRunner().invoke(cli, [*words, "--fault", "another"], catch_exceptions=False)
    with pytest.raises(UsageError, match="--fault is of --self-test"):
        CliRunner().invoke(cli, ["validate", str(model), str(exported), "--fault", "x"], catch_exceptions=False)


def test_an_unknown_fault_or_another_export_is_refused_before_a_model_is_made(
    model: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made in ("synthesize", "export_model", "TorchRunner", "OrtRunner"):
        monkeypatch.setattr(self_test, made, lambda *_, **__: pytest.fail("a model was made"))
    with pytest.raises(UsageError, match=r"no such fault here(?s:.*)another(?s:.*)wrong greedy choice"):
        run_self_test(None, None, 1, no_progress, only=("another",))
    with pytest.raises(UsageError, match=r"no such fault here(?s:.*)one of: wrong chunkwise decay$"):
        run_self_test(model, exported, 1, no_progress, ("torch",), ("swapped state",))
    demo = Path(__file__).parents[2] / "models" / "demo"
    with pytest.raises(UsageError, match="another checkpoint"):
        run_self_test(demo, exported, 1, no_progress)


@pytest.mark.parametrize(
    ("layers", "changes", "details", "lacking"),
    [
        ("KK", {}, {}, "no MLA"),
        ("MM", {}, {}, "no KDA"),
        ("KM", {"first_k_dense_replace": 2}, {}, "no experts"),
        ("KM", {}, {"quantization": {"bits": 8}}, "quantised weights"),
    ],
)
def test_an_export_that_lacks_what_faults_are_planted_in_is_refused(
    model: Path, exported: Path, tmp_path: Path, layers: str, changes: dict[str, int], details: Any, lacking: str
) -> None:
    """By its manifest and config alone."""
    manifest = Manifest.read(exported)
    manifest = replace(manifest, details=manifest.details | details)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.to_dict()))
    (tmp_path / "config.json").write_text(json.dumps(raw_config(layers=layers, **changes)))
    with pytest.raises(UsageError, match=f"cannot be planted(?s:.*): {lacking}\n"):
        run_self_test(model, tmp_path, 1, no_progress)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--self-test", "--html", "page.html"], "--html is not of --self-test"),
        (["--self-test", "--only", "prefill"], "--only is not of --self-test"),
        (["--self-test", "--kernels", "none"], "--kernels is not of --self-test"),
        (["--self-test", "--layer-by-layer"], "--layer-by-layer is not of --self-test"),
        (["--layer-by-layer", "--html", "page.html"], "--html is not of --layer-by-layer"),
        (["--layer-by-layer", "--backend", "trt"], "--backend is not of --layer-by-layer"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    model: Path, exported: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(cli, ["validate", str(model), str(exported), *words], catch_exceptions=False)


def test_a_fault_that_escapes_or_is_misnamed_fails(
    model: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = next(f for f in FAULTS if f.name == "swapped state")

    def elsewhere(graph: object) -> Planted:
        found = swapped.plant(graph)
        return Planted(found.where, found.check, ("0.conv_state",))

    harmless = Fault("nothing", lambda graph: Planted("nowhere", "prefill", ("logits",)))
    monkeypatch.setattr(self_test, "FAULTS", (harmless, Fault("misnamed", elsewhere)))
    done = CliRunner().invoke(
        cli, ["validate", str(model), str(exported), "--self-test", "--backend", "ort", "--threads", "1", "--json"]
    )
    assert done.exit_code == 1
    assert [(f["fault"], f["passed"], f["note"]) for f in json.loads(done.stdout)["faults"]] == [
        ("none", True, ""),
        ("nothing", False, "escaped"),
        ("misnamed", False, "expected prefill, 0.conv_state"),
    ]


def test_a_broken_export_fails_as_its_own_control(
    model: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = self_test.Graph(exported)
    next(f for f in FAULTS if f.name == "zeroed slice").plant(graph)
    graph.save(tmp_path / "broken")
    monkeypatch.setattr(self_test, "FAULTS", ())
    (control,) = run_self_test(model, tmp_path / "broken", 1, no_progress, ("ort",))
    assert (control.passed, control.named) == (False, "fails")
