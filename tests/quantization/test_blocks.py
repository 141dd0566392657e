"""Quantising by groups: every value within half a step, zeros exact, HQQ never worse in its norm, packing exact."""

from __future__ import annotations

import numpy as np
import pytest

from kimi_deploy.quantization.blocks import TILE, Quantized, dequantize, middle, pack, quantize, unpack
from kimi_deploy.quantization.half_quadratic import P
from kimi_deploy.quantization.scheme import BITS, GROUPS

FORMS = [(bits, group, symmetric) for bits in BITS for group in GROUPS for symmetric in (True, False)]


def weights(rows: int = 48, width: int = 256, seed: int = 0) -> np.ndarray:
    """Heavy-tailed rows of very different sizes, some off zero, one of them all zeros."""
    random = np.random.default_rng(seed)
    value = random.standard_t(4, (rows, width)) * 10.0 ** random.uniform(-4, 1, (rows, 1))
    value += np.abs(value).mean(1, keepdims=True) * random.integers(-1, 2, (rows, 1))
    value[0] = 0.0
    return value.astype(np.float32)


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMS)
def test_rounding_to_nearest_is_within_half_a_step(bits: int, group: int, symmetric: bool) -> None:
    weight = weights()
    made = quantize(weight, bits, group, symmetric=symmetric, method="rtn")
    step = np.repeat(made.scales, group, axis=1)
    # the zero point is rounded too, which can move the last level of a group by half a step more
    assert (np.abs(dequantize(made, group) - weight) <= step * (0.5001 if symmetric else 1.0001)).all()
    assert made.levels.max() < 1 << bits
    assert not dequantize(made, group)[0].any()
    if symmetric:
        assert (made.zero_points == middle(bits)).all()


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMS)
def test_half_quadratic_is_never_worse_in_its_norm_and_better_over_all(bits: int, group: int, symmetric: bool) -> None:
    weight = weights()

    def loss(method: str) -> np.ndarray:
        made = quantize(weight, bits, group, symmetric=symmetric, method=method)  # type: ignore[arg-type]
        error = np.abs(dequantize(made, group).astype(np.float64) - weight) ** P
        return error.reshape(len(weight), -1, group).sum(-1)

    nearest, fitted = loss("rtn"), loss("hqq")
    assert (fitted <= nearest * (1 + 1e-5) + 1e-12).all()
    assert (fitted < 0.99 * nearest).mean() > (0.4 if bits == 4 else 0.2)


def test_rows_do_not_depend_on_what_is_quantised_with_them() -> None:
    weight = weights(3 * TILE // 256)
    whole = quantize(weight, 4, 32, symmetric=False, method="hqq")
    alone = quantize(weight[700:705], 4, 32, symmetric=False, method="hqq")
    assert all(np.array_equal(w[700:705], a) for w, a in zip(whole, alone, strict=True))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_packing_is_undone(bits: int, count: int) -> None:
    values = np.random.default_rng(1).integers(0, 1 << bits, (3, 5, count)).astype(np.uint8)
    packed = pack(values, bits)
    assert packed.shape[-1] == -(-count * bits // 8)
    assert np.array_equal(unpack(packed, bits, count), values)


def test_the_first_of_two_levels_is_in_the_low_half() -> None:
    assert pack(np.array([[3, 12, 9]], np.uint8), 4).tolist() == [[0xC3, 0x09]]


def test_a_level_stands_for_its_distance_from_the_zero_point_times_the_scale() -> None:
    made = Quantized(
        np.array([[0, 7, 15, 8]], np.uint8), np.array([[0.5, 2.0]], np.float32), np.array([[7, 8]], np.uint8)
    )
    assert dequantize(made, 2).tolist() == [[-3.5, 0.0, 14.0, 0.0]]
