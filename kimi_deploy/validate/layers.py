"""An export against PyTorch one layer at a time: what no machine could hold twice is compared all the same.

ONNX Runtime runs the graph once with every layer's input as an extra output; then each layer of the source model is
loaded alone, given what ONNX Runtime gave its own, and compared in output and states. What the first layer is given is
compared with the embeddings of the ids, as no layer answers for it. Layers of a quantised export are given its own
levels, which prove its kernels right; the levels are compared with the checkpoint's weights. Memory is that of the
export or of one layer, whichever is larger, and a difference belongs to the layer it is reported for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import nn

from kimi_deploy.checkpoint import Checkpoint
from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.contract import INPUT_IDS, LOGITS, LOGITS_INDICES, PAST_LENGTHS, SEQUENCE_LENGTHS, GraphContract
from kimi_deploy.errors import UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.model.layers import DecoderLayer, MixtureOfExperts, RMSNorm
from kimi_deploy.model.quantized import QuantizedMixtureOfExperts, rounding
from kimi_deploy.onnx.weights import row_parts
from kimi_deploy.ops.quantized_mixture_of_experts.reference import dequantize, rounded
from kimi_deploy.quantization.scheme import Scheme, recorded_scheme
from kimi_deploy.quantization.selection import EMBEDDINGS, HEAD, quantized_parameters
from kimi_deploy.runtime.storage import NUMPY_DTYPES
from kimi_deploy.validate.compare import Difference, compare
from kimi_deploy.validate.folders import check_source
from kimi_deploy.validate.tolerances import Tolerance, tolerance

Progress = Callable[..., AbstractContextManager[Callable[[int], None]]]
Arrays = dict[str, np.ndarray]
_MODEL_NAME = "model.onnx"
_ROWS_APART = 7
"""Of a quantised parameter every so many rows are compared: odd, as rows of gates and ups alternate."""


@dataclass(frozen=True)
class LayerRow:
    """A comparison: `step` is prefill or decode, `tensor` the embeddings, a layer's output or state, or the logits;
    or `step` is weights and `tensor` a quantised parameter."""

    step: str
    tensor: str
    difference: Difference
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def validate_layers(
    model: Path, export: Path, *, tokens: int = 32, threads: int | None = None, progress: Progress
) -> list[LayerRow]:
    """Compare every layer of `export` with the checkpoint `model`: a prefill of `tokens` random ids, then one step.

    A quantised export is compared with its own levels made float, inputs rounded as its kernels round them, and the
    levels with the checkpoint's weights, part by part. Every file is read and must have its manifest's hash. Raises
    UsageError for an export that ONNX Runtime's CPU provider cannot run or that was made from another checkpoint, and
    ManifestError for a damaged one.
    """
    checkpoint, manifest = Checkpoint.open(model), Manifest.read(export)
    manifest.check_kind("onnx")
    manifest.check_op_abi()
    manifest.verify(export, hashes=False)
    check_source(manifest, export, model, checkpoint.fingerprint())
    dtype = manifest.details["dtype"]
    if dtype != "float32":
        raise UsageError(
            "layers are compared in float32", seen=f"an export of {dtype}", fix="export with --dtype float32"
        )
    scheme = recorded_scheme(manifest.details)
    bound = tolerance("layer_quantized" if scheme else "graph_float32")
    with progress("hashing the export", None):
        manifest.verify(export)
    graph = ir.load(export / _MODEL_NAME)
    contract = GraphContract.of(checkpoint.config, dtype)
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (1, tokens + 1))
    with progress("running the export", None):
        steps = _run(graph, export, checkpoint.config, contract, ids, threads)
    rows: list[LayerRow] = []
    with progress("comparing layers", checkpoint.config.num_hidden_layers + 2, unit="layers") as advance:
        for row in _compare(checkpoint, _Source(checkpoint, graph, scheme), steps, bound, advance):
            rows.append(row)
    return rows


@dataclass(frozen=True)
class _Step:
    """One run: its name, tokens consumed before, tensors in and out by name; hidden states as "hidden.L"."""

    name: str
    past: int
    tensors: Arrays


def _run(
    graph: ir.Model,
    export: Path,
    config: KimiLinearConfig,
    contract: GraphContract,
    ids: np.ndarray,
    threads: int | None,
) -> list[_Step]:
    hidden = _show_layer_inputs(graph, config)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(export.resolve()))
    if threads is not None:
        options.intra_op_num_threads = threads
    proto = ir.to_proto(graph).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    capacity = ids.shape[1]
    states = {s.past_name: np.zeros(s.shape(1, capacity), NUMPY_DTYPES[s.dtype]) for s in contract.states}
    steps = []
    for name, start, stop in (("prefill", 0, capacity - 1), ("decode", capacity - 1, capacity)):
        feeds = {
            INPUT_IDS: ids[:, start:stop],
            SEQUENCE_LENGTHS: np.array([stop - start], np.int32),
            LOGITS_INDICES: np.arange(stop - start)[None],
            **states,
        }
        if contract.has_latent:
            feeds[PAST_LENGTHS] = np.array([start], np.int32)
        wanted = [LOGITS, *(s.present_name for s in contract.states), *hidden]
        made = dict(zip(wanted, session.run(wanted, feeds), strict=True))
        shown = {hidden[value]: made.pop(value) for value in hidden}
        steps.append(_Step(name, start, feeds | made | shown))
        states = {s.past_name: made[s.present_name] for s in contract.states}
    return steps


def _show_layer_inputs(graph: ir.Model, config: KimiLinearConfig) -> dict[str, str]:
    """Make each layer's input, and the last one's output, outputs of the graph: their names -> "hidden.L"."""
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(config.num_hidden_layers)]
    shown = {}
    for index, name in enumerate([*names, "model.norm.weight"]):
        (use,) = graph.graph.initializers[name].uses()
        value = use.node.inputs[0]
        assert value is not None
        graph.graph.outputs.append(value)
        shown[str(value.name)] = f"hidden.{index}"
    return shown


class _Source:
    """Parameters of the source model as float32 tensors: the checkpoint's, or what the export's levels stand for."""

    def __init__(self, checkpoint: Checkpoint, graph: ir.Model, scheme: Scheme | None) -> None:
        self.checkpoint, self.graph, self.scheme = checkpoint, graph, scheme
        self.roles = quantized_parameters(checkpoint.config, scheme) if scheme else {}

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        """Levels, scales and, unless symmetric, zero points of a quantised parameter, as the export stores them."""
        found = {}
        for part in ("levels", "scales", "zero_points"):
            value = self.graph.graph.initializers.get(f"{name}_{part}")
            if value is not None and value.const_value is not None:
                found[part] = torch.from_numpy(np.array(value.const_value.numpy()))
        return found

    def load(self, name: str) -> torch.Tensor:
        """The parameter in its own layout."""
        if name not in self.roles:
            return torch.from_numpy(self.checkpoint.load(name, "float32"))
        assert self.scheme is not None
        stored = self.stored(name)
        levels = stored["levels"].flatten(stored["scales"].ndim - 1)
        return dequantize(levels, stored["scales"], stored.get("zero_points"), self.scheme.bits, torch.float32)

    def levels_against_checkpoint(self, prefix: str, bound: Tolerance) -> Iterator[tuple[str, Difference]]:
        """For each quantised parameter whose name begins with `prefix`, the part that uses most of `bound`: an expert,
        or some rows of a matrix, against the checkpoint's values."""
        weights = {r.weight.name: r.weight for r in self.checkpoint.resolve()}
        for name in self.roles:
            if not name.startswith(prefix):
                continue
            assert self.scheme is not None
            stored = self.stored(name)
            differences = []
            for part in row_parts(self.checkpoint, weights[name], "float32"):
                rows = slice(part.start, part.start + part.weight.shape[0])
                scales, zeros = stored["scales"][rows], stored.get("zero_points")
                levels = stored["levels"][rows].flatten(scales.ndim - 1)
                cut = [
                    None if tensor is None else tensor.flatten(0, -2)[::_ROWS_APART]
                    for tensor in (levels, scales, None if zeros is None else zeros[rows])
                ]
                assert cut[0] is not None
                assert cut[1] is not None
                made = dequantize(cut[0], cut[1], cut[2], self.scheme.bits, torch.float32)
                wanted = part.load("float32").reshape(-1, part.weight.shape[-1])[::_ROWS_APART]
                differences.append(compare(made.numpy(), wanted))
            yield name, max(differences, key=lambda d: max(d.peak / bound.peak, d.cosine / bound.cosine))

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Load every parameter of `module`, named `prefix`, and round the inputs of its quantised products."""
        for name, _ in list(module.named_parameters()):
            full = prefix + name
            if self.roles.get(full) == "experts":
                continue
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(self.load(full), requires_grad=False))
            if self.roles.get(full) == "product" and self.scheme is not None and self.scheme.activations == "int8":
                owner.register_forward_pre_hook(rounding(self.scheme))

    def layer(self, index: int) -> DecoderLayer:
        """One decoder layer with its weights; quantised experts stay levels."""
        prefix = f"model.layers.{index}."
        with torch.device("meta"):
            layer = DecoderLayer(self.checkpoint.config, index, torch.float32)
        self.fill(layer, prefix)
        if self.scheme is not None and isinstance(layer.mlp, MixtureOfExperts):
            gate_up, down = (self.stored(f"{prefix}mlp.experts.{part}") for part in ("gate_up_proj", "down_proj"))
            layer.mlp = QuantizedMixtureOfExperts(layer.mlp, gate_up, down, self.scheme)
        return layer


def _compare(
    checkpoint: Checkpoint,
    source: _Source,
    steps: list[_Step],
    bound: Tolerance,
    advance: Callable[[int], None],
) -> Iterator[LayerRow]:
    config = checkpoint.config

    def row(step: _Step, tensor: str, actual: np.ndarray, expected: torch.Tensor, bound: Tolerance = bound) -> LayerRow:
        difference = compare(actual, expected.numpy())
        return LayerRow(step.name, tensor, difference, difference.within(bound))

    def weights(prefix: str) -> Iterator[LayerRow]:
        if source.scheme is None:
            return
        allowed = tolerance(f"weights_int{source.scheme.bits}")
        for name, difference in source.levels_against_checkpoint(prefix, allowed):
            yield LayerRow("weights", name, difference, difference.within(allowed))

    yield from weights(EMBEDDINGS)
    table = source.load(EMBEDDINGS)
    for step in steps:
        looked_up = table[torch.from_numpy(step.tensors[INPUT_IDS])]
        # a lookup rounds no input, of whatever precision the table is
        yield row(step, "embeddings", step.tensors["hidden.0"], looked_up, tolerance("graph_float32"))
    del table
    advance(1)
    for index in range(config.num_hidden_layers):
        yield from weights(f"model.layers.{index}.")
        layer = source.layer(index)
        for step in steps:
            past = {
                f"{index}.{kind}": torch.from_numpy(step.tensors[f"past_key_values.{index}.{kind}"])
                for kind in (("conv_state", "recurrent_state") if config.is_kda(index) else ("latent",))
            }
            past["lengths"] = torch.tensor([step.past], dtype=torch.int32)
            lengths = torch.from_numpy(step.tensors[SEQUENCE_LENGTHS])
            present: dict[str, torch.Tensor] = {}
            with torch.inference_mode():
                out = layer(torch.from_numpy(step.tensors[f"hidden.{index}"]), past, lengths, present)
            yield row(step, f"{index}.output", step.tensors[f"hidden.{index + 1}"], out)
            for key, value in present.items():
                yield row(step, key, step.tensors[f"present.{key}"], value)
        del layer
        advance(1)
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps, torch.float32)
    source.fill(norm, "model.norm.")
    name = EMBEDDINGS if config.tie_word_embeddings else HEAD
    if name == HEAD:
        yield from weights(HEAD)
    head = source.load(name)
    for step in steps:
        with torch.inference_mode():
            x = norm(torch.from_numpy(step.tensors[f"hidden.{config.num_hidden_layers}"]))
            if source.roles.get(name) == "product" and source.scheme and source.scheme.activations == "int8":
                assert source.scheme.group is not None
                x = rounded(x, source.scheme.group)
            logits = nn.functional.linear(x, head)
        yield row(step, LOGITS, step.tensors[LOGITS], logits)
    advance(1)
