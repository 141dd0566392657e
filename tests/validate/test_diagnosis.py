"""A wrong state is described by what it looks like, and only then."""

import ml_dtypes
import numpy as np
import pytest

from kimi_deploy.contract import state_table
from kimi_deploy.validate.diagnosis import describe, first_wrong_position, where_to_look
from tests.configs import config

RANDOM = np.random.default_rng(0)
RECURRENT = RANDOM.normal(size=(2, 8, 8)).astype(np.float32)
CONV = RANDOM.normal(size=(48, 3)).astype(np.float32)
LATENT = RANDOM.normal(size=(10, 24)).astype(np.float32)
BOUND = 1e-4


def late(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((48, 1), np.float32), x[:, :-1]], axis=1)


def early(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[:, 1:], np.ones((48, 1), np.float32)], axis=1)


def changed(x: np.ndarray, index: object, value: float) -> np.ndarray:
    x = x.copy()
    x[index] = value
    return x


@pytest.mark.parametrize(
    ("kind", "actual", "expected", "words"),
    [
        ("recurrent_state", RECURRENT.swapaxes(1, 2), RECURRENT, "key and value axes are swapped"),
        (
            "recurrent_state",
            RECURRENT.astype(ml_dtypes.bfloat16).astype(np.float32),
            RECURRENT,
            "every value has only a bfloat16's bits",
        ),
        ("recurrent_state", changed(RECURRENT, 1, 0.0), RECURRENT, "heads 1 are zero"),
        ("recurrent_state", 0 * RECURRENT, RECURRENT, "all zero"),
        ("recurrent_state", changed(RECURRENT, (0, 0, 0), np.nan), RECURRENT, "1 of 128 values are not finite"),
        ("recurrent_state", 2 * RECURRENT, RECURRENT, ""),
        ("conv_state", late(CONV), CONV, "the window is one token late"),
        ("conv_state", early(CONV), CONV, "the window is one token early"),
        ("conv_state", changed(CONV, slice(4, 9), 0.0), CONV, "channels 4 to 8 are zero"),
        ("conv_state", -CONV, CONV, ""),
        ("latent", changed(LATENT, 7, 0.0), LATENT, "only token 7 of 10 is wrong, which was never written"),
        ("latent", changed(LATENT, 7, 1.0), LATENT, "only token 7 of 10 is wrong"),
        ("latent", -LATENT, LATENT, ""),
    ],
)
def test_a_known_fault_is_recognised(kind: str, actual: np.ndarray, expected: np.ndarray, words: str) -> None:
    assert describe(kind, actual, expected, BOUND) == words


def test_the_first_wrong_position_counts_what_is_not_finite() -> None:
    assert first_wrong_position(LATENT, LATENT, BOUND) is None
    assert first_wrong_position(changed(LATENT, 4, np.nan), LATENT, BOUND) == 4
    assert first_wrong_position(changed(LATENT, slice(6, 9), 9.0), LATENT, BOUND) == 6


@pytest.mark.parametrize(
    ("layers", "tensor", "words"),
    [
        ("KKM", "0.conv_state", "the embedding, or layer 0's input norm, qkv projection"),
        ("KKM", "1.conv_state", "the MLP of layer 0, or layer 1's input norm"),
        ("KKM", "1.recurrent_state", "the inputs of layer 1's KDA are right"),
        ("KKM", "2.latent", "the MLP of layer 1, or layer 2's input norm, key-value projection"),
        ("KKM", "logits", "attention and its projection or the MLP of layer 2"),
        ("MK", "logits", "norm and projection of KDA or the MLP of layer 1"),
        ("KKM", "tokens", ""),
    ],
)
def test_the_place_to_look_is_between_the_last_right_and_the_first_wrong_tensor(
    layers: str, tensor: str, words: str
) -> None:
    assert words in where_to_look(tensor, state_table(config(layers=layers), "float32"))
