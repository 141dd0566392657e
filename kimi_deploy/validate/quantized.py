"""Validation of a quantised export: its arithmetic, the rounding of its inputs, and what the whole of it costs.

The arithmetic is the parity of any float32 graph, against PyTorch with the levels that the export stores. The cost is
how far the export's distributions over tokens are from those of the model that it was made from, on held-out text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from kimi_deploy.contract import LOGITS
from kimi_deploy.model.quantized import quantize_model
from kimi_deploy.quantization.scheme import Scheme
from kimi_deploy.runtime.base import Runner
from kimi_deploy.runtime.ort_runner import MODEL_NAME
from kimi_deploy.runtime.torch_runner import TorchRunner
from kimi_deploy.validate.logits import log_softmax
from kimi_deploy.validate.observation import run_in_pieces
from kimi_deploy.validate.prompts import Prompt
from kimi_deploy.validate.report import Row
from kimi_deploy.validate.selection import QUANTIZED_CHECKS
from kimi_deploy.validate.tolerances import QualityBound, quality_bound, tolerance

ROUNDING, QUALITY = QUANTIZED_CHECKS
TOKENS, ROWS = 128, 32
"""Single tokens that the rounding of inputs is judged on, and how many are run at a time."""
AGREEING, ENOUGH = 1 / 8, 16
"""Of the tokens that agreed before a layer, the share that must agree in it; with fewer left, no more is judged."""


def quantized_runner(model: Path, export: Path, scheme: Scheme) -> TorchRunner:
    """The source model with the weights that `export` stores, made float, and the rounding that `scheme` names."""
    runner = TorchRunner(model)
    initializers = ir.load(export / MODEL_NAME).graph.initializers

    def stored(name: str) -> np.ndarray:
        value = initializers[name].const_value
        assert value is not None
        return value.numpy()

    quantize_model(runner.model, stored, scheme)
    return runner


def exact(scheme: Scheme) -> Scheme:
    """`scheme` without the rounding of activations."""
    return replace(scheme, activations="float32")


def judge_rounding(reference: TorchRunner, candidate: Runner) -> Row:
    """The rounding itself: single tokens, of which enough must give the reference's states and logits to float32.

    The others met a tie, in the layer from which on they differ, and are left out from there; at the 48B model's width
    that is about half of them in every layer. A wrong scale, step or block of one product moves every token by a
    hundredth of the peak in the layer that it is in.
    """
    bound = tolerance("graph_float32").peak
    left, note = np.ones(TOKENS, bool), ""
    for stage, error in _errors(reference, candidate).items():
        agree = left & (error <= bound)
        passed = bool(agree.sum() >= AGREEING * left.sum())
        note = f"up to {stage}: {agree.sum()} of {TOKENS} tokens within {bound:g}"
        if not passed:
            note += f", where {left.sum()} were before it, the worst of them {error[left].max():.1e}"
        left = agree
        if not passed or left.sum() < ENOUGH:
            break
    return Row(ROUNDING, "single tokens", "states, logits", None, passed, note)


def _errors(reference: TorchRunner, candidate: Runner) -> dict[str, np.ndarray]:
    """For each layer's states, in order, and the logits: the error of each of TOKENS single tokens over the peak."""
    ids = np.linspace(0, reference.contract.vocab_size - 1, TOKENS).astype(np.int64)[:, None]
    errors: dict[str, list[np.ndarray]] = {}
    for start in range(0, TOKENS, ROWS):
        rows = ids[start : start + ROWS]
        made = []
        for runner in (reference, candidate):
            state = runner.new_state(batch=len(rows), capacity=1)
            logits = runner.forward(rows, state)
            made.append({**state.tensors(), LOGITS: logits})
        worst: dict[str, np.ndarray] = {}
        stages = [(f"layer {s.layer}", s.past_name) for s in reference.contract.states]
        for stage, name in (*stages, (LOGITS, LOGITS)):
            expected, actual = (tensors[name].astype(np.float64).reshape(len(rows), -1) for tensors in made)
            error = np.abs(actual - expected).max(-1) / (np.abs(expected).max() or 1.0)
            worst[stage] = np.maximum(worst.get(stage, 0.0), error)
        for stage, error in worst.items():
            errors.setdefault(stage, []).append(error)
    return {stage: np.concatenate(parts) for stage, parts in errors.items()}


