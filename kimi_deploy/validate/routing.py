"""The source model's expert choices: where they are a near tie, and how the model goes on with another choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.model import KimiLinearForCausalLM
from kimi_deploy.model.layers import MixtureOfExperts

# more than any score, all of which are below 1 plus a bias: the experts that have it are the ones chosen
_CERTAIN = 1e4


@dataclass(frozen=True)
class Alternative:
    """Another set of experts for one token in one layer, whose choice a change of scores by `gap` would explain."""

    layer: int
    gap: float
    experts: frozenset[int]


def near_ties(biased: np.ndarray, config: KimiLinearConfig, gap: float) -> dict[frozenset[int], float]:
    """Sets of experts other than the chosen one that are within `gap`, each with its gap.

    `biased` [experts] are the scores with the selection bias. Looked at are the exchange of one chosen expert for one
    that was not, of one kept group for one that was not (a group's score is the sum of its two best), and both at once.
    """
    count, groups = config.num_experts_per_token, config.num_expert_group
    found: dict[frozenset[int], float] = {}
    for lost, kept in _near_groups(biased, groups, config.topk_group, gap):
        allowed = [e for e in range(len(biased)) if e * groups // len(biased) in kept]
        order = sorted(allowed, key=lambda e: (-biased[e], e))
        best = frozenset(order[:count])
        found[best] = min(lost, found.get(best, lost))
        for out, new in product(order[:count], order[count:]):
            cost = max(lost, float(biased[out] - biased[new]))
            if cost <= gap:
                other = best - {out} | {new}
                found[other] = min(cost, found.get(other, cost))
    return {experts: cost for experts, cost in found.items() if cost > 0.0}


def _near_groups(biased: np.ndarray, groups: int, kept: int, gap: float) -> Iterator[tuple[float, frozenset[int]]]:
    """The kept groups, at no cost, and every exchange of one of them whose scores differ by less than two gaps."""
    sums = np.sort(biased.reshape(groups, -1), axis=1)[:, -2:].sum(1)
    order = sorted(range(groups), key=lambda g: (-sums[g], g))
    own = frozenset(order[:kept])
    yield 0.0, own
    for out, new in product(order[:kept], order[kept:]):
        cost = float(sums[out] - sums[new]) / 2
        if cost <= gap:
            yield max(cost, np.finfo(float).tiny), own - {out} | {new}


class Routers:
    """The routers of one source model."""

    def __init__(self, model: KimiLinearForCausalLM) -> None:
        self._config = model.config
        self._layers: dict[int, MixtureOfExperts] = {
            index: layer.mlp
            for index, layer in enumerate(model.model.layers)
            if isinstance(layer.mlp, MixtureOfExperts)
        }
        self._inputs: dict[int, torch.Tensor] = {}
        for index, module in self._layers.items():
            module.register_forward_pre_hook(self._remember(index))

    def _remember(self, layer: int) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._inputs[layer] = arguments[0].detach()

        return hook

    def alternatives(self, position: int, gap: float, after: int = -1) -> list[Alternative]:
        """Near ties at step `position` of the model's last call, in layers above `after`, the nearest first."""
        found = []
        for layer, module in self._layers.items():
            if layer > after:
                scores = torch.sigmoid(self._inputs[layer][0, position].float() @ module.gate.weight.float().T)
                biased = (scores + module.gate.e_score_correction_bias).double().cpu().numpy()
                found += [Alternative(layer, cost, s) for s, cost in near_ties(biased, self._config, gap).items()]
        return sorted(found, key=lambda a: a.gap)

    @contextmanager
    def forced(self, choices: Mapping[int, frozenset[int]]) -> Iterator[None]:
        """Within, the layers named choose exactly these experts for every token; weights come from the scores as ever.

        Only the selection bias is changed, which enters no weight.
        """
        saved = {}
        for layer, experts in choices.items():
            bias = self._layers[layer].gate.e_score_correction_bias
            saved[layer] = bias.data
            bias.data = bias.data.clone()
            bias.data[sorted(experts)] = _CERTAIN
        try:
            yield
        finally:
            for layer, values in saved.items():
                self._layers[layer].gate.e_score_correction_bias.data = values
