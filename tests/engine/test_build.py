"""Engines of a whole model: with the plugin in every KDA node, without any plugin, and everything that is refused."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kimi_deploy import manifest as manifest_module
from kimi_deploy.contract import METADATA_KEY, GraphContract
from kimi_deploy.engine import backend as backends
from kimi_deploy.engine import engine_from_onnx, plan, plugin_executors, requirements
from kimi_deploy.engine.engine_from_onnx import build_engine
from kimi_deploy.engine.network import read_graph
from kimi_deploy.engine.recipe import EngineRecipe, change_profile
from kimi_deploy.errors import (
    BackendError,
    ContractError,
    EngineError,
    KimiDeployError,
    ManifestError,
    UsageError,
)
from kimi_deploy.manifest import WEIGHT_SUFFIXES, Manifest, sha256
from kimi_deploy.ops.plugins import PLUGIN_OPS
from kimi_deploy.ops.registry import OPS
from tests.capabilities import needs_tensorrt_rtx
from tests.engine.conftest import RECIPE, no_progress
from tests.engine.test_requirements import FakeConfig

pytestmark = needs_tensorrt_rtx


def build(export: Path, output: Path, **changes: Any) -> Manifest:
    return build_engine(export, output, replace(RECIPE, **changes), overwrite=False, progress=no_progress)


def test_every_kda_node_is_a_plugin_in_the_plan(export: Path, engine: Path) -> None:
    manifest = Manifest.read(engine)
    manifest.verify(engine)
    details = manifest.details
    assert details["plugins"] == {"KimiDeltaAttention": 2}
    assert (details["backend"], details["compute_capabilities"]) == ("tensorrt-rtx", ["8.9"])
    assert details["backend_version"] == backends.load("tensorrt-rtx").version
    assert manifest.op_abi == {n: s.abi for n, s in OPS.items() if n != "QuantizedMixtureOfExperts"}
    assert manifest.source["model.onnx"] == Manifest.read(export).files["model.onnx"]["sha256"]
    assert GraphContract.from_json(json.dumps(details["contract"])).states
    assert {n: p["index"] for n, p in details["profiles"].items()} == {"prefill": 0, "decode": 1}
    assert details["profiles"]["decode"]["shapes"]["input_ids"] == [[1, 1], [1, 1], [2, 1]]
    # the serialised fields of both plugins, for each profile at least once
    assert (engine / "engine.plan").read_bytes().count(OPS["KimiDeltaAttention"].abi.encode()) >= 2 * 2
    # what refitting parses again, whatever is built there
    assert details["recipe"]["plugin_ops"] == ["KimiDeltaAttention"]
    assert sorted(p.name for p in engine.iterdir()) == sorted([*manifest.files, "manifest.json"])
    assert (engine / "config.json").read_bytes() == (export / "config.json").read_bytes()


def test_both_profiles_share_one_copy_of_the_weights(export: Path, engine: Path) -> None:
    """A part of a row and of a column of each matrix is looked for: together they are found once."""
    plan = (engine / "engine.plan").read_bytes()
    found = {}
    for name, value in ir.load(export / "model.onnx").graph.initializers.items():
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.ndim < 2 or array.dtype != np.float32:
            continue
        matrix = array.reshape(-1, array.shape[-1])
        row, column = matrix[len(matrix) // 2, :8], matrix[:8, matrix.shape[1] // 2]
        # a convolution's filter has rows too short to be looked for
        if len(row) == 8:
            found[name] = plan.count(row.tobytes()) + plan.count(np.ascontiguousarray(column).tobytes())
    assert len(found) > 20
    assert set(found.values()) == {1}, {k: v for k, v in found.items() if v != 1}


def test_an_engine_without_any_plugin(engine: Path, plain_engine: Path) -> None:
    # `engine` has registered the plugin in this process: it must not be taken all the same
    assert Manifest.read(plain_engine).details["plugins"] == {}
    plan = (plain_engine / "engine.plan").read_bytes()
    assert OPS["KimiDeltaAttention"].abi.encode() not in plan
    assert len(plan) > 1_000_000


def test_two_plans_have_a_profile_each(export: Path, tmp_path: Path) -> None:
    manifest = build(export, tmp_path / "engine", plans="two")
    table = manifest.details["profiles"]
    assert {n: (p["plan"], p["index"]) for n, p in table.items()} == {
        "prefill": ("engine.plan", 0),
        "decode": ("decode.plan", 0),
    }
    weights = (export / "weights.bin").stat().st_size
    for name in ("engine.plan", "decode.plan"):
        assert manifest.files[name]["bytes"] > weights
    assert table["decode"]["shapes"]["input_ids"][2] == [2, 1]


def test_the_second_plan_reads_the_timing_cache_that_the_first_one_wrote(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a config that has such a cache, as TensorRT-RTX's has not."""
    configs: list[FakeConfig] = []

    def builder_config(*arguments: Any) -> FakeConfig:
        configs.append(FakeConfig())
        return configs[-1]

    @contextmanager
    def polygraphy_of(backend: object) -> Iterator[Any]:
        yield SimpleNamespace(error=Exception, engine_bytes=lambda network, config: b"plan")

    monkeypatch.setattr(engine_from_onnx, "check_options", lambda *arguments: None)
    monkeypatch.setattr(plan, "builder_config", builder_config)
    monkeypatch.setattr(plan, "polygraphy_of", polygraphy_of)
    cache = tmp_path / "cache"
    manifest = build(export, tmp_path / "engine", plans="two", timing_cache=str(cache))
    assert [config.cache for config in configs] == [b"", cache.read_bytes()]
    assert manifest.details["timing_cache"] == {"file": str(cache), "sha256": sha256(cache)}


