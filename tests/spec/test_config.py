"""config.json: both spellings mean the same model, and nothing is guessed or let through."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kimi_deploy.checkpoint.presets import preset_config
from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.config_parser import ALIASES
from kimi_deploy.errors import CheckpointError, ConfigError, UsageError, WrongArtefactError
from tests.configs import config, raw_config


def transformers_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    """The same model as transformers spells it: renamed keys, flat KDA sizes, one word per layer."""
    linear = raw["linear_attn_config"]
    layers = raw["num_hidden_layers"]
    dropped = {"linear_attn_config", "first_k_dense_replace"}
    result = {ALIASES.get(k, k): v for k, v in raw.items() if k not in dropped}
    return result | {
        "linear_head_dim": linear["head_dim"],
        "linear_num_heads": linear["num_heads"],
        "linear_conv_kernel_dim": linear["short_conv_kernel_size"],
        "layer_types": [
            "linear_attention" if i + 1 in linear["kda_layers"] else "full_attention" for i in range(layers)
        ],
        "mlp_layer_types": ["dense" if i < raw["first_k_dense_replace"] else "sparse" for i in range(layers)],
    }


@pytest.mark.parametrize("layers", ["KKKM", "MKMK", "KKK", "MM", "K"])
def test_both_spellings_give_the_same_config(layers: str) -> None:
    raw = raw_config(layers, q_lora_rank=24, eos_token_id=[2, 3])
    assert KimiLinearConfig.from_dict(transformers_spelling(raw)) == KimiLinearConfig.from_dict(raw)


def test_both_spellings_in_one_file_are_read_when_they_agree() -> None:
    raw = raw_config("KMK")
    assert KimiLinearConfig.from_dict(raw | transformers_spelling(raw)) == KimiLinearConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_local_experts": 8}, "num_experts / num_local_experts"),
        ({"norm_topk_prob": False}, "moe_renormalize / norm_topk_prob"),
        ({"linear_head_dim": 24}, "linear_head_dim"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"torch_dtype": "bfloat16"}, "dtype / torch_dtype"),
    ],
)
def test_two_spellings_that_disagree_are_refused(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        config(**change)


def test_layer_lists_are_one_based_and_the_pattern_is_read_not_guessed() -> None:
    assert [i for i, t in enumerate(config("KKMKM").layer_types) if t == "full_attention"] == [2, 4]
    released = preset_config("kimi-linear-48b")
    mla = [i for i in range(27) if not released.is_kda(i)]
    assert mla == [3, 7, 11, 15, 19, 23, 26]
    raw = raw_config()
    del raw["linear_attn_config"]["kda_layers"], raw["linear_attn_config"]["full_attn_layers"]
    with pytest.raises(ConfigError, match="layer_types is missing"):
        KimiLinearConfig.from_dict(raw)


@pytest.mark.parametrize(
    "lists",
    [
        {"kda_layers": [0, 1, 2], "full_attn_layers": [3]},
        {"kda_layers": [1, 2, 3], "full_attn_layers": []},
        {"kda_layers": [1, 2, 3], "full_attn_layers": [3, 4]},
        {"kda_layers": [1, 2, 3, 4], "full_attn_layers": [5]},
        {"kda_layers": [1, 2, 3], "full_attn_layers": None},
        {"kda_layers": [1, 2, 3], "full_attn_layers": 4},
        {"kda_layers": [1, 2, True], "full_attn_layers": [4]},
        {"kda_layers": [1, 2, 3.0], "full_attn_layers": [4]},
    ],
)
def test_lists_that_do_not_cover_every_layer_once_are_refused(lists: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"linear_attn_config\.(kda|full_attn)_layers"):
        config(linear_attn_config=lists)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "num_experts",
        "num_experts_per_token",
        "num_shared_experts",
        "moe_intermediate_size",
        "first_k_dense_replace",
        "routed_scaling_factor",
        "rms_norm_eps",
        "model_type",
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    raw = raw_config()
    del raw[key]
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        KimiLinearConfig.from_dict(raw)


def test_a_model_without_experts_needs_no_expert_keys() -> None:
    raw = {k: v for k, v in raw_config("KM", first_k_dense_replace=2).items() if "expert" not in k and "moe" not in k}
    del raw["routed_scaling_factor"]
    assert KimiLinearConfig.from_dict(raw).mlp_types == ("dense", "dense")


NOT_NUMBERS = [float("nan"), float("inf"), -float("inf"), "4", True, [4], {}, -1, 1e300, 10**400]


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, 2**31, 4.0])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_experts", "kv_lora_rank", "vocab_size"])
def test_a_size_must_be_a_positive_integer(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        config(**{key: value})


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("key", ["rms_norm_eps", "routed_scaling_factor"])
def test_a_float_must_be_finite_and_in_range(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        config(**{key: value})


def test_nan_in_the_file_is_refused_by_name(tmp_path: Path) -> None:
    # json writes and reads NaN although the standard has none
    (tmp_path / "config.json").write_text(json.dumps(raw_config(rms_norm_eps=float("nan"))))
    with pytest.raises(ConfigError, match=r"rms_norm_eps is not usable\n  seen: nan"):
        KimiLinearConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"moe_router_activation_func": "softmax"}, "moe_router_activation_func"),
        ({"mla_use_nope": False}, "mla_use_nope"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"linear_attn_config": {"safe_gate": True}}, "safe_gate"),
        ({"linear_attn_config": 3}, "linear_attn_config"),
        ({"num_expert_group": 2, "use_grouped_topk": False}, "use_grouped_topk"),
    ],
)
def test_another_architecture_is_refused(change: dict[str, Any], key: str) -> None:
    raw = raw_config()
    linear = change.get("linear_attn_config")
    merged = {"linear_attn_config": raw["linear_attn_config"] | linear} if isinstance(linear, dict) else {}
    with pytest.raises(ConfigError, match=key):
        KimiLinearConfig.from_dict(raw | change | merged)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_expert_group": 3}, "num_expert_group"),
        ({"num_expert_group": 4, "num_experts_per_token": 1}, "num_expert_group"),
        ({"topk_group": 2}, "topk_group"),
        ({"num_experts_per_token": 5}, "num_experts_per_token"),
        ({"num_expert_group": 2, "num_experts_per_token": 3}, "num_experts_per_token"),
        ({"num_experts": 2**30}, "num_experts"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "wide"]}, "mlp_layer_types"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": 96}, "eos_token_id"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"pad_token_id": -1}, "pad_token_id"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": float("nan")}, "dtype"),
        ({"linear_attn_config": {"head_dim": 12}}, "head_dim"),
        ({"linear_attn_config": {"short_conv_kernel_size": 1}}, "short_conv_kernel_size"),
        ({"linear_attn_config": {"gate_lower_bound": 0.0}}, "gate_lower_bound"),
        ({"linear_attn_config": {"gate_lower_bound": -6}}, "gate_lower_bound"),
        ({"linear_attn_config": {"gate_lower_bound": float("nan")}}, "gate_lower_bound"),
    ],
)
def test_values_that_cannot_be_together_or_are_out_of_range_are_refused(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        config(**change)


def test_the_gate_is_bounded_when_a_bound_is_given() -> None:
    assert (config().gate, config().gate_lower_bound) == ("softplus", 0.0)
    bounded = config(linear_attn_config={"gate_lower_bound": -5.0, "safe_gate": True})
    assert (bounded.gate, bounded.gate_lower_bound) == ("bounded", -5.0)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"q_lora_rank": 8, "tie_word_embeddings": True, "num_shared_experts": 0},
        {"eos_token_id": [2, 3, 2], "bos_token_id": None, "pad_token_id": None, "dtype": "torch.float16"},
        {"eos_token_id": None, "first_k_dense_replace": 0, "num_expert_group": 2, "topk_group": 2},
        {"mlp_layer_types": ["sparse", "dense", "sparse", "dense"], "moe_renormalize": False},
        {"first_k_dense_replace": 9},
        {"linear_attn_config": {"gate_lower_bound": -2.5}},
    ],
)
def test_the_released_spelling_round_trips(change: dict[str, Any]) -> None:
    parsed = config("KMKM", **change)
    written = json.loads(json.dumps(parsed.to_released_dict()))
    assert KimiLinearConfig.from_dict(written) == parsed


def test_transformers_reads_what_is_written_as_the_same_model() -> None:
    import transformers

    ours = replace(preset_config("tiny"), q_lora_rank=24, num_shared_experts=2)
    theirs = transformers.KimiLinearConfig(**ours.to_released_dict())
    assert KimiLinearConfig.from_dict(theirs.to_dict()) == ours


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"3", b"\xff\xfe{}", b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "list", "number", "not utf-8", "key twice", "deep", "long number"],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ConfigError, match=r"config\.json is not valid"):
        KimiLinearConfig.from_folder(tmp_path)


def test_a_missing_too_long_or_foreign_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        KimiLinearConfig.from_folder(tmp_path / "nowhere")
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(WrongArtefactError, match="holds no model"):
        KimiLinearConfig.from_folder(folder)
    (tmp_path / "config.json").write_text("{}")
    (folder / "config.json").symlink_to("../config.json")
    with pytest.raises(CheckpointError, match="leaves the model folder"):
        KimiLinearConfig.from_folder(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(b" " * (17 << 20))
    with pytest.raises(ConfigError, match="too long"):
        KimiLinearConfig.from_folder(folder)
