"""A real engine on a real GPU: built, run by the TensorRT runner, compared with ONNX Runtime on the same export."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest

from kimi_deploy.bench.trt_profile import profile_engine
from kimi_deploy.cuda_driver import gpu_devices
from kimi_deploy.engine.engine_from_file import build_engine_from_file
from kimi_deploy.engine.engine_from_onnx import build_engine
from kimi_deploy.engine.plugin_library import default_path
from kimi_deploy.engine.recipe import EngineRecipe, PluginChoice, Profile
from kimi_deploy.engine.refit import refit_engine
from kimi_deploy.onnx.export import export_model
from kimi_deploy.runtime.generation import generate
from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.runtime.trt_runner import TrtRunner, open_trt_runner, open_trt_session
from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.tolerances import tolerance
from tests.capabilities import needs_runnable_tensorrt, runnable_tensorrt
from tests.configs import config
from tests.engine.other_exporter import GatedDeltaNet, all_rules
from tests.models import write_model
from tests.runtime.conftest import greedy, state_bytes

pytestmark = [pytest.mark.gpu, needs_runnable_tensorrt]

CLOSE = tolerance("graph_float32")
PLUGIN: PluginChoice = "native" if default_path().is_file() else "python"
"""A process has one kind: that of `make plugins` where it was run, which the plugin host loads too."""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    # heads that the kernels take
    sizes = config("KKM", linear_attn_config={"head_dim": 64})
    checkpoint = write_model(folder / "model", sizes, tokenizer=False)
    quiet = lambda *_: nullcontext(lambda n: None)  # noqa: E731
    export_model(checkpoint, folder / "export", dtype="float32", flavour="ort", overwrite=False, progress=quiet)
    return folder / "export"


@pytest.fixture(scope="module", params=["plugin", "none", "aliased", "two plans"])
def engine(request: pytest.FixtureRequest, export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend = runnable_tensorrt()
    assert backend is not None
    recipe = EngineRecipe(
        backend=backend,
        compute_capabilities=(gpu_devices()[0].capability,) if backend == "tensorrt-rtx" else (),
        plugin="none" if request.param == "none" else PLUGIN,
        in_place_state=request.param == "aliased",
        plans="two" if request.param == "two plans" else "one",
        prefill=Profile(batch=(1, 1, 3), sequence=(1, 8, 32), capacity=(1, 256, 300), num_logits=(1, 1, 4)),
        decode=Profile(batch=(1, 1, 3), capacity=(1, 256, 300)),
    )
    output = tmp_path_factory.mktemp("engine") / "engine"
    build_engine(export, output, recipe, overwrite=False, progress=lambda *_: nullcontext(lambda n: None))
    return output


@pytest.fixture(scope="module")
def trt(engine: Path) -> TrtRunner:
    return open_trt_runner(engine)


@pytest.fixture(scope="module")
def ort(export: Path) -> OrtRunner:
    return OrtRunner(export, threads=2)


def test_logits_and_states_are_those_of_onnx_runtime(trt: TrtRunner, ort: OrtRunner) -> None:
    ids = np.random.default_rng(0).integers(0, trt.contract.vocab_size, (3, 70))
    lengths = np.array([70, 3, 41], np.int32)
    states = [r.new_state(3, 100) for r in (trt, ort)]
    logits = [r.forward(ids, s, lengths) for r, s in zip((trt, ort), states, strict=True)]
    assert compare(*logits).within(CLOSE)
    for name, tensor in states[1].snapshot().tensors.items():
        assert compare(states[0].snapshot().tensors[name], tensor).within(CLOSE), name


def test_200_replayed_steps_equal_200_eager_ones(trt: TrtRunner, engine: Path) -> None:
    eager = open_trt_runner(engine, graphs=False)
    states = [r.new_state(2, 256) for r in (trt, eager)]
    results = [greedy(r, s, np.array([3, 5]), 200) for r, s in zip((trt, eager), states, strict=True)]
    np.testing.assert_array_equal(*results)
    assert state_bytes(states[0]) == state_bytes(states[1])
    assert trt._graphs, "the engine cannot be recorded"


def test_generation_is_that_of_onnx_runtime(trt: TrtRunner, ort: OrtRunner) -> None:
    prompts = [[5, 6, 7], list(range(30))]
    assert generate(trt, prompts, max_new_tokens=40).tokens == generate(ort, prompts, max_new_tokens=40).tokens


@pytest.mark.parametrize("refittable", [False, True])
def test_a_filled_engine_runs_as_one_built_with_its_weights(export: Path, tmp_path: Path, refittable: bool) -> None:
    backend = runnable_tensorrt()
    assert backend is not None
    recipe = EngineRecipe(
        backend=backend,
        compute_capabilities=(gpu_devices()[0].capability,) if backend == "tensorrt-rtx" else (),
        plugin=PLUGIN,
        strip_weights=True,
        refit=refittable,
        prefill=Profile(sequence=(1, 8, 32), capacity=(1, 64, 64), num_logits=(1, 1, 4)),
        decode=Profile(capacity=(1, 64, 64)),
    )
    quiet = lambda *_: nullcontext(lambda n: None)  # noqa: E731
    build_engine(export, tmp_path / "stripped", recipe, overwrite=False, progress=quiet)
    refit_engine(tmp_path / "stripped", export, tmp_path / "full", overwrite=False, progress=quiet)
    runners = (open_trt_runner(tmp_path / "full"), OrtRunner(export, threads=2))
    ids = np.random.default_rng(0).integers(0, runners[0].contract.vocab_size, (1, 20))
    assert compare(*(r.forward(ids, r.new_state(1, 64)) for r in runners)).within(CLOSE)


def test_standard_operators_of_another_exporter_become_plugins(tmp_path: Path) -> None:
    """Also where the parser has no importer for them, as the full TensorRT's has none that we have read."""
    backend = runnable_tensorrt()
    assert backend is not None
    capabilities = (gpu_devices()[0].capability,) if backend == "tensorrt-rtx" else ()
    recipe = EngineRecipe(backend=backend, compute_capabilities=capabilities, plugin=PLUGIN)
    quiet = lambda *_: nullcontext(lambda n: None)  # noqa: E731
    for name, model in (("net", GatedDeltaNet().model("")), ("rules", all_rules())):
        onnx.save(model, tmp_path / f"{name}.onnx")
        manifest = build_engine_from_file(
            tmp_path / f"{name}.onnx",
            tmp_path / name,
            recipe,
            ["batch=1:1:2,sequence=1:8:32"],
            overwrite=False,
            progress=quiet,
        )
        assert manifest.details["plugins"]["LinearAttention"] >= 1


def test_every_layer_of_an_engine_is_timed(export: Path, engine: Path, tmp_path: Path) -> None:
    session, device = open_trt_session(engine)
    report = profile_engine(engine, export, session, device, tmp_path, prompt=8, steps=3)
    for phase in ("prefill", "decode"):
        result = report["phases"][phase]
        assert 0 < result["kernel_seconds"] < result["seconds"]
        assert sum(entry["seconds"] for entry in result["layers"].values()) == pytest.approx(result["kernel_seconds"])
    assert len(report["traces"]) == 2
