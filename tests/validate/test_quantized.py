"""validate tells a quantised graph that computes wrongly from one that computes what bad levels stand for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx.export import export_model
from kimi_deploy.quantization.scheme import parse_scheme
from kimi_deploy.validate.quantized import Quality, judge
from kimi_deploy.validate.report import Report
from kimi_deploy.validate.run import Settings, validate_export
from kimi_deploy.validate.selection import Selection
from tests.configs import config
from tests.graph.conftest import no_progress
from tests.models import write_model

CHECKS = ("prefill", "decode-steps", "greedy", "rounded-inputs", "quality")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "model"
    shape = config("KM", vocab_size=264, intermediate_size=64, moe_intermediate_size=32)
    return write_model(folder, shape, tokenizer=True)


def export(model: Path, text: str) -> Path:
    output = model.parent / text
    scheme = parse_scheme(text)
    export_model(
        model, output, dtype="float32", flavour="ort", overwrite=False, progress=no_progress, quantization=scheme
    )
    return output


@pytest.fixture(scope="module")
def exported(model: Path) -> Path:
    return export(model, "int4,head,embeddings")


def changed(exported: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    shutil.copytree(exported, folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    change(graph)
    onnx.save(graph, folder / "model.onnx")
    manifest = Manifest.read(folder)
    manifest.write(folder)
    return folder


def validated(model: Path, export: Path, checks: tuple[str, ...] = CHECKS) -> Report:
    settings = Settings(max_tokens=24, long_tokens=30, greedy_tokens=6, threads=1, selection=Selection(checks))
    return validate_export(model, export, settings, no_progress)


def failed(report: Report) -> set[str]:
    return {r.check for r in report.rows if r.judged and not r.passed}


def test_arithmetic_is_right_to_float32_and_the_loss_is_measured(model: Path, exported: Path) -> None:
    report = validated(model, exported)
    assert report.passed, report.first_failure
    assert {r.check for r in report.rows} == set(CHECKS)
    assert max(r.peak for r in report.rows) < 1e-4
    quality = report.to_dict()["quality"]
    assert 0.0 < quality["kl"] < 0.5
    assert 0.3 < quality["top1"] < 1.0
    assert report.to_dict()["quantization"]["bits"] == 4
    # random weights have no text to be good at, and the verdict says so
    assert quality["perplexity_unquantised"] > quality["chance"] == 264
    assert report.rows[-1].note.endswith("no better than chance (264) before quantising: judged as an untrained model")


def test_only_a_model_that_knows_no_text_is_judged_as_untrained() -> None:
    scheme = parse_scheme("int4")
    trained = Quality(100, 0.2, 0.9, perplexity=10.0, perplexity_unquantised=10.0, chance=264, is_text=True)
    assert not judge(trained, scheme).passed
    assert judge(replace(trained, perplexity_unquantised=264.0), scheme).passed
    assert not judge(replace(trained, perplexity_unquantised=263.0), scheme).passed
    assert not judge(replace(trained, perplexity_unquantised=264.0, kl=0.6), scheme).passed
    # without a text nothing is known of the model, and the bound is that of trained ones
    assert not judge(replace(trained, perplexity_unquantised=264.0, is_text=False), scheme).passed
    assert not judge(replace(trained, kl=0.01, perplexity=11.0), scheme).passed


def test_eight_bits_lose_little_and_pass(model: Path) -> None:
    report = validated(model, export(model, "int8"))
    assert report.passed, report.first_failure
    assert report.to_dict()["quality"]["kl"] < 0.01


def test_float32_activations_need_no_other_graph(model: Path) -> None:
    report = validated(model, export(model, "int4,symmetric,rtn,activations=float32"))
    assert report.passed, report.first_failure
    assert "rounded-inputs" not in {r.check for r in report.rows}


def test_a_product_that_forgets_its_zero_points_is_found(model: Path, exported: Path, tmp_path: Path) -> None:
    def forget(graph: onnx.ModelProto) -> None:
        node = next(n for n in graph.graph.node if n.op_type == "MatMulNBits")
        del node.input[3:]

    assert {"prefill", "decode-steps", "rounded-inputs"} <= failed(
        validated(model, changed(exported, tmp_path / "x", forget))
    )


@pytest.mark.parametrize(
    ("product", "stage"), [("", "layer 0"), ("layers.1.self_attn.o_proj", "logits"), ("lm_head", "logits")]
)
def test_inputs_that_are_not_rounded_as_said_are_found_where_they_are(
    product: str, stage: str, model: Path, exported: Path, tmp_path: Path
) -> None:
    def never_round(graph: onnx.ModelProto) -> None:
        nodes = [n for n in graph.graph.node if n.op_type == "MatMulNBits" and product in n.input[1]]
        assert len(nodes) == 1 or not product
        for node in nodes:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 1

    # the arithmetic is right all the same, of which one case is enough
    checks = ("rounded-inputs",) if product else CHECKS
    report = validated(model, changed(exported, tmp_path / "x", never_round), checks)
    assert failed(report) == {"rounded-inputs"}
    (row,) = [r for r in report.rows if r.check == "rounded-inputs"]
    assert row.note.startswith(f"up to {stage}: ")


def test_wrong_levels_are_a_loss_of_quality_and_not_of_arithmetic(model: Path, exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "x")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    place = next(i for i in graph.graph.initializer if i.name.endswith("lm_head.weight_levels"))
    where = {e.key: int(e.value) for e in place.external_data if e.key in ("offset", "length")}
    weights = np.fromfile(folder / "weights.bin", np.uint8)
    weights[where["offset"] : where["offset"] + where["length"]] ^= 0x55
    weights.tofile(folder / "weights.bin")
    manifest = Manifest.read(folder)
    manifest.write(folder)
    report = validated(model, folder)
    assert failed(report) == {"quality"}
    assert "allowed are" in report.rows[-1].note
