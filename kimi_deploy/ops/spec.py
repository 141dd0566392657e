"""OpSpec: one definition of a custom op, from which everything else about it is derived.

Ports have symbolic shapes. A dimension is an expression over dimension symbols (bound from the inputs),
and attributes, written with `*`, `+`, `-`, `//`, `max` and integers: "3*num_heads*head_dim". Pure Python: the command
line's help and the plugin generator read specs without torch or onnx.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Literal

from kimi_deploy.errors import ContractError

DOMAIN = "kimi"
"""ONNX domain, torch namespace and TensorRT plugin namespace of every custom op."""
DOMAIN_VERSION = 1

PortDtype = Literal["T", "S", "float32", "int32", "uint8"]
"""`T` is the model's floating dtype (float32, float16 or bfloat16), the same for all `T` ports of a node; `S` is a
second one, of the states of ONNX's own operators, and is `T` where no input has it."""
AttributeType = Literal["int", "float", "string"]
AttributeValue = int | float | str


@dataclass(frozen=True)
class Port:
    """A named input or output: symbolic `dims`, dtype, whether an input may be absent, and its meaning."""

    name: str
    dims: tuple[str, ...]
    dtype: PortDtype
    doc: str
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """A required attribute. `choices` limits a string."""

    name: str
    type: AttributeType
    doc: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpSpec:
    """A custom op: ports, attributes and which outputs are the next value of which state inputs.

    `aliases` maps a state input (`past_x`) to the output (`present_x`) that may share its memory.
    """

    name: str
    doc: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: tuple[Attribute, ...]
    aliases: tuple[tuple[str, str], ...] = ()

    @property
    def torch_name(self) -> str:
        """snake_case name under `torch.ops.kimi`."""
        return "".join("_" + c.lower() if c.isupper() else c for c in self.name).lstrip("_")

    @property
    def abi(self) -> str:
        """16 hex digits over everything a caller and an implementation must agree on; not the documentation."""

        def bare(value: object) -> object:
            if isinstance(value, dict):
                return {k: bare(v) for k, v in value.items() if k != "doc"}
            return [bare(v) for v in value] if isinstance(value, (list, tuple)) else value

        text = json.dumps({"domain": DOMAIN, "version": DOMAIN_VERSION, **bare(asdict(self))}, sort_keys=True)  # type: ignore[dict-item]
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def torch_schema(self) -> str:
        """The op's signature in torch.library's schema language, without namespace."""
        types = {"int": "int", "float": "float", "string": "str"}
        required = [f"Tensor {p.name}" for p in self.inputs if not p.optional]
        optional = [f"Tensor? {p.name}=None" for p in self.inputs if p.optional]
        attributes = [f"{types[a.type]} {a.name}" for a in self.attributes]
        # keyword-only attributes: a call names every one, none has a default
        arguments = ", ".join(required + optional + ["*"] + attributes)
        results = ", ".join("Tensor" for _ in self.outputs)
        return f"{self.torch_name}({arguments}) -> {results if len(self.outputs) == 1 else f'({results})'}"

    def input(self, name: str) -> Port:
        """The input port called `name`."""
        return next(p for p in self.inputs if p.name == name)

    def check_attributes(self, values: Mapping[str, object]) -> None:
        """Raise ContractError unless `values` has exactly the spec's attributes, with the right types."""
        known = {a.name: a for a in self.attributes}
        wrong = sorted(set(values) ^ set(known))
        if wrong:
            raise ContractError(
                f"{self.name}: attributes do not match the op",
                seen=f"missing or unknown: {wrong}",
                expected=f"exactly {sorted(known)}",
                fix="export the model again with this version",
            )
        kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "string": (str,)}
        for name, value in values.items():
            attribute = known[name]
            ok = isinstance(value, kinds[attribute.type]) and not isinstance(value, bool)
            if not ok or (attribute.choices and value not in attribute.choices):
                raise ContractError(
                    f"{self.name}: attribute {name} is not valid",
                    seen=repr(value),
                    expected=f"{attribute.type}{f' in {attribute.choices}' if attribute.choices else ''}",
                    fix=attribute.doc,
                )

    def bind(
        self, shapes: Mapping[str, Sequence[int] | None], attributes: Mapping[str, AttributeValue]
    ) -> dict[str, int]:
        """Match input `shapes` against the symbolic dims and return every symbol's value.

        Absent optional inputs map to None. Raises ContractError on a wrong rank, or on a dimension that
        contradicts another port or an attribute.
        """
        symbols = {k: v for k, v in attributes.items() if isinstance(v, int)}
        pending: list[tuple[Port, int, str, int]] = []
        for port in self.inputs:
            shape = shapes.get(port.name)
            if shape is None:
                if not port.optional:
                    raise ContractError(f"{self.name}: input {port.name} is missing", expected=f"shape {port.dims}")
                continue
            if len(shape) != len(port.dims):
                raise ContractError(
                    f"{self.name}: input {port.name} has the wrong rank",
                    seen=f"{tuple(shape)}",
                    expected=f"{port.dims}",
                )
            for axis, (dim, size) in enumerate(zip(port.dims, shape, strict=True)):
                if dim.isidentifier() and dim not in symbols:
                    symbols[dim] = size
                else:
                    pending.append((port, axis, dim, size))
        for port, axis, dim, size in pending:
            wanted = evaluate_dim(dim, symbols)
            # torch's symbolic sizes compare by value or by a guard; both are what is wanted here
            if wanted != size:
                raise ContractError(
                    f"{self.name}: input {port.name} has the wrong size on axis {axis}",
                    seen=str(size),
                    expected=f"{dim} = {wanted}",
                )
        return symbols

    def output_shapes(self, symbols: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Shapes of the outputs, in order, from the symbols that `bind` returned."""
        return [tuple(evaluate_dim(d, symbols) for d in p.dims) for p in self.outputs]


def evaluate_dim(expression: str, symbols: Mapping[str, int]) -> int:
    """Value of a symbolic dimension; `symbols` may hold torch.SymInt."""

    def walk(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Name(id=name) if name in symbols:
                return symbols[name]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return walk(left) + walk(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return walk(left) - walk(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return walk(left) * walk(right)
            case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
                return walk(left) // walk(right)
            case ast.Call(func=ast.Name(id="max"), args=[left, right]):
                return max(walk(left), walk(right))
        raise ContractError(f"dimension {expression!r} cannot be evaluated", seen=f"symbols {sorted(symbols)}")

    return walk(_parsed(expression))


@cache
def _parsed(expression: str) -> ast.expr:
    # a decode step evaluates the same few expressions hundreds of times
    return ast.parse(expression, mode="eval").body
