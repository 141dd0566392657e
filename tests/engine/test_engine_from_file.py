"""build-engine FILE.onnx: another exporter's graph through parser, plugin and plan, and everything that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from kimi_deploy.cli.main import cli
from kimi_deploy.engine import plugin_executors
from kimi_deploy.engine.engine_from_file import build_engine_from_file, parse_profiles, read_standard_graph
from kimi_deploy.engine.plugin_executors import KernelExecutor, TorchExecutor
from kimi_deploy.engine.plugin_fields import read_fields
from kimi_deploy.engine.recipe import EngineRecipe
from kimi_deploy.errors import BackendError, ContractError, EngineError, KimiDeployError, ManifestError, UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.ops.standard import UPDATE_RULES
from kimi_deploy.runtime.trt_runner import open_trt_runner
from tests.capabilities import needs_tensorrt_rtx
from tests.engine.conftest import no_progress
from tests.engine.other_exporter import DOMAINS, Domain, GatedDeltaNet, all_rules, one_node
from tests.kernels.standard_cases import causal_conv_case

RECIPE = EngineRecipe(backend="tensorrt-rtx", compute_capabilities=("8.9",))
LAYER = GatedDeltaNet()
PREFILL, DECODE = "batch=1:1:2,sequence=1:8:32", "batch=1:1:2,sequence=1"


@pytest.fixture(autouse=True)
def kernels(executor: KernelExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins are sized by the kernels on the CPU, which every machine can compile."""
    monkeypatch.setattr(plugin_executors, "default_executor", lambda: executor)


def saved(model: onnx.ModelProto, folder: Path, **options: Any) -> Path:
    onnx.save_model(model, folder / "other.onnx", **options)
    return folder / "other.onnx"


def built(path: Path, output: Path, *profiles: str) -> Manifest:
    return build_engine_from_file(path, output, RECIPE, profiles, overwrite=False, progress=no_progress)


@needs_tensorrt_rtx
@pytest.mark.parametrize("domain", DOMAINS)
def test_a_gated_delta_net_is_one_plan_with_both_profiles(domain: Domain, tmp_path: Path) -> None:
    path = saved(LAYER.model(domain, TensorProto.FLOAT16), tmp_path)
    before = path.read_bytes()
    manifest = built(path, tmp_path / "plan", PREFILL, DECODE)
    manifest.verify(tmp_path / "plan")
    assert manifest.kind == "plan"
    assert manifest.details["plugins"] == {"CausalConvWithState": 1, "LinearAttention": 1}
    assert manifest.details["profiles"]["1"]["hidden"] == [[1, 1, 24], [1, 1, 24], [2, 1, 24]]
    assert manifest.details["inputs"]["past_recurrent"] == ["batch", 4, 16, 8]
    plan = (tmp_path / "plan" / "engine.plan").read_bytes()
    assert b"LinearAttention" in plan
    assert path.read_bytes() == before, "the user's file is only read"


@needs_tensorrt_rtx
def test_every_rule_and_decay_is_a_plugin_that_keeps_its_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plugins were made from, as TensorRT's parser gave it to the creator."""
    seen: list[tuple[object, object]] = []

    def noting(*arguments: Any) -> dict[str, Any]:
        fields = read_fields(*arguments)
        seen.append((fields["update_rule"], fields["scale"]))
        return fields

    monkeypatch.setattr("kimi_deploy.engine.plugin.read_fields", noting)
    model = all_rules()
    onnx.checker.check_model(model, full_check=True)
    wanted = [
        (helper.get_node_attr_value(n, "update_rule").decode(), helper.get_node_attr_value(n, "scale"))
        for n in model.graph.node
    ]
    assert {rule for rule, _ in wanted} == set(UPDATE_RULES)
    manifest = built(saved(model, tmp_path), tmp_path / "plan", PREFILL)
    assert manifest.details["plugins"] == {"LinearAttention": len(wanted)}
    # the rule delta without a decay is gated_delta with a decay of nothing
    assert set(seen) >= {("gated_delta" if rule == "delta" else rule, scale) for rule, scale in wanted}


