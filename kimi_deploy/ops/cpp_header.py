"""plugins/generated/kimi_ops.h and kimi_ort_ops.h, written from the OpSpecs.

`python -m kimi_deploy.ops.cpp_header > kimi_ops.h` is of the TensorRT plugins, with the argument `ort` of ONNX
Runtime's custom ops. Neither library holds a signature of its own: names, ports, dimensions, fields and the ABI hash
come from here. Dimension expressions become postfix programs, which the adapters evaluate over sizes and over
TensorRT's expressions.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Sequence

from kimi_deploy.ops.plugins import (
    ABI_FIELD,
    IN_PLACE_FIELD,
    PLUGINS,
    WORKSPACE_BLOCK,
    WORKSPACE_FIELD,
)
from kimi_deploy.ops.registry import OPS
from kimi_deploy.ops.spec import DOMAIN, DOMAIN_VERSION, Attribute, OpSpec, Port
from kimi_deploy.ops.standard import OptionalAttribute

HEADER = """// Written by `python -m kimi_deploy.ops.cpp_header{arguments}`; do not edit. A test keeps it current.
// clang-format off
#pragma once

#include "../tensorrt/op_spec.h"

namespace kimi {{
"""

_OPERATIONS = {ast.Add: "kAdd", ast.Sub: "kSubtract", ast.Mult: "kMultiply", ast.FloorDiv: "kDivide"}
_PORT_TYPES = {"T": "kT", "S": "kS", "float32": "kFloat32", "int32": "kInt32", "uint8": "kUint8"}
_FIELD_TYPES = {"int": "kInt", "float": "kFloat", "string": "kString"}


def symbols_of(spec: OpSpec) -> list[str]:
    """Every symbol of the op's dimensions: integer attributes first, then in the order of the ports."""
    names = dict.fromkeys(a.name for a in spec.attributes if a.type == "int")
    for port in (*spec.inputs, *spec.outputs):
        for dim in port.dims:
            used = (n.id for n in ast.walk(ast.parse(dim, mode="eval")) if isinstance(n, ast.Name))
            names.update(dict.fromkeys(n for n in used if n != "max"))
    return list(names)


def postfix(expression: str, symbols: Sequence[str]) -> list[tuple[str, int]]:
    """A dimension as (kind, value) steps of a stack machine; `symbols` gives the indices."""

    def walk(node: ast.expr) -> list[tuple[str, int]]:
        match node:
            case ast.Constant(value=int(value)):
                return [("kConstant", value)]
            case ast.Name(id=name):
                return [("kSymbol", symbols.index(name))]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
                return [*walk(left), *walk(right), (_OPERATIONS[type(op)], 0)]
            case ast.Call(func=ast.Name(id="max"), args=[left, right]):
                return [*walk(left), *walk(right), ("kMax", 0)]
        raise ValueError(f"dimension {expression!r} has no C++ form")

