"""Tokenwise: what ONNX Runtime would run node by node between our ops, as one kernel of the CPU library a run.

Norms, sums, gates and products with weights treat every token by itself. A decode step of a quantised export spends as
much time between its small nodes as in them, so the graph that a session is given has one node in the place of each run
of them. The export stays as it is. A node that fits no pattern here is left to ONNX Runtime.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx
from onnx import NodeProto, TensorProto

from kimi_deploy.ops.flavours import INT8_ACTIVATIONS, MICROSOFT_DOMAIN
from kimi_deploy.ops.spec import DOMAIN

NAME = "Tokenwise"
ABI = "1"
"""Of the attribute `program`, which plugins/onnxruntime/tokenwise.h describes."""
_MATMUL = "MatMulNBits"
_MOST_VALUES, _MOST_PORTS = 64, 192
_BLOCKS = (32, 64, 128)


def fuse(model: onnx.ModelProto) -> dict[str, str]:
    """Put Tokenwise nodes into the graph of a quantised export; any other is left as it is.

    Returns the float32 weights that those nodes read transposed, [out, in], by the name that they have now, and the
    name that each had. They are declared in the graph, but their data is the caller's to give to the session.
    """
    graph = model.graph
    if not any(node.op_type == _MATMUL and node.domain == MICROSOFT_DOMAIN for node in graph.node):
        return {}
    columns = _Columns(graph)
    steps = {id(node): step for node in graph.node if (step := columns.step(node)) is not None}
    runs = _runs(graph, steps)
    outside = _read_outside(graph, runs)
    transposed: dict[str, str] = {}
    members: set[int] = set()
    fused = []
    for run in runs:
        program = _Program(columns, transposed)
        for node in run:
            steps[id(node)](program)
        made = program.node(_name(run), [v for node in run for v in node.output if v in outside])
        if len(program.lines) <= _MOST_VALUES and len(program.inputs) <= _MOST_PORTS:
            members.update(id(node) for node in run)
            fused.append(made)
    ordered = _in_order([node for node in graph.node if id(node) not in members] + fused)
    del graph.node[:]
    graph.node.extend(ordered)
    read = {name for node in ordered for name in node.input}
    transposed = {name: source for name, source in transposed.items() if name in read}
    _declare(graph, transposed)
    return transposed


class _Columns:
    """The last dimension of values, as far as weights and splits tell it, and what each node is to a program."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.initializers = {i.name: i for i in graph.initializer}
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._readers[name].append(node)
        self._producers = {name: node for node in graph.node for name in node.output}
        self._outputs = {o.name for o in graph.output}
        self.of: dict[str, int] = {}
        for _ in range(2):  # what a product reads tells the columns of a sum before it
            for node in graph.node:
                self._note(node)

    def _note(self, node: NodeProto) -> None:
        shape = self._weight_shape(node)
        if node.op_type == "Gather" and node.input[0] in self.initializers and not _integer(node, "axis"):
            dims = self.initializers[node.input[0]].dims
            if len(dims) == 2:
                self.of[node.output[0]] = dims[1]
        elif shape is not None:
            self.of[node.output[0]], self.of[node.input[0]] = shape
        elif node.op_type == "RMSNormalization":
            weight = self.initializers.get(node.input[1])
            if weight is not None and len(weight.dims) == 1 and _integer(node, "axis", -1) == -1:
                self.of[node.input[0]] = self.of[node.output[0]] = weight.dims[0]
        elif node.op_type == "Split":
            self.of.update(zip(node.output, self._sizes(node), strict=False))
        elif node.op_type in ("Add", "Mul", "Sigmoid"):
            known = {self.of[name] for name in (*node.input, *node.output) if name in self.of}
            if len(known) == 1 and not any(name in self.initializers for name in node.input):
                self.of.update(dict.fromkeys((*node.input, *node.output), known.pop()))
        elif node.op_type == "Concat" and all(name in self.of for name in node.input):
            self.of[node.output[0]] = sum(self.of[name] for name in node.input)

    def _weight_shape(self, node: NodeProto) -> tuple[int, int] | None:
        """Output and input columns of a product with weights, or None for any other node."""
        if node.op_type == _MATMUL and node.domain == MICROSOFT_DOMAIN:
            return _integer(node, "N"), _integer(node, "K")
        if node.op_type == "MatMul" and node.input[0] not in self.initializers:
            weight = self.initializers.get(node.input[1])
            if weight is not None and weight.data_type == TensorProto.FLOAT and len(weight.dims) == 2:
                return weight.dims[1], weight.dims[0]
        return None

    def _sizes(self, node: NodeProto) -> list[int]:
        sizes = self.initializers.get(node.input[1]) if len(node.input) > 1 else None
        if sizes is None or _integer(node, "axis") != -1 or sizes.data_location == TensorProto.EXTERNAL:
            return []
        return [int(size) for size in onnx.numpy_helper.to_array(sizes)]

    def step(self, node: NodeProto) -> Callable[[_Program], None] | None:
        """What adds the node to a program; None where it is none of the patterns."""
        names = (*node.input, *node.output)
        if node.domain == MICROSOFT_DOMAIN and node.op_type == _MATMUL:
            return self._quantised_product(node)
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "MatMul" and self._weight_shape(node) is not None:
            return lambda p: p.product(node, self.of[node.output[0]], [p.transpose(node.input[1])])
        if node.op_type == "RMSNormalization" and node.input[0] in self.of:
            weight = self.initializers.get(node.input[1])
            fits = weight is not None and weight.data_type == TensorProto.FLOAT and len(node.output) == 1
            return (lambda p: p.norm(node)) if fits else None
        if node.op_type == "Split" and node.input[0] in self.of and len(self._sizes(node)) == len(node.output):
            return lambda p: p.split(node, self._sizes(node))
        if node.op_type == "Concat" and _integer(node, "axis") == -1 and len(node.input) == 2:
            return (lambda p: p.add("join", node)) if all(name in self.of for name in names) else None
        if node.op_type == "Add" and all(self.of.get(name) for name in names):
            return lambda p: p.add("add", node)
        if node.op_type in ("Sigmoid", "Mul") and (found := self._gate(node)) is not None:
            last, gate, up = found
            return lambda p: p.gate(last, gate, up) if node is last else None
        return None

    def _quantised_product(self, node: NodeProto) -> Callable[[_Program], None] | None:
        bits, block = _integer(node, "bits", 4), _integer(node, "block_size")
        constants = [name for name in node.input[1:] if name]
        fits = (
            bits in (4, 8)
            and block in _BLOCKS
            and _integer(node, "K") % block == 0
            and len(node.input) <= 4
            and all(name in self.initializers for name in constants)
            and self.initializers[constants[0]].data_type == TensorProto.UINT8
            and self.initializers[constants[1]].data_type == TensorProto.FLOAT
            and (len(constants) < 3 or self.initializers[constants[2]].data_type == TensorProto.UINT8)
        )
        if not fits:
            return None
        int8 = _integer(node, "accuracy_level") == INT8_ACTIVATIONS
        return lambda p: p.product(node, _integer(node, "N"), constants, bits, block, int8)

    def _gate(self, node: NodeProto) -> tuple[NodeProto, str, str] | None:
        """The last node of silu(gate) * up, which `node` is part of, and the names of gate and up.

        The exported pattern: Split into both, Sigmoid of the gate, Mul with the gate, Mul with `up`; nothing else reads
        the two before the last.
        """
        if node.op_type == "Sigmoid":
            sigmoid = node
        else:
            found = [self._producers.get(name) for name in node.input]
            found += [
                self._producers.get(name) for n in found if n is not None and n.op_type == "Mul" for name in n.input
            ]
            candidates = [n for n in found if n is not None and n.op_type == "Sigmoid"]
            if len(candidates) != 1:
                return None
            (sigmoid,) = candidates
        gate = sigmoid.input[0]
        silu = self._only_reader(sigmoid, "Mul")
        if silu is None or sorted(silu.input) != sorted((gate, sigmoid.output[0])):
            return None
        last = self._only_reader(silu, "Mul")
        split = self._producers.get(gate)
        if (
            last is None
            or split is None
            or split.op_type != "Split"
            or len(self._sizes(split)) != 2
            or gate not in self.of
        ):
            return None
        up = [name for name in last.input if name != silu.output[0]]
        if (
            up != [split.output[1]]
            or self.of.get(up[0]) != self.of.get(gate)
            or not any(node is n for n in (sigmoid, silu, last))
        ):
            return None
        return last, gate, up[0]

    def _only_reader(self, node: NodeProto, op_type: str) -> NodeProto | None:
        (name,) = node.output
        readers = self._readers[name]
        if name in self._outputs or len(readers) != 1 or readers[0].op_type != op_type:
            return None
        return readers[0]


