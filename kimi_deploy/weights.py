"""Which checkpoint tensors make which parameter of the source model.

One table, `weight_table(config)`, drives loading, completeness checks, export, synthetic checkpoints and
saving. A parameter may be stored in several forms: the one Moonshot released (what transformers'
`save_pretrained` also writes) or the one transformers keeps in memory. The parameter's own layout is the
ops' contract (`kimi_deploy.ops`), the same for every backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.ops.spec import PortDtype

if TYPE_CHECKING:
    import numpy as np

Layout = Literal["concat", "stack", "interleave", "interleave_fused"]
"""How a form's tensors become the parameter:

concat            along axis 0, each first reshaped to its rows of the parameter
stack             on a new axis 0, one tensor per expert
interleave        gate and up of each expert row by row: gate 0, up 0, gate 1, ...; stacked over experts
interleave_fused  one tensor [experts, gate rows | up rows, hidden], rows interleaved
"""


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor: accepted `names` (the released one first), stored `shape`, other accepted shapes."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    other_shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Form:
    """One way a parameter is stored."""

    layout: Layout
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Weight:
    """A parameter of the source model: its `name` there, `shape`, dtype class and stored forms, released first."""

    name: str
    shape: tuple[int, ...]
    dtype: PortDtype
    forms: tuple[Form, ...]


def stored_views(weight: Weight, form: Form, value: np.ndarray) -> list[np.ndarray]:
    """Views of the parameter `value`, one per source of `form`: the elements which that tensor stores, in its order.

    A view has the stored elements in the stored order but may group them in other axes; reshape to compare.
    `value` is contiguous, of any dtype. This is the one place that knows the layouts: reading writes into the
    views, saving reads from them.
    """
    if form.layout == "concat":
        views, row = [], 0
        for source in form.sources:
            rows = math.prod(source.shape) // math.prod(weight.shape[1:])
            views.append(value[row : row + rows])
            row += rows
        return views
    if form.layout == "stack":
        return list(value)
    if form.layout == "interleave":
        return [value[expert, part::2] for expert in range(weight.shape[0]) for part in range(2)]
    experts, rows, hidden = weight.shape
    return [value.reshape(experts, rows // 2, 2, hidden).swapaxes(1, 2)]


@dataclass(frozen=True)
class Extent:
    """Consecutive elements of the tensor that a form's source number `source` stores: from `first`, `count` of them."""

    source: int
    first: int
    count: int


def cut(weight: Weight, form: Form, start: int, stop: int) -> tuple[Weight, Form, tuple[Extent, ...]]:
    """The parameter's rows `start` to `stop` along axis 0 as a parameter of its own, and the stored elements of it.

    `stored_views` of the result gives one view per extent, in order. Every layout can be cut between any two rows.
    """
    part = replace(weight, shape=(stop - start, *weight.shape[1:]))
    if form.layout in ("stack", "interleave"):
        each = len(form.sources) // weight.shape[0]
        chosen = range(start * each, stop * each)
        sources = tuple(form.sources[i] for i in chosen)
        return part, Form(form.layout, sources), tuple(Extent(i, 0, math.prod(form.sources[i].shape)) for i in chosen)
    row = math.prod(weight.shape[1:])
    parts: list[Source] = []
    extents: list[Extent] = []
    first = 0
    for index, source in enumerate(form.sources):
        held = math.prod(source.shape) // row
        low, high = max(start, first), min(stop, first + held)
        if low < high:
            parts.append(Source(source.names, (high - low, *weight.shape[1:])))
            extents.append(Extent(index, (low - first) * row, (high - low) * row))
        first += held
    return part, Form(form.layout, tuple(parts)), tuple(extents)


def assemble(weight: Weight, form: Form, tensors: Sequence[np.ndarray]) -> np.ndarray:
    """The parameter from the tensors of one of its forms, in the order of `form.sources`; dtype kept."""
    import numpy as np

    out = np.empty(weight.shape, tensors[0].dtype)
    for view, tensor in zip(stored_views(weight, form, out), tensors, strict=True):
        view[...] = tensor.reshape(view.shape)
    return out


def disassemble(weight: Weight, form: Form, value: np.ndarray) -> list[np.ndarray]:
    """Inverse of `assemble`: the stored tensors of `form`, in order, with their stored shapes."""
    views = stored_views(weight, form, value)
    return [view.reshape(source.shape) for view, source in zip(views, form.sources, strict=True)]