@dataclass(frozen=True)
class Quality:
    """What quantising cost on `tokens` predictions.

    `kl`: mean KL(unquantised || export) in nats; `top1`: share of positions with the same most likely token;
    perplexities of the text itself, `is_text` false where random tokens stand in for it and those mean nothing;
    `chance` is the perplexity of not knowing the text at all, every token of the vocabulary as likely as another.
    """

    tokens: int
    kl: float
    top1: float
    perplexity: float
    perplexity_unquantised: float
    chance: int
    is_text: bool

    @property
    def ratio(self) -> float:
        """The export's perplexity over the unquantised model's."""
        return self.perplexity / self.perplexity_unquantised

    @property
    def untrained(self) -> bool:
        """Whether the unquantised model knows no more of the text than chance: its weights are random, or as good."""
        return self.is_text and self.perplexity_unquantised >= self.chance

    def within(self, bound: QualityBound) -> bool:
        """Whether the loss is allowed; perplexity counts on text only."""
        return self.kl <= bound.kl and (not self.is_text or bound.perplexity is None or self.ratio <= bound.perplexity)

    def to_dict(self) -> dict[str, float | int | bool]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"KL {self.kl:.2e}, same best token {self.top1:.1%} of {self.tokens}"
        if self.is_text:
            change = 100 * (self.ratio - 1)
            text += f", perplexity {self.perplexity_unquantised:.3f} -> {self.perplexity:.3f} ({change:+.2f} %)"
        if self.untrained:
            text += f"; no better than chance ({self.chance}) before quantising: judged as an untrained model"
        return text


def measure(unquantised: Runner, candidate: Runner, texts: Sequence[Prompt], *, is_text: bool) -> Quality:
    """The loss of `candidate` over `texts`, each run from an empty state. Needs one text of two tokens at least."""
    divergence, same, losses = [], [], []
    for prompt in texts:
        expected, actual = (log_softmax(run_in_pieces(r, prompt.ids).logits) for r in (unquantised, candidate))
        divergence.append((np.exp(expected) * (expected - actual)).sum(-1))
        same.append(expected.argmax(-1) == actual.argmax(-1))
        rows, following = np.arange(len(prompt.ids) - 1), prompt.ids[1:]
        losses.append(np.stack([-expected[rows, following], -actual[rows, following]]))
    mean = np.concatenate(losses, axis=1).mean(1)
    return Quality(
        tokens=sum(map(len, same)),
        kl=max(0.0, float(np.concatenate(divergence).mean())),
        top1=float(np.concatenate(same).mean()),
        perplexity=float(np.exp(mean[1])),
        perplexity_unquantised=float(np.exp(mean[0])),
        chance=unquantised.contract.vocab_size,
        is_text=is_text,
    )


def judge(quality: Quality, scheme: Scheme) -> Row:
    """The loss as a row of the report, against the bound for the scheme's precision, of a trained model or another."""
    bound = quality_bound(f"quality_int{scheme.bits}{'_untrained' if quality.untrained else ''}")
    passed = quality.within(bound)
    allowed = f"; allowed are KL {bound.kl:g}"
    if bound.perplexity is not None:
        allowed += f" and {100 * (bound.perplexity - 1):g} % of perplexity"
    return Row(QUALITY, "held-out text", "quality", None, passed, f"{quality}{'' if passed else allowed}")


class Checks:
    """The checks that only a quantised export has, those of the selected names."""

    def __init__(self, model: Path, export: Path, scheme: Scheme, candidate: Runner, selected: Sequence[str]) -> None:
        self._model, self._export, self._scheme = model, export, scheme
        self._candidate, self._selected = candidate, selected
        self._quality: Quality | None = None

    def run(self, texts: Sequence[Prompt], *, is_text: bool) -> Iterator[Row]:
        """Judge the rounding of inputs, where there is any, and the loss over `texts`."""
        if ROUNDING in self._selected and self._scheme.activations == "int8":
            yield judge_rounding(quantized_runner(self._model, self._export, self._scheme), self._candidate)
        if QUALITY in self._selected:
            self._quality = measure(TorchRunner(self._model), self._candidate, texts, is_text=is_text)
            yield judge(self._quality, self._scheme)

    def facts(self) -> dict[str, Any]:
        """For the report: the scheme and, once measured, its loss."""
        quality = {} if self._quality is None else {"quality": self._quality.to_dict()}
        return {"quantization": self._scheme.to_dict(), **quality}