def test_states_can_be_aliased(export: Path, tmp_path: Path) -> None:
    assert build(export, tmp_path / "engine", in_place_state=True).details["plugins"] == {"KimiDeltaAttention": 2}


def test_the_graph_is_changed_in_memory_and_its_weights_stay_outside(export: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in export.iterdir()}
    with_plugin = read_graph(export / "model.onnx", PLUGIN_OPS)
    without = read_graph(export / "model.onnx", frozenset())
    assert with_plugin.custom_nodes == {"KimiDeltaAttention": 2, "LatentAttention": 1, "MixtureOfExperts": 2}
    for graph, marked in ((with_plugin, PLUGIN_OPS), (without, frozenset())):
        model = onnx.load_from_string(graph.proto)
        custom = [n for n in model.graph.node if n.domain == "kimi"]
        assert {n.op_type for n in custom if any(a.name == "plugin_namespace" for a in n.attribute)} == marked
        called = {(n.domain, n.op_type) for f in model.functions for n in f.node}
        assert not {domain for domain, _ in called} - {"", "ai.onnx", "kimi"}
        assert not {"LinearAttention", "CausalConvWithState", "Attention"} & {op for _, op in called}
        assert len(graph.proto) < (export / "weights.bin").stat().st_size + 1_000_000
        assert any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
    assert {p.name: p.stat().st_mtime_ns for p in export.iterdir()} == before


@pytest.fixture
def copy(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "copy"))


def rewrite(folder: Path, **changes: Any) -> None:
    """Change manifest.json."""
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(raw | changes))


