"""Every bits, group and symmetry: the whole graph computes what its stored levels stand for, of either method."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx import export as export_module
from kimi_deploy.quantization.scheme import BITS, GROUPS, METHODS, parse_scheme
from kimi_deploy.validate.run import Settings, validate_export
from kimi_deploy.validate.selection import Selection
from tests.configs import config
from tests.graph.conftest import export, no_progress
from tests.models import write_model

SYMMETRY = ("symmetric", "asymmetric")
# the method decides which levels are stored, never how they are read: it alternates, so that every pair is there
SCHEMES = [
    f"int{bits},group={group},{symmetry},{METHODS[(b + g + s) % 2]},head,embeddings"
    for b, bits in enumerate(BITS)
    for g, group in enumerate(GROUPS)
    for s, symmetry in enumerate(SYMMETRY)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every quantised dimension is a multiple of the largest group."""
    shape = config(
        "KM",
        vocab_size=264,
        hidden_size=128,
        v_head_dim=64,
        intermediate_size=128,
        moe_intermediate_size=128,
        linear_attn_config={"num_heads": 2, "head_dim": 64},
    )
    return write_model(tmp_path_factory.mktemp("schemes") / "model", shape, tokenizer=True)


@pytest.fixture(scope="module")
def traced() -> list[ir.Model]:
    """The graph before it is quantised, which is the same for all."""
    return []


@pytest.mark.parametrize("text", SCHEMES)
def test_the_graph_computes_what_its_levels_stand_for(
    text: str, model: Path, traced: list[ir.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = export_module.build_graph

    def once(*arguments: Any) -> ir.Model:
        if not traced:
            traced.append(build(*arguments))
        return traced[0].clone()

    monkeypatch.setattr(export_module, "build_graph", once)
    output = tmp_path / "export"
    export(model, output, quantization=parse_scheme(text))
    assert Manifest.read(output).details["quantization"]["group"] == parse_scheme(text).group
    selection = Selection(("prefill", "decode-steps"))
    settings = Settings(max_tokens=6, long_tokens=10, greedy_tokens=2, threads=1, selection=selection)
    report = validate_export(model, output, settings, no_progress)
    assert report.passed, report.first_failure
    assert {r.check for r in report.rows} >= {"prefill", "decode-steps"}
