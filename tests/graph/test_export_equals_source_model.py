"""An exported graph computes what the source model computes, in every flavour, however the work is split."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kimi_deploy.errors import BackendError
from kimi_deploy.ops.flavours import FLAVOURS, Flavour
from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.runtime.torch_runner import TorchRunner
from kimi_deploy.validate.parity import Parity
from kimi_deploy.validate.prompts import Prompt
from kimi_deploy.validate.tolerances import tolerance
from tests.graph.conftest import CONFIGS


def prompts(vocab: int) -> list[Prompt]:
    random = np.random.default_rng(1)
    return [Prompt(f"{n} tokens", random.integers(0, vocab, n)) for n in (20, 1, 67)]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_graph_equals_the_model(
    name: str, flavour: Flavour, models: dict[str, Path], exported: Callable[..., Path]
) -> None:
    candidate = OrtRunner(exported(name, flavour), threads=1)
    parity = Parity(
        TorchRunner(models[name]), candidate, tolerance("graph_float32"), greedy_tokens=48, exact_greedy=True
    )
    report = parity.run(prompts(candidate.contract.vocab_size), flavour)
    assert report.passed, report.first_failure


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_float16_graph_is_near_the_model(
    flavour: Flavour, models: dict[str, Path], exported: Callable[..., Path]
) -> None:
    candidate = OrtRunner(exported("softplus", flavour, "float16"), threads=1)
    parity = Parity(
        TorchRunner(models["softplus"]),
        candidate,
        tolerance("graph_float16"),
        greedy_tokens=8,
        exact_greedy=False,
        same_dtype=TorchRunner(models["softplus"], "float16"),
    )
    report = parity.run(prompts(candidate.contract.vocab_size), "float16")
    assert report.passed, report.first_failure


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_bfloat16_graph_is_whole_and_refused_where_no_kernel_exists(
    flavour: Flavour, exported: Callable[..., Path]
) -> None:
    """Export checked every value; ONNX Runtime's CPU provider has no bfloat16 MatMul, and says what does run there."""
    with pytest.raises(BackendError, match="bfloat16") as error:
        OrtRunner(exported("softplus", flavour, "bfloat16"), threads=1)
    assert "--dtype float32 or float16" in str(error.value.fix)
