"""What the TensorRT runner needs of an engine: its profiles, its aliased states, and contexts to run it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from kimi_deploy.contract import BATCH, CAPACITY, NUM_LOGITS, SEQUENCE, GraphContract
from kimi_deploy.errors import EngineError, StateError


class Sizes(NamedTuple):
    """The sizes of a call's axes, in the order of the names in `AXES`."""

    batch: int
    sequence: int
    capacity: int
    num_logits: int


AXES = (BATCH, SEQUENCE, CAPACITY, NUM_LOGITS)


@dataclass(frozen=True)
class ProfileLimits:
    """An optimisation profile as an engine has it: smallest and largest size of each axis its inputs have."""

    name: str
    index: int
    ranges: Mapping[str, tuple[int, int]]

    def holds(self, sizes: Sizes, axes: Sequence[str] = AXES) -> bool:
        """Whether every one of `axes` is within its range. An axis that no input has is not limited."""
        values = dict(zip(AXES, sizes, strict=True))
        return all(
            low <= values[axis] <= high for axis in axes if axis in self.ranges for low, high in [self.ranges[axis]]
        )

    def largest(self, axis: str) -> int:
        return self.ranges[axis][1]

    def __str__(self) -> str:
        ranges = ", ".join(f"{axis} {low} to {high}" for axis, (low, high) in self.ranges.items())
        return f"{self.name} ({ranges})"


def limits_of(
    name: str, index: int, contract: GraphContract, shapes: Mapping[str, Sequence[Sequence[int]]]
) -> ProfileLimits:
    """The limits of a profile with these smallest, likely and largest `shapes` of every input."""
    ranges: dict[str, tuple[int, int]] = {}
    for spec in contract.inputs:
        smallest, _, largest = shapes[spec.name]
        for dim, low, high in zip(spec.dims, smallest, largest, strict=True):
            if isinstance(dim, str):
                before = ranges.get(dim, (low, high))
                ranges[dim] = (max(low, before[0]), min(high, before[1]))
    return ProfileLimits(name, index, {axis: ranges[axis] for axis in AXES if axis in ranges})


def choose_profile(profiles: Sequence[ProfileLimits], sizes: Sizes) -> ProfileLimits:
    """The profile made for the fewest steps among those that hold `sizes`. Raises EngineError when none does."""
    fitting = [p for p in profiles if p.holds(sizes)]
    if fitting:
        return min(fitting, key=lambda p: p.largest(SEQUENCE))
    raise EngineError(
        "no profile of the engine has these sizes; the state is as it was",
        seen=", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True)),
        expected=" or ".join(map(str, profiles)),
        fix="use sizes in these ranges, or build the engine with wider ones (build-engine --prefill, --decode)",
    )


def check_state(profiles: Sequence[ProfileLimits], batch: int, capacity: int) -> None:
    """Raise StateError when no profile has room for a state of these sizes."""
    if not any(p.holds(Sizes(batch, 1, capacity, 1), (BATCH, CAPACITY)) for p in profiles):
        raise StateError(
            "the engine has no profile for a state of this size",
            seen=f"batch {batch}, capacity {capacity}",
            expected=" or ".join(map(str, profiles)),
            fix="use sizes in these ranges (--capacity), or build the engine with wider ones",
        )


OnLayer = Callable[[str, float], None]
"""Told the name of a layer of the engine and the seconds it took, layer by layer in the order they ran."""


class EngineContext(Protocol):
    """An execution context in one profile, and the shapes and addresses it will use next."""

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Shape of an input."""

    def bind(self, name: str, address: int) -> None:
        """Device address of an input or output."""

    def enqueue(self) -> None:
        """Order one run on the device's stream. Raises BackendError when TensorRT refuses."""


class EngineSession(Protocol):
    """A loaded engine.

    `aliased` are the past names of states that the engine writes over; `scratch_bytes` is the size of the memory that
    its contexts share.
    """

    contract: GraphContract
    fingerprint: str
    profiles: tuple[ProfileLimits, ...]
    aliased: frozenset[str]
    scratch_bytes: int

    def new_context(self, profile: ProfileLimits, on_layer: OnLayer | None = None) -> EngineContext:
        """A context of its own; all contexts share scratch memory, as one stream orders them.

        With `on_layer` every run waits for its end and then reports its layers; such a run cannot be recorded.
        """

    def layers(self, profile: ProfileLimits) -> list[dict[str, Any]]:
        """What TensorRT's inspector says of each layer: "Name" and, in a plan built for it, "LayerType", "Metadata"."""