def edit_nodes(folder: Path, name: str, value: bytes | None) -> None:
    """Set or drop an attribute of every KDA node, and make the manifest agree with the file."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in list(node.attribute):
            if node.op_type == "KimiDeltaAttention" and attribute.name == name:
                if value is None:
                    node.attribute.remove(attribute)
                else:
                    attribute.s = value
    onnx.save(model, folder / "model.onnx")
    Manifest.read(folder).write(folder)


def refused(export: Path, output: Path, error: type[KimiDeployError], says: str, **changes: Any) -> None:
    with pytest.raises(error, match=says):
        build(export, output, **changes)
    assert not output.exists()
    assert not list(output.parent.glob(".engine*")), "a temporary folder was left"


def test_a_node_of_another_abi_is_refused_with_both_hashes(copy: Path, tmp_path: Path) -> None:
    edit_nodes(copy, "abi", b"0123456789abcdef")
    says = f"(?s)ABI.*0123456789abcdef.*{OPS['KimiDeltaAttention'].abi}.*export the model again"
    refused(copy, tmp_path / "engine", ContractError, says)


def test_a_node_without_its_abi_is_refused(copy: Path, tmp_path: Path) -> None:
    edit_nodes(copy, "abi", None)
    refused(copy, tmp_path / "engine", ContractError, "(?s)fields do not match.*missing.*abi")


def test_a_node_that_does_not_ask_for_the_plugin_is_noticed(copy: Path, tmp_path: Path) -> None:
    edit_nodes(copy, "plugin_namespace", None)
    refused(copy, tmp_path / "engine", EngineError, "(?s)did not take the plugins.*'KimiDeltaAttention': 2")


def test_an_export_of_another_abi_is_refused_by_its_manifest(copy: Path, tmp_path: Path) -> None:
    rewrite(copy, op_abi={"KimiDeltaAttention": "0123456789abcdef"})
    refused(copy, tmp_path / "engine", ManifestError, "ABI of KimiDeltaAttention")


def test_changed_weights_are_refused(copy: Path, tmp_path: Path) -> None:
    data = bytearray((copy / "weights.bin").read_bytes())
    data[1000] ^= 1
    (copy / "weights.bin").write_bytes(data)
    refused(copy, tmp_path / "engine", ManifestError, "weights.bin")


def test_what_is_not_an_export_is_refused(checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    says = f"(?s)checkpoint, not an export.*kimi-deploy export {checkpoint} -o DIR"
    refused(checkpoint, tmp_path / "engine", ManifestError, says)
    refused(engine, tmp_path / "engine", ManifestError, "another kind")


def test_an_operator_tensorrt_does_not_know_is_named_with_its_node(copy: Path, tmp_path: Path) -> None:
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "Sigmoid")
    node.op_type, node.name = "Det", "the_culprit"
    onnx.save(model, copy / "model.onnx")
    Manifest.read(copy).write(copy)
    refused(copy, tmp_path / "engine", EngineError, r"the_culprit \(Det\)")


def test_an_architecture_that_is_not_offered_is_refused(export: Path, tmp_path: Path) -> None:
    offered = backends.load("tensorrt-rtx").offered_capabilities
    assert {"8.9", "12.0"} <= set(offered)
    assert "9.0" not in offered
    refused(export, tmp_path / "engine", UsageError, "(?s)9.0.*8.9", compute_capabilities=("8.9", "9.0"))


def test_an_op_that_only_kernels_run_is_refused_without_them(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_executors, "default_executor", plugin_executors.TorchExecutor)
    # nothing is hashed before
    monkeypatch.setattr(Manifest, "verify", lambda *arguments: pytest.fail("the export was read"))
    says = "(?s)MixtureOfExperts need the kernel library.*make kernels"
    refused(export, tmp_path / "engine", BackendError, says, plugin_ops=("KimiDeltaAttention", "MixtureOfExperts"))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that hashes weights: a refusal must not wait for them."""
    hashed = manifest_module.sha256

    def sha256(path: Path, *rest: Any) -> str:
        assert path.suffix not in WEIGHT_SUFFIXES, f"{path} was read"
        return hashed(path, *rest)

    monkeypatch.setattr(manifest_module, "sha256", sha256)


@pytest.mark.usefixtures("unread")
def test_bfloat16_on_a_gpu_that_has_none_is_refused(copy: Path, tmp_path: Path) -> None:
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = json.dumps(json.loads(entry.value) | {"dtype": "bfloat16"})
    onnx.save(model, copy / "model.onnx")
    raw = json.loads((copy / "manifest.json").read_text())
    graph = {"bytes": (copy / "model.onnx").stat().st_size, "sha256": sha256(copy / "model.onnx")}
    rewrite(copy, files=raw["files"] | {"model.onnx": graph})
    says = r"(?s)7\.5 has no bfloat16.*--dtype float16"
    refused(copy, tmp_path / "engine", UsageError, says, plugin="none", compute_capabilities=("7.5",))