@dataclass
class _Program:
    """The lines of one node's program."""

    columns: _Columns
    transposed: dict[str, str]
    lines: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    values: dict[str, int] = field(default_factory=dict)

    def node(self, name: str, outputs: list[str]) -> NodeProto:
        lines = self.lines + [f"output {self.values[output]}" for output in outputs]
        return onnx.helper.make_node(NAME, self.inputs, outputs, name=name, domain=DOMAIN, program="\n".join(lines))

    def norm(self, node: NodeProto) -> None:
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        self._append(node.output[0], "norm", self._value(node.input[0]), *self._ports(node.input[1]), f"{epsilon:.9g}")

    def add(self, what: str, node: NodeProto) -> None:
        self._append(node.output[0], what, *(self._value(name) for name in node.input))

    def gate(self, node: NodeProto, gate: str, up: str) -> None:
        self._append(node.output[0], "swiglu", self._value(gate), self._value(up))

    def split(self, node: NodeProto, sizes: list[int]) -> None:
        begin = 0
        whole = self._value(node.input[0])
        for name, size in zip(node.output, sizes, strict=True):
            self._append(name, "part", whole, begin, size)
            begin += size

    def product(
        self, node: NodeProto, columns: int, weights: list[str], bits: int = 32, block: int = 0, int8: bool = False
    ) -> None:
        x = self._value(node.input[0])
        ports = self._ports(*weights)
        self._append(node.output[0], "product", x, columns, bits, block, int(int8), int(len(weights) == 3), ports[0])

    def transpose(self, name: str) -> str:
        self.transposed[f"{name}.transposed"] = name
        return f"{name}.transposed"

    def _value(self, name: str) -> int:
        if name not in self.values:
            self._append(name, "input", *self._ports(name), self.columns.of[name])
        return self.values[name]

    def _ports(self, *names: str) -> list[int]:
        """Of inputs that follow each other."""
        self.inputs += names
        return list(range(len(self.inputs) - len(names), len(self.inputs)))

    def _append(self, name: str, *words: object) -> None:
        self.values[name] = len(self.lines)
        self.lines.append(" ".join(str(word) for word in words))


