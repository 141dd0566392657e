"""Engines of the model that ships, with our plugin, in every dtype; scripts/engine_sizes.py builds "mini-62m"."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kimi_deploy.checkpoint.synth import synthesize
from kimi_deploy.contract import DTYPES
from kimi_deploy.engine import plugin_executors
from kimi_deploy.engine.engine_from_onnx import build_engine
from kimi_deploy.engine.recipe import EngineRecipe
from kimi_deploy.engine.requirements import CODE_BYTES
from kimi_deploy.onnx.export import export_model
from tests.capabilities import needs_tensorrt_rtx
from tests.engine.conftest import no_progress

pytestmark = needs_tensorrt_rtx

DEMO = Path(__file__).parents[2] / "models" / "demo"
BODIES = 4
"""Custom ops of the demo model that have no plugin."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_recipe_builds_with_a_plugin_per_kda_layer(dtype: Any, tmp_path: Path) -> None:
    export_model(DEMO, tmp_path / "export", dtype=dtype, flavour="ort", overwrite=False, progress=no_progress)
    recipe = replace(EngineRecipe(), backend="tensorrt-rtx", plugin_ops=("KimiDeltaAttention",))
    manifest = build_engine(tmp_path / "export", tmp_path / "engine", recipe, overwrite=False, progress=no_progress)
    assert manifest.details["plugins"] == {"KimiDeltaAttention": 3}
    assert manifest.details["dtype"] == dtype
    weights = (tmp_path / "export" / "weights.bin").stat().st_size
    # the weights once, and no more kernels than the room that is asked for
    assert weights < manifest.files["engine.plan"]["bytes"] < weights + (BODIES + 1) * CODE_BYTES


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini") / "model"
    synthesize("mini-62m", folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_profiles_take_a_tenth_more_than_the_weights_with_every_plugin(
    executor: plugin_executors.KernelExecutor, mini: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kernels weigh most against weights in 16 bits; the library says only how much workspace there must be."""
    monkeypatch.setattr(plugin_executors, "default_executor", lambda: executor)
    export_model(mini, tmp_path / "export", dtype=dtype, flavour="ort", overwrite=False, progress=no_progress)
    recipe = replace(EngineRecipe(), backend="tensorrt-rtx", plugin_ops=("KimiDeltaAttention", "MixtureOfExperts"))
    manifest = build_engine(tmp_path / "export", tmp_path / "engine", recipe, overwrite=False, progress=no_progress)
    assert manifest.details["plugins"] == {"KimiDeltaAttention": 6, "MixtureOfExperts": 7}
    weights = (tmp_path / "export" / "weights.bin").stat().st_size
    assert weights < manifest.files["engine.plan"]["bytes"] < 1.1 * weights
