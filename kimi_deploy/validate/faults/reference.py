"""Known faults of the reference itself, the source model in PyTorch, planted while the checks run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kimi_deploy.contract import GraphContract
from kimi_deploy.ops.kimi_delta_attention import reference
from kimi_deploy.validate.faults.catalogue import Planted


@dataclass(frozen=True)
class ReferenceFault:
    """`plant` makes the source model wrong as long as its context is open."""

    name: str
    planted: Planted
    plant: Callable[[], AbstractContextManager[None]]


@contextmanager
def _wrong_decay() -> Iterator[None]:
    """The chunkwise form forgets a hundredth too much; the recurrence, which the form was made from, is right."""
    right = reference.chunkwise_kda

    def wrong(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, *others: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return right(q, k, v, 1.01 * g, *others)

    reference.chunkwise_kda = wrong  # type: ignore[assignment]
    try:
        yield
    finally:
        reference.chunkwise_kda = right


def reference_faults(contract: GraphContract) -> tuple[ReferenceFault, ...]:
    """The faults of a model with that contract."""
    first = next(s.layer for s in contract.states if s.kind == "recurrent_state")
    decay = Planted("decay of the chunkwise form", "reference-forms", (f"{first}.recurrent_state",))
    return (ReferenceFault("wrong chunkwise decay", decay, _wrong_decay),)
