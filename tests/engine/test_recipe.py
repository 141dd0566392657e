"""Engine recipes: what they may say, and which combinations are refused before a build."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_deploy.contract import GraphContract
from kimi_deploy.engine.recipe import (
    DEFAULT_RTX_CAPABILITIES,
    EngineRecipe,
    Profile,
    capabilities_for,
    parse_capability,
    parse_profile,
)
from kimi_deploy.errors import UsageError
from tests.configs import config

OFFERED = ("7.5", "8.0", "8.9", "12.0")


def read(tmp_path: Path, text: str) -> EngineRecipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return EngineRecipe.from_toml(path)


def test_what_a_recipe_leaves_out_keeps_its_default(tmp_path: Path) -> None:
    recipe = read(tmp_path, 'plugin = "none"\n[decode]\ncapacity = [1, 8, 16]\nbatch = 2\n')
    assert recipe.plugin == "none"
    assert recipe.decode == Profile(batch=(2, 2, 2), capacity=(1, 8, 16))
    assert recipe.prefill == EngineRecipe().prefill


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("threads = 4", "unknown key 'threads'"),
        ("tf32 = 1", "tf32 has the wrong type"),
        ("workspace_mib = true", "workspace_mib has the wrong type"),
        ("workspace_mib = -1", "workspace_mib is negative"),
        ("optimization_level = 6", "optimization_level is not known"),
        ('backend = "onnx"', "backend is not known"),
        ('plugin = "yes"', "plugin is not known"),
        ("compute_capabilities = [8.9]", "not a compute capability"),
        ('compute_capabilities = ["89"]', "not a compute capability"),
        ("prefill = 3", "prefill has the wrong type"),
        ("[prefill]\nlength = 3", "unknown axis 'length'"),
        ("[prefill]\nsequence = [1, 2]", "sequence is not a range"),
        ("[prefill]\nsequence = [4, 2, 8]", "sequence is not a range"),
        ("[prefill]\nsequence = [0, 2, 8]", "sequence is not a range"),
        ("[prefill]\nsequence = [1, 2, true]", "sequence is not a range"),
        ('[prefill]\nsequence = "8"', "sequence is not a range"),
        ("[prefill]\nsequence = 8192", "more sequence than capacity"),
        ("[decode]\nnum_logits = 2", "more num_logits than sequence"),
        ("[prefill", "not TOML"),
        ('plugin_ops = "KimiDeltaAttention"', "plugin_ops has the wrong type"),
        ('plugin_ops = ["Softmax"]', "an op without a plugin"),
        ('plugin_ops = ["LinearAttention"]', "an op without a plugin"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read(tmp_path, text)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        EngineRecipe.from_toml(tmp_path / "none.toml")


def test_profiles_on_the_command_line() -> None:
    profile = parse_profile(Profile(), "sequence=1:16:32,batch=2", "--prefill")
    assert profile == Profile(sequence=(1, 16, 32), batch=(2, 2, 2))
    for text in (
        "sequence",
        "sequence=",
        "sequence=1:2",
        "sequence=a:b:c",
        "sequence=3:2:1",
        "width=1",
        "",
        "batch=-1",
    ):
        with pytest.raises(UsageError, match="--prefill"):
            parse_profile(Profile(), text, "--prefill")


def test_a_profile_gives_every_input_its_shapes() -> None:
    contract = GraphContract.of(config("KM"), "float32")
    profile = Profile(batch=(1, 2, 3), sequence=(4, 5, 6), capacity=(7, 8, 9), num_logits=(1, 1, 2))
    shapes = profile.shapes(contract)
    assert list(shapes) == [spec.name for spec in contract.inputs]
    assert shapes["input_ids"] == ((1, 4), (2, 5), (3, 6))
    assert shapes["sequence_lengths"] == ((1,), (2,), (3,))
    assert shapes["past_key_values.1.latent"] == ((1, 7, 24), (2, 8, 24), (3, 9, 24))
    assert shapes["past_key_values.0.recurrent_state"][2] == (3, 2, 16, 16)


def test_architectures() -> None:
    assert parse_capability("12.0") == (12, 0)
    assert capabilities_for("tensorrt-rtx", (), OFFERED) == DEFAULT_RTX_CAPABILITIES
    assert capabilities_for("tensorrt", (), ()) == ()
    assert capabilities_for("tensorrt-rtx", ("7.5",), OFFERED) == ("7.5",)
    with pytest.raises(UsageError, match=r"9\.0"):
        capabilities_for("tensorrt-rtx", ("9.0",), OFFERED)
    with pytest.raises(UsageError, match="GPU of this machine"):
        capabilities_for("tensorrt", ("8.9",), ())