@needs_tensorrt_rtx
def test_weights_beside_the_file_are_read_from_there(tmp_path: Path) -> None:
    path = saved(LAYER.model(""), tmp_path, save_as_external_data=True, location="other.weights", size_threshold=0)
    manifest = built(path, tmp_path / "plan", PREFILL)
    row = LAYER.weights["out_proj"][3].tobytes()
    column = np.ascontiguousarray(LAYER.weights["out_proj"][:, 3]).tobytes()
    plan = (tmp_path / "plan" / "engine.plan").read_bytes()
    assert row in plan or column in plan
    assert manifest.details["plugins"]["LinearAttention"] == 1


@pytest.mark.parametrize("size", [None, 1000])
def test_weights_that_are_not_where_the_graph_says_are_refused(size: int | None, tmp_path: Path) -> None:
    path = saved(LAYER.model(""), tmp_path, save_as_external_data=True, location="other.weights", size_threshold=0)
    weights = tmp_path / "other.weights"
    data = weights.read_bytes()
    read_standard_graph(path)
    weights.unlink()
    if size is not None:
        weights.write_bytes(data[:size])
    seen = "no such file" if size is None else "1000 bytes"
    with pytest.raises(UsageError, match=rf"(?s)weight \S+ is not in its file.*other\.weights: {seen}"):
        read_standard_graph(path)


@needs_tensorrt_rtx
def test_the_command_builds_prints_and_inspects(tmp_path: Path) -> None:
    path, output = saved(LAYER.model(""), tmp_path), tmp_path / "plan"
    arguments = ["build-engine", str(path), "-o", str(output), "--profile", PREFILL, "--capability", "8.9"]
    done = CliRunner().invoke(cli, [*arguments, "--backend", "tensorrt-rtx", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["manifest"]["kind"] == "plan"
    shown = CliRunner().invoke(cli, ["inspect", str(output)])
    assert shown.exit_code == 0, shown.output
    assert "1 LinearAttention" in shown.stdout
    assert "32x24" in shown.stdout.replace("2x32x24", "32x24")
    # an engine that the runner has no states for
    with pytest.raises(ManifestError, match="another kind of artefact"):
        open_trt_runner(output)
    again = CliRunner().invoke(cli, [*arguments, "--force", "--json"])
    assert again.exit_code == 0, again.output


def test_the_saved_graph_asks_for_the_plugins_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libkimi_plugins.so"
    monkeypatch.setattr(
        "kimi_deploy.engine.plugin_library.PluginLibrary.open",
        classmethod(lambda cls: type("Library", (), {"path": library})()),
    )
    path = saved(LAYER.model(""), tmp_path)
    arguments = ["build-engine", str(path), "-o", str(tmp_path / "plan"), "--profile", PREFILL]
    done = CliRunner().invoke(cli, [*arguments, "--save-onnx", str(tmp_path / "graph"), "--print-trtexec"])
    assert done.exit_code == 0, done.output
    assert f"--staticPlugins={library}" in done.stdout
    assert "--maxShapes=hidden:2x32x24,past_conv:2x96x3,past_recurrent:2x4x16x8" in done.stdout
    graph = onnx.load(tmp_path / "graph" / "model.onnx").graph
    asked = {
        n.op_type: {a.name: a.s for a in n.attribute if a.name.startswith("plugin_")}
        for n in graph.node
        if any(a.name == "plugin_namespace" for a in n.attribute)
    }
    wanted = {"plugin_namespace": b"", "plugin_version": b"1"}
    assert asked == {"CausalConvWithState": wanted, "LinearAttention": wanted}
    assert not (tmp_path / "plan").exists()


def test_axes_without_a_name_are_named_for_their_place(tmp_path: Path) -> None:
    model = LAYER.model("")
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].ClearField("dim_param")
    graph = read_standard_graph(saved(model, tmp_path))
    assert graph.axes == ("hidden.0", "sequence", "past_conv.0", "past_recurrent.0")
    text = "hidden.0=2,sequence=1:2:4,past_conv.0=2,past_recurrent.0=2"
    assert parse_profiles(graph, [text])["0"]["hidden"] == ((2, 1, 24), (2, 2, 24), (2, 4, 24))


@pytest.mark.parametrize(
    ("profiles", "error", "says"),
    [
        ([], UsageError, "batch=MIN:OPT:MAX,sequence=MIN:OPT:MAX"),
        (["batch=1"], UsageError, r"missing \['sequence'\], unknown \[\]"),
        (["batch=1,sequence=1,tokens=1"], UsageError, r"missing \[\], unknown \['tokens'\]"),
        (["batch=4:2:1,sequence=1"], UsageError, "batch is not a range"),
        (["batch=1,sequence=1:1:1000000000"], EngineError, r"makes hidden too large"),
    ],
)
def test_profiles_that_are_not_the_graphs_are_refused(
    profiles: list[str], error: type[KimiDeployError], says: str, tmp_path: Path
) -> None:
    graph = read_standard_graph(saved(LAYER.model(""), tmp_path))
    with pytest.raises(error, match=f"(?s){says}"):
        parse_profiles(graph, profiles)


def test_files_that_are_no_such_graph_are_refused(export: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="folder says more"):
        read_standard_graph(export / "model.onnx")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    plain = helper.make_model(helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "plain", [value], [out]))
    with pytest.raises(UsageError, match="no LinearAttention and no CausalConvWithState"):
        read_standard_graph(saved(plain, tmp_path))
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(UsageError, match="not an ONNX model"):
        read_standard_graph(tmp_path / "text.onnx")


