"""What the flavours of KimiDeltaAttention's body agree on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir

from kimi_deploy.ops.function_builder import FunctionBuilder


class DeltaInputs(NamedTuple):
    """Inputs of the gated delta rule, float32.

    q, k, v, g [batch, sequence, heads*size], beta [batch, sequence, heads], state [batch, heads, size, size].
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    g: ir.Value
    beta: ir.Value
    state: ir.Value


class DeltaSizes(NamedTuple):
    """Heads, their size, and the factor of q."""

    heads: int
    size: int
    scale: float


@dataclass(frozen=True)
class Parts:
    """What a flavour brings to the body.

    `convolution(b, x, weight, past)`: causal depthwise convolution of x [batch, sequence, channels] with weight
    [channels, width] after past [batch, channels, width-1], all float32; with it the next past of rows without padding
    where the flavour's operator gives that, else None.
    `delta_rule(b, inputs, sizes)`: outputs [batch, sequence, heads*size] and the new state.
    `helpers()`: functions of other domains that these two call.
    `unpadded_apart`: whether a call without padding takes a branch of its own, which needs that next past.
    """

    convolution: Callable[[FunctionBuilder, ir.Value, ir.Value, ir.Value], tuple[ir.Value, ir.Value | None]]
    delta_rule: Callable[[FunctionBuilder, DeltaInputs, DeltaSizes], tuple[ir.Value, ir.Value]]
    helpers: Callable[[], list[ir.Function]]
    unpadded_apart: bool = False
