"""The weight table is the released checkpoint's, and every form is the same parameter in another order."""

import math

import numpy as np
import pytest

from kimi_deploy.checkpoint import released_tensors
from kimi_deploy.checkpoint.presets import preset_config
from kimi_deploy.weights import assemble, disassemble, weight_table
from tests.configs import config


def test_the_released_model_has_its_tensors_and_parameters() -> None:
    tensors = list(released_tensors(preset_config("kimi-linear-48b"), "bfloat16"))
    assert len({t.name for t in tensors}) == len(tensors) == 20_493
    assert sum(math.prod(t.shape) for t in tensors) == 49_122_681_728
    assert round(sum(t.nbytes for t in tensors) / 1e9, 2) == 98.25


def test_the_released_table_is_the_published_one_to_the_last_tensor() -> None:
    """Written down here from the published description, not from the code's table: no name and no shape is left out."""
    tensors = list(released_tensors(preset_config("kimi-linear-48b"), "bfloat16"))
    assert {t.name: t.shape for t in tensors} == published()
    kept = {t.name.rsplit(".", 1)[-1] for t in tensors if t.dtype == "F32"}
    assert {"A_log", "dt_bias"} <= kept
    assert not any(name.endswith("weight") for name in kept)


def published() -> dict[str, tuple[int, ...]]:
    """Names and shapes of moonshotai/Kimi-Linear-48B-A3B-Instruct."""
    hidden, vocabulary = 2304, 163_840
    kda = {f"{p}_proj.weight": (4096, hidden) for p in "qkv"} | {f"{p}_conv1d.weight": (4096, 1, 4) for p in "qkv"}
    kda |= {f"{p}_a_proj.weight": (128, hidden) for p in "fg"} | {f"{p}_b_proj.weight": (4096, 128) for p in "fg"}
    kda |= {"A_log": (1, 1, 32, 1), "dt_bias": (4096,), "b_proj.weight": (32, hidden)}
    kda |= {"o_norm.weight": (128,), "o_proj.weight": (hidden, 4096)}
    mla = {"q_proj.weight": (6144, hidden), "kv_a_proj_with_mqa.weight": (576, hidden)}
    mla |= {"kv_a_layernorm.weight": (512,), "kv_b_proj.weight": (8192, 512), "o_proj.weight": (hidden, 4096)}

    def swiglu(width: int, gate: str, up: str, down: str) -> dict[str, tuple[int, ...]]:
        return {f"{gate}.weight": (width, hidden), f"{up}.weight": (width, hidden), f"{down}.weight": (hidden, width)}

    names = ("gate_proj", "up_proj", "down_proj")
    dense = {f"mlp.{name}": shape for name, shape in swiglu(9216, *names).items()}
    experts = {"gate.weight": (256, hidden), "gate.e_score_correction_bias": (256,)}
    experts |= {f"shared_experts.{name}": shape for name, shape in swiglu(1024, *names).items()}
    for expert in range(256):
        experts |= {f"experts.{expert}.{name}": shape for name, shape in swiglu(1024, "w1", "w3", "w2").items()}
    table = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    table["model.norm.weight"] = (hidden,)
    for layer in range(27):
        # the published list counts from 1
        mixer = mla if layer + 1 in (4, 8, 12, 16, 20, 24, 27) else kda
        parts = {f"self_attn.{name}": shape for name, shape in mixer.items()}
        parts |= {f"block_sparse_moe.{name}": shape for name, shape in experts.items()} if layer else dense
        parts |= {f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        table |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return table


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 24, "tie_word_embeddings": True}, {"num_shared_experts": 0}])
def test_every_form_is_taken_apart_and_put_together_without_loss(changes: dict) -> None:
    rng = np.random.default_rng(0)
    for weight in weight_table(config("KMKM", **changes)):
        value = rng.standard_normal(weight.shape).astype(np.float32)
        for form in weight.forms:
            tensors = disassemble(weight, form, value)
            assert [t.shape for t in tensors] == [s.shape for s in form.sources], weight.name
            np.testing.assert_array_equal(assemble(weight, form, tensors), value, err_msg=weight.name)


def test_the_two_forms_of_experts_hold_the_same_rows() -> None:
    weight = next(w for w in weight_table(config("K", first_k_dense_replace=0)) if w.name.endswith("gate_up_proj"))
    value = np.arange(math.prod(weight.shape), dtype=np.float64).reshape(weight.shape)
    single, fused = (disassemble(weight, form, value) for form in weight.forms)
    gate_up = [np.concatenate([single[2 * e], single[2 * e + 1]]) for e in range(weight.shape[0])]
    np.testing.assert_array_equal(fused[0], np.stack(gate_up))
    # ONNX Runtime's fused MoE wants gate 0, up 0, gate 1, up 1, ...
    np.testing.assert_array_equal(value[1, 4], single[2][2])
    np.testing.assert_array_equal(value[1, 5], single[3][2])


def test_tied_embeddings_and_q_lora_change_the_table() -> None:
    names = {w.name for w in weight_table(config("M", tie_word_embeddings=True, q_lora_rank=8))}
    assert "lm_head.weight" not in names
    assert {f"model.layers.0.self_attn.{n}.weight" for n in ("q_a_proj", "q_a_layernorm", "q_b_proj")} <= names
    assert "model.layers.0.self_attn.q_proj.weight" not in names