def _runs(graph: onnx.GraphProto, steps: dict[int, Callable[[_Program], None]]) -> list[list[NodeProto]]:
    """Nodes that can be one, in the graph's order.

    Of all nodes with as many other nodes before them on the longest way: nothing between two such reads what one makes.
    """
    depth: dict[str, int] = {}
    runs: dict[int, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        level = max((depth.get(name, 0) for name in node.input), default=0)
        if id(node) in steps:
            runs[level].append(node)
        depth.update(dict.fromkeys(node.output, level if id(node) in steps else level + 1))
    products = (_MATMUL, "MatMul")
    return [run for run in runs.values() if any(node.op_type in products for node in run)]


def _read_outside(graph: onnx.GraphProto, runs: list[list[NodeProto]]) -> set[str]:
    """Values that a node of another run, a node of none, or the caller reads."""
    run_of = {name: i for i, run in enumerate(runs) for node in run for name in node.output}
    member = {id(node): i for i, run in enumerate(runs) for node in run}
    outside = {o.name for o in graph.output}
    for node in graph.node:
        outside.update(name for name in node.input if run_of.get(name) != member.get(id(node), -1))
    return outside


def _in_order(nodes: list[NodeProto]) -> list[NodeProto]:
    """The nodes, each after those that it reads."""
    producers = {name: node for node in nodes for name in node.output}
    ordered: list[NodeProto] = []
    done: set[int] = set()
    stack = list(reversed(nodes))
    while stack:
        node = stack[-1]
        waiting = [p for name in node.input if (p := producers.get(name)) is not None and id(p) not in done]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        if id(node) not in done:
            done.add(id(node))
            ordered.append(node)
    return ordered


def _name(run: list[NodeProto]) -> str:
    """Of the run's last product, so that a profile counts it to that one's layer."""
    return next(node.name for node in reversed(run) if node.op_type in (_MATMUL, "MatMul"))


def _declare(graph: onnx.GraphProto, transposed: dict[str, str]) -> None:
    """Declare the transposed weights, and drop those that nothing reads any more."""
    by_name = {i.name: i for i in graph.initializer}
    for name, source in transposed.items():
        declared = graph.initializer.add()
        # ONNX Runtime wants to see data of this size, though it takes the caller's
        declared.CopyFrom(by_name[source])
        declared.name = name
        declared.dims[:] = reversed(by_name[source].dims)
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    kept = [i for i in graph.initializer if i.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _integer(node: NodeProto, name: str, default: int = 0) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)