def weight_table(config: KimiLinearConfig) -> tuple[Weight, ...]:
    """Every parameter of the source model, in model order (names and shapes: facts of the released checkpoint)."""
    table = [_plain("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        table.append(_plain(f"{prefix}input_layernorm.weight", (config.hidden_size,)))
        mixer = _kda_weights if config.is_kda(layer) else _mla_weights
        table += mixer(config, f"{prefix}self_attn.")
        table.append(_plain(f"{prefix}post_attention_layernorm.weight", (config.hidden_size,)))
        table += (_moe_weights if config.is_moe(layer) else _dense_weights)(config, prefix)
    table.append(_plain("model.norm.weight", (config.hidden_size,)))
    if not config.tie_word_embeddings:
        table.append(_plain("lm_head.weight", (config.vocab_size, config.hidden_size)))
    return tuple(table)


def _plain(name: str, shape: tuple[int, ...], dtype: PortDtype = "T", *other_names: str) -> Weight:
    return Weight(name, shape, dtype, (Form("concat", (Source((name, *other_names), shape),)),))


def _concat(name: str, shape: tuple[int, ...], *sources: Source) -> Weight:
    return Weight(name, shape, "T", (Form("concat", sources),))


def _kda_weights(config: KimiLinearConfig, p: str) -> list[Weight]:
    hidden, dim, heads = config.hidden_size, config.linear_dim, config.linear_num_heads
    head_dim, width = config.linear_head_dim, config.linear_conv_kernel
    gate = f"{p}forget_gate."
    a_log_shapes = ((heads,), (1, heads, 1), (heads, 1), (1, 1, heads))
    return [
        _concat(
            f"{p}qkv_proj.weight",
            (3 * dim, hidden),
            *(Source((f"{p}{x}_proj.weight",), (dim, hidden)) for x in "qkv"),
        ),
        Weight(
            f"{p}conv_weight",
            (3 * dim, width),
            "T",
            (
                Form(
                    "concat",
                    tuple(Source((f"{p}{x}_conv1d.weight",), (dim, 1, width), ((dim, width),)) for x in "qkv"),
                ),
                Form("concat", (Source((f"{p}conv1d.weight",), (3 * dim, 1, width)),)),
            ),
        ),
        # the three small projections of the same input: forget gate, output gate, beta
        _concat(
            f"{p}fgb_proj.weight",
            (2 * head_dim + heads, hidden),
            Source((f"{p}f_a_proj.weight", f"{gate}f_a_proj.weight"), (head_dim, hidden)),
            Source((f"{p}g_a_proj.weight",), (head_dim, hidden)),
            Source((f"{p}b_proj.weight",), (heads, hidden)),
        ),
        _plain(f"{p}f_b_proj.weight", (dim, head_dim), "T", f"{gate}f_b_proj.weight"),
        _plain(f"{p}g_b_proj.weight", (dim, head_dim)),
        Weight(
            f"{p}A_log",
            (heads,),
            "float32",
            (Form("concat", (Source((f"{p}A_log", f"{gate}A_log"), (1, 1, heads, 1), a_log_shapes),)),),
        ),
        _plain(f"{p}dt_bias", (dim,), "float32", f"{gate}dt_bias"),
        _plain(f"{p}o_norm.weight", (head_dim,)),
        _plain(f"{p}o_proj.weight", (hidden, dim)),
    ]


def _mla_weights(config: KimiLinearConfig, p: str) -> list[Weight]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        weights = [_plain(f"{p}q_proj.weight", (query, hidden))]
    else:
        weights = [
            _plain(f"{p}q_a_proj.weight", (config.q_lora_rank, hidden)),
            _plain(f"{p}q_a_layernorm.weight", (config.q_lora_rank,)),
            _plain(f"{p}q_b_proj.weight", (query, config.q_lora_rank)),
        ]
    return weights + [
        _plain(f"{p}kv_a_proj_with_mqa.weight", (config.latent_dim, hidden)),
        _plain(f"{p}kv_a_layernorm.weight", (rank,)),
        _plain(f"{p}kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), rank)),
        _plain(f"{p}o_proj.weight", (hidden, heads * config.v_head_dim)),
    ]


def _swiglu(name: str, stored: tuple[str, ...], width: int, hidden: int) -> list[Weight]:
    """gate | up in one projection, and down; `stored` are the accepted prefixes in a checkpoint."""

    def source(part: str, shape: tuple[int, ...]) -> Source:
        return Source(tuple(f"{s}{part}_proj.weight" for s in stored), shape)

    return [
        _concat(
            f"{name}gate_up_proj.weight",
            (2 * width, hidden),
            source("gate", (width, hidden)),
            source("up", (width, hidden)),
        ),
        _concat(f"{name}down_proj.weight", (hidden, width), source("down", (hidden, width))),
    ]


def _dense_weights(config: KimiLinearConfig, p: str) -> list[Weight]:
    # transformers' save_pretrained writes a dense layer under the name of the sparse block
    return _swiglu(f"{p}mlp.", (f"{p}mlp.", f"{p}block_sparse_moe."), config.intermediate_size, config.hidden_size)


def _moe_weights(config: KimiLinearConfig, p: str) -> list[Weight]:
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    released, native = f"{p}block_sparse_moe.", f"{p}mlp."

    def expert(shape: tuple[int, ...], *parts: str) -> tuple[Source, ...]:
        return tuple(
            Source((f"{released}experts.{e}.{part}.weight", f"{native}experts.{e}.{part}.weight"), shape)
            for e in range(experts)
            for part in parts
        )

    weights = [
        Weight(
            f"{native}gate.weight",
            (experts, hidden),
            "T",
            (Form("concat", (Source((f"{released}gate.weight", f"{native}gate.weight"), (experts, hidden)),)),),
        ),
        Weight(
            f"{native}gate.e_score_correction_bias",
            (experts,),
            "float32",
            (
                Form(
                    "concat",
                    (Source(tuple(f"{s}gate.e_score_correction_bias" for s in (released, native)), (experts,)),),
                ),
            ),
        ),
        Weight(
            f"{native}experts.gate_up_proj",
            (experts, 2 * width, hidden),
            "T",
            (
                Form("interleave", expert((width, hidden), "w1", "w3")),
                Form(
                    "interleave_fused",
                    (Source((f"{native}experts.gate_up_proj",), (experts, 2 * width, hidden)),),
                ),
            ),
        ),
        Weight(
            f"{native}experts.down_proj",
            (experts, hidden, width),
            "T",
            (
                Form("stack", expert((hidden, width), "w2")),
                Form("concat", (Source((f"{native}experts.down_proj",), (experts, hidden, width)),)),
            ),
        ),
    ]
    if config.num_shared_experts:
        shared = tuple(f"{s}shared_experts." for s in (released, native))
        weights += _swiglu(f"{native}shared_experts.", shared, width * config.num_shared_experts, hidden)
    return weights
