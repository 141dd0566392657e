"""What --quantize accepts and refuses, and which parameters it reaches."""

from __future__ import annotations

import pytest

from kimi_deploy.checkpoint.presets import preset_config
from kimi_deploy.errors import ManifestError, UsageError
from kimi_deploy.quantization.scheme import Scheme, describe_precision, parse_scheme
from kimi_deploy.quantization.selection import quantized_parameters, settled
from kimi_deploy.weights import weight_table
from tests.configs import config


def test_defaults_differ_by_precision() -> None:
    assert parse_scheme("int4") == Scheme(4, None, False, "hqq", "int8")
    assert parse_scheme("int8") == Scheme(8, None, True, "rtn", "int8")


def test_the_text_of_a_scheme_gives_the_scheme() -> None:
    for text in (
        "int4",
        "int8,asymmetric,hqq",
        "int4, group=128, symmetric, rtn, activations=float32, head,embeddings",
    ):
        scheme = parse_scheme(text)
        assert parse_scheme(scheme.text) == scheme == Scheme.from_dict(scheme.to_dict())


@pytest.mark.parametrize(
    "text", ["", "int3", "4", "int4,group=48", "int4,gptq", "int4,,head", "int4,rtn,hqq", "int4,group=32,group=64"]
)
def test_what_is_not_known_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(UsageError, match=r"group=32\|64\|128"):
        parse_scheme(text)


def test_a_manifest_that_holds_no_scheme_is_refused() -> None:
    with pytest.raises(ManifestError):
        Scheme.from_dict({"bits": 5})
    with pytest.raises(ManifestError):
        Scheme.from_dict({})


NEVER = ("gate.", "fgb_proj", "f_b_proj", "g_b_proj", "norm", "A_log", "dt_bias", "conv_weight", "kv_b_proj")


def test_every_large_product_is_reached_and_nothing_that_must_stay() -> None:
    model = preset_config("kimi-linear-48b")
    chosen = quantized_parameters(model, parse_scheme("int4,head,embeddings"))
    assert not [n for n in chosen for part in NEVER if part in n]
    sizes = {w.name: w.shape for w in weight_table(model)}
    for name, shape in sizes.items():
        if name not in chosen:
            assert any(part in name for part in NEVER), (name, shape)
    plain = quantized_parameters(model, parse_scheme("int4"))
    assert set(chosen) - set(plain) == {"lm_head.weight", "model.embed_tokens.weight"}


def test_the_group_is_64_where_it_fits_and_32_where_only_that_does() -> None:
    assert settled(parse_scheme("int4"), preset_config("kimi-linear-48b"), "float32").group == 64
    narrow = config(intermediate_size=64, moe_intermediate_size=96)
    assert settled(parse_scheme("int4"), narrow, "float32").group == 32


def test_a_group_that_does_not_fit_is_refused_with_those_that_do() -> None:
    model = config(intermediate_size=64, moe_intermediate_size=96)
    with pytest.raises(UsageError, match=r"qkv_proj.weight with 32 inputs\n  expected: group=32"):
        settled(parse_scheme("int4,group=64"), model, "float32")
    with pytest.raises(UsageError, match="multiples of 32"):
        settled(parse_scheme("int4"), config(intermediate_size=64), "float32")


def test_tied_embeddings_and_other_dtypes_are_refused() -> None:
    with pytest.raises(UsageError, match="ties"):
        quantized_parameters(config(tie_word_embeddings=True), parse_scheme("int4,head"))
    with pytest.raises(UsageError, match="float32"):
        settled(parse_scheme("int4"), config(), "float16")


def test_an_export_is_described_with_its_quantisation() -> None:
    assert describe_precision({"dtype": "float16"}) == "float16"
    details = {"dtype": "float32", "quantization": parse_scheme("int8,head").to_dict()}
    assert describe_precision(details) == f"float32, {parse_scheme('int8,head').text}"
