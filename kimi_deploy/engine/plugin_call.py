"""One invocation of a plugin, and what can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kimi_deploy.ops.plugins import PluginSpec
from kimi_deploy.ops.spec import AttributeValue


@dataclass(frozen=True)
class Binding:
    """A tensor that TensorRT bound: address (0 where only sizes are asked for), shape, dtype such as "float16"."""

    address: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class PluginCall:
    """An invocation whose shapes agree with the op; `symbols` are the sizes that its dimensions are made of.

    `inputs` may be shorter than the op's ports: optional ones at the end may be absent. workspace_size: bytes that
    TensorRT keeps for the layer at `workspace`.
    """

    plugin: PluginSpec
    fields: Mapping[str, AttributeValue]
    symbols: Mapping[str, int]
    inputs: Sequence[Binding]
    outputs: Sequence[Binding] = field(default=())
    workspace: int = 0
    workspace_size: int = 0
    stream: int = 0

    @property
    def bindings(self) -> dict[str, Binding]:
        """By port name, inputs and outputs; absent inputs are not in it."""
        ports = [*self.plugin.op.inputs[: len(self.inputs)], *self.plugin.op.outputs]
        return dict(zip((p.name for p in ports), (*self.inputs, *self.outputs), strict=False))


class Executor(Protocol):
    """Runs plugins. What TensorRT keeps for a layer is decided when an engine is built, by `workspace`."""

    def workspace(self, call: PluginCall) -> int:
        """Bytes of workspace of this invocation. Raises ContractError for sizes or dtypes it does not take."""
        ...

    def enqueue(self, call: PluginCall) -> None:
        """Run it, in order on the call's stream. Raises ContractError or BackendError."""
        ...