    return walk(ast.parse(expression, mode="eval").body)


def header() -> str:
    """The whole file of the TensorRT plugins."""
    block = f"inline constexpr int64_t kWorkspaceBlock = {WORKSPACE_BLOCK};  // bytes\n"
    ops = [_op(p.op, p.namespace, p.version, p.abi, p.fields) for p in PLUGINS.values()]
    return _file("", [block, *ops], PLUGINS)


def ort_header() -> str:
    """The whole file of ONNX Runtime's custom ops: every op of the package, its attributes and its ABI."""
    ops = [
        _op(op, DOMAIN, str(DOMAIN_VERSION), op.abi, (*op.attributes, Attribute(ABI_FIELD, "string", "")))
        for op in OPS.values()
    ]
    return _file(" ort", ops, OPS)


def _file(arguments: str, parts: Sequence[str], names: Iterable[str]) -> str:
    specs = ", ".join(f"&{_snake(name)}::kSpec" for name in names)
    all_ops = f"inline constexpr const OpSpec* kOps[] = {{{specs}}};"
    return "\n".join([HEADER.format(arguments=arguments), *parts, all_ops, "", "}  // namespace kimi", ""])


def _op(spec: OpSpec, namespace: str, version: str, abi: str | None, fields: Sequence[Attribute]) -> str:
    symbols = symbols_of(spec)
    lines = [f"namespace {_snake(spec.name)} {{", ""]
    for title, names in (
        ("Input", [p.name for p in spec.inputs]),
        ("Output", [p.name for p in spec.outputs]),
        ("Field", [f.name for f in fields]),
        ("Symbol", symbols),
    ):
        lines.append(f"enum {title} {{ {', '.join(_constant(title, n) for n in names)} }};")
    for field in fields:
        if field.choices:
            title = _camel(field.name)
            lines.append(f"enum class {title} {{ {', '.join('k' + _camel(c) for c in field.choices)} }};")
    lines.append("")
    lines.append(f"inline constexpr const char* kSymbols[] = {{{', '.join(_text(s) for s in symbols)}}};")
    for kind, ports in (("In", spec.inputs), ("Out", spec.outputs)):
        for port in ports:
            lines += _dimensions(kind, port, symbols)
        body = ",\n    ".join(_port(kind, p) for p in ports)
        lines.append(f"inline constexpr PortSpec k{kind}puts[] = {{\n    {body}}};")
    for field in fields:
        if field.choices:
            choices = ", ".join(_text(c) for c in field.choices)
            lines.append(f"inline constexpr const char* kChoicesOf{_camel(field.name)}[] = {{{choices}}};")
    body = ",\n    ".join(_field(f, symbols) for f in fields)
    lines.append(f"inline constexpr FieldSpec kFields[] = {{\n    {body}}};")
    names = [p.name for p in spec.inputs]
    aliases = {present: names.index(past) for past, present in spec.aliases}
    indices = ", ".join(str(aliases.get(p.name, -1)) for p in spec.outputs)
    lines.append(f"inline constexpr int kAliases[] = {{{indices}}};")
    abi_text = "nullptr" if abi is None else _text(abi)
    field_names = [f.name for f in fields]
    special = [
        str(field_names.index(name) if name in field_names else -1)
        for name in (ABI_FIELD, IN_PLACE_FIELD, WORKSPACE_FIELD)
    ]
    lines.append(
        f"inline constexpr OpSpec kSpec = {{{_text(spec.name)}, {_text(namespace)}, {_text(version)},\n"
        f"    {abi_text}, kInputs, kOutputs, kFields, kSymbols, kAliases, {', '.join(special)}}};"
    )
    lines += ["", f"}}  // namespace {_snake(spec.name)}", ""]
    return "\n".join(lines)


def _dimensions(kind: str, port: Port, symbols: Sequence[str]) -> list[str]:
    lines = []
    for axis, dim in enumerate(port.dims):
        steps = ", ".join(f"{{DimensionStep::{k}, {v}}}" for k, v in postfix(dim, symbols))
        lines.append(f"inline constexpr DimensionStep k{kind}{_camel(port.name)}{axis}[] = {{{steps}}};")
    dims = ", ".join(f"{{{_text(d)}, k{kind}{_camel(port.name)}{axis}}}" for axis, d in enumerate(port.dims))
    lines.append(f"inline constexpr DimensionSpec k{kind}{_camel(port.name)}Dims[] = {{{dims}}};")
    return lines


def _port(kind: str, port: Port) -> str:
    optional = "true" if port.optional else "false"
    return f"{{{_text(port.name)}, PortType::{_PORT_TYPES[port.dtype]}, {optional}, k{kind}{_camel(port.name)}Dims}}"


def _field(field: Attribute, symbols: Sequence[str]) -> str:
    """Name, type, symbol (or -1), required, default, choices."""
    symbol = symbols.index(field.name) if field.name in symbols else -1
    integer, real = 0, 0.0
    required = not isinstance(field, OptionalAttribute)
    if isinstance(field, OptionalAttribute):
        if field.type == "string":
            integer = field.choices.index(str(field.default))
        elif field.type == "int":
            integer = int(field.default)
        else:
            real = float(field.default)
    choices = f"kChoicesOf{_camel(field.name)}" if field.choices else "{}"
    return (
        f"{{{_text(field.name)}, FieldType::{_FIELD_TYPES[field.type]}, {symbol}, {'true' if required else 'false'}, "
        f"{integer}, {real}f, {choices}}}"
    )


def _text(value: str) -> str:
    return json.dumps(value)


def _constant(title: str, name: str) -> str:
    return f"k{title}{_camel(name)}"


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


if __name__ == "__main__":
    print(ort_header() if sys.argv[1:] == ["ort"] else header(), end="")
