"""The model that ships, in every form that runs on a CPU: what this repository must never break."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx.bodies import set_bodies
from kimi_deploy.ops.flavours import FLAVOURS, Flavour
from kimi_deploy.quantization.scheme import parse_scheme
from kimi_deploy.validate.faults.engine import Engine
from kimi_deploy.validate.run import Settings, validate_export
from kimi_deploy.validate.selection import PARITY_CHECKS, QUANTIZED_CHECKS
from tests.graph.conftest import export, no_progress

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
QUICK = Settings(max_tokens=40, long_tokens=130, greedy_tokens=48, threads=1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(DEMO, tmp_path_factory.mktemp("demo") / "export")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_demo_model_passes_with_every_body(flavour: Flavour, demo: Path) -> None:
    # another flavour is another set of bodies in the same graph
    model = ir.load(demo / "model.onnx")
    set_bodies(model, flavour, "float32")
    ir.save(model, demo / "model.onnx")
    manifest = Manifest.read(demo)
    replace(manifest, details={**manifest.details, "body": flavour}).write(demo)
    report = validate_export(DEMO, demo, QUICK, no_progress)
    assert report.passed, report.failure
    assert report.facts["body"] == flavour


def test_the_demo_model_passes_in_float16(tmp_path: Path) -> None:
    report = validate_export(DEMO, export(DEMO, tmp_path / "export", "float16"), QUICK, no_progress)
    assert report.passed, report.failure


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_the_demo_model_passes_in_8_and_4_bits(bits: str, tmp_path: Path) -> None:
    """The arithmetic to float32's bound, the rounding of inputs, and what it costs by the bounds of a trained model."""
    exported = export(DEMO, tmp_path / "export", quantization=parse_scheme(bits))
    report = validate_export(DEMO, exported, replace(QUICK, max_tokens=24, greedy_tokens=24), no_progress)
    assert report.passed, report.failure
    assert {r.check for r in report.rows} >= {*PARITY_CHECKS, *QUANTIZED_CHECKS}
    assert report.tolerance.name == "graph_float32"
    quality = report.facts["quality"]
    assert quality["perplexity_unquantised"] < quality["chance"]
    assert quality["tokens"] == 3923


def test_the_demo_model_passes_in_the_engine_runner_within_the_engines_sizes(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More prompts than the engine has rows, and a longer one than it has capacity: cut to fit, not refused."""
    engine = Engine(demo, Manifest.read(demo).source["checkpoint"])
    monkeypatch.setattr("kimi_deploy.validate.run.open_runner", lambda *_, **__: engine.run_by())
    report = validate_export(DEMO, demo, replace(QUICK, long_tokens=300, greedy_tokens=256, max_tokens=24), no_progress)
    assert report.passed, report.failure
    largest = engine.run_by().largest_state
    assert largest == (4, 256)
    assert len(report.facts["prompts"]) > 4
    assert report.facts["prompts"][-1] == {"name": "long", "tokens": 249}
    assert report.facts["greedy_tokens"] == 232
    assert {r.check for r in report.rows} >= {"ragged-batch", "padding", "full-cache", "resume"}
