"""Finding NaN and Inf in a state and saying where: layer, kind, batch row and head."""

from __future__ import annotations

import numpy as np

from kimi_deploy.contract import GraphContract, StateTensor
from kimi_deploy.errors import NotFiniteError


def check_finite(contract: GraphContract, state: StateTensor, value: np.ndarray, lengths: np.ndarray) -> None:
    """Raise NotFiniteError when `value`, the tensor of `state`, holds NaN or Inf among its valid elements.

    The message names the layer, the kind, the first bad element with its batch row and head (q, k or v part and
    head of a conv_state, token of a latent) and how many there are. Cached tokens past a row's length are not
    part of the state and are not looked at.
    """
    bad = ~np.isfinite(value)
    if state.kind == "latent":
        bad &= (np.arange(value.shape[1]) < lengths[:, None])[:, :, None]
    if not bad.any():
        return
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    raise NotFiniteError(
        f"layer {state.layer}: {state.kind} is not finite",
        seen=f"{int(bad.sum())} of {value.size} values, first {value[index]} at {list(index)}: "
        f"{_describe(contract, state, index)}",
        expected="finite values",
        fix="restore a snapshot; if it comes back, run the model in float32 or check the checkpoint's weights",
    )


def _describe(contract: GraphContract, state: StateTensor, index: tuple[int, ...]) -> str:
    row = f"batch row {index[0]}"
    if state.kind == "latent":
        return f"{row}, token {index[1]}, channel {index[2]}"
    if state.kind == "recurrent_state":
        return f"{row}, head {index[1]}"
    heads, head_dim = _heads(contract, state.layer)
    part, channel = divmod(index[1], heads * head_dim)
    return f"{row}, {'qkv'[part]} of head {channel // head_dim}"


def _heads(contract: GraphContract, layer: int) -> tuple[int, int]:
    """Heads and head size of a KDA layer, from the shape of its recurrent state."""
    recurrent = next(s for s in contract.states if s.layer == layer and s.kind == "recurrent_state")
    return int(recurrent.dims[1]), int(recurrent.dims[2])