@pytest.mark.usefixtures("unread")
def test_a_graph_is_not_written_for_a_build_that_is_refused(export: Path, tmp_path: Path) -> None:
    wide = replace(RECIPE, decode=change_profile(RECIPE.decode, {"capacity": [1, 64, 2**31 - 1]}, "test"))
    graph = tmp_path / "graph"
    with pytest.raises(EngineError, match="latent too large"):
        build_engine(export, tmp_path / "engine", wide, overwrite=False, progress=no_progress, graph_to=graph)
    assert not graph.exists()


@pytest.mark.usefixtures("unread")
def test_a_file_or_folder_that_cannot_be_written_is_refused(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"(?s)not empty.*graph"):
        build_engine(
            export, tmp_path / "engine", RECIPE, overwrite=False, progress=no_progress, graph_to=tmp_path / "graph"
        )
    # TensorRT-RTX has no such cache
    monkeypatch.setattr(engine_from_onnx, "check_options", lambda *arguments: None)
    cache = tmp_path / "missing" / "cache"
    refused(export, tmp_path / "engine", UsageError, f"timing_cache: no folder {cache.parent}", timing_cache=str(cache))


@pytest.mark.usefixtures("unread")
def test_profiles_beyond_what_tensorrt_addresses_are_refused(export: Path, tmp_path: Path) -> None:
    wide = change_profile(RECIPE.prefill, {"capacity": [1, 64, 2**31 - 1]}, "test")
    refused(export, tmp_path / "engine", EngineError, "(?s)latent too large.*--prefill", prefill=wide)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("field", ["disk", "memory"])
def test_too_little_room_is_refused(field: str, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if field == "disk":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(requirements.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    else:
        monkeypatch.setattr(requirements, "machine_memory", lambda: 1000)
    refused(export, tmp_path / "engine", EngineError, f"not enough {field}")


def test_an_output_that_is_in_the_way_is_refused(export: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        build(export, tmp_path / "engine")
    assert (tmp_path / "engine" / "notes.txt").read_text() == "mine"


def test_an_interrupted_build_leaves_nothing(export: Path, tmp_path: Path) -> None:
    """Ctrl-C arrives while TensorRT is building."""

    class Advance:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def __call__(self, amount: int) -> None:
            signal.raise_signal(signal.SIGINT)

    def progress(what: str, total: int | None = None, unit: str = "bytes") -> Any:
        return Advance() if "building" in what else no_progress(what)

    with pytest.raises(KeyboardInterrupt):
        build_engine(export, tmp_path / "engine", RECIPE, overwrite=False, progress=progress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("choice", "installed", "gpus", "expected"),
    [
        ("auto", {"tensorrt", "tensorrt-rtx"}, 1, "tensorrt"),
        ("auto", {"tensorrt", "tensorrt-rtx"}, 0, "tensorrt-rtx"),
        ("auto", {"tensorrt-rtx"}, 1, "tensorrt-rtx"),
        ("tensorrt", {"tensorrt"}, 0, "tensorrt"),
        ("auto", {"tensorrt"}, 0, BackendError),
        ("auto", set(), 1, BackendError),
        ("tensorrt", {"tensorrt-rtx"}, 1, BackendError),
        ("tensorrt-rtx", {"tensorrt"}, 1, BackendError),
    ],
)
def test_the_choice_of_backend(
    choice: Any, installed: set[str], gpus: int, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "installed", lambda name: name in installed)
    monkeypatch.setattr(backends, "gpu_devices", lambda: ("gpu",) * gpus)
    if isinstance(expected, str):
        assert backends.choose(choice) == expected
    else:
        with pytest.raises(expected, match="pip install"):
            backends.choose(choice)


def test_the_full_tensorrt_needs_a_gpu_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = backends.load("tensorrt-rtx")
    monkeypatch.setattr(requirements, "gpu_devices", lambda: ())
    with pytest.raises(BackendError, match="tensorrt-rtx"):
        requirements.check_machine(replace(rtx, name="tensorrt"))


def test_the_default_recipe_is_the_default() -> None:
    root = Path(__file__).parents[2] / "engines"
    assert EngineRecipe.from_toml(root / "default.toml") == EngineRecipe()
    assert EngineRecipe.from_toml(root / "rtx-laptop.toml").backend == "tensorrt-rtx"