def test_a_node_that_the_plugins_cannot_run_is_refused_with_its_attribute(tmp_path: Path) -> None:
    arrays, _ = causal_conv_case()
    outputs = {"output": arrays["input"], "present_state": arrays["past_state"]}
    model = one_node("CausalConvWithState", "com.microsoft", arrays, outputs, activation="silu", dilation=2)
    with pytest.raises(ContractError, match="dilation = 2"):
        read_standard_graph(saved(model, tmp_path))


@needs_tensorrt_rtx
def test_without_the_kernels_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_executors, "default_executor", TorchExecutor)
    with pytest.raises(BackendError, match="make kernels"):
        built(saved(LAYER.model(""), tmp_path), tmp_path / "plan", PREFILL)


@needs_tensorrt_rtx
def test_sizes_that_the_kernels_do_not_take_are_an_error_of_the_build(tmp_path: Path) -> None:
    """Raised inside a plugin, it would end the process."""
    with pytest.raises(ContractError, match="key"):
        built(saved(all_rules(size=640), tmp_path), tmp_path / "plan", PREFILL)
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--prefill", "sequence=1", "--profile", PREFILL),
        ("--plugin", "none", "--profile", PREFILL),
        ("--plans", "two", "--profile", PREFILL),
        (),
    ],
)
def test_options_of_an_export_are_refused_for_a_file(options: tuple[str, ...], tmp_path: Path) -> None:
    path = saved(LAYER.model(""), tmp_path)
    done = CliRunner().invoke(cli, ["build-engine", str(path), "-o", str(tmp_path / "plan"), *options])
    assert isinstance(done.exception, UsageError), done.output
    assert not (tmp_path / "plan").exists()


def test_profile_is_refused_for_an_export(export: Path, tmp_path: Path) -> None:
    for folder in (export, tmp_path / "missing.onnx"):
        done = CliRunner().invoke(cli, ["build-engine", str(folder), "-o", str(tmp_path / "e"), "--profile", PREFILL])
        assert isinstance(done.exception, UsageError), done.output


def test_what_is_replaced_is_only_what_this_command_wrote(export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "plan")
    with pytest.raises(UsageError):
        build_engine_from_file(
            saved(LAYER.model(""), tmp_path), tmp_path / "plan", RECIPE, [PREFILL], overwrite=True, progress=no_progress
        )
