"""An export's graph, open to changes that shapes and names do not show."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from kimi_deploy.contract import METADATA_KEY, Dtype, GraphContract
from kimi_deploy.errors import ValidationError
from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx.bodies import set_bodies
from kimi_deploy.ops.flavours import Flavour
from kimi_deploy.ops.spec import DOMAIN, AttributeValue
from kimi_deploy.runtime.ort_runner import MODEL_NAME

Attribute = AttributeValue | list[int]


class Graph:
    """The graph of the export in `folder`, changed in memory; `save` writes it beside a copy of the weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.model = ir.load(folder / MODEL_NAME)
        self.contract = GraphContract.from_json(self.model.metadata_props[METADATA_KEY])
        self._names = 0

    @property
    def dtype(self) -> Dtype:
        """The model's dtype."""
        return self.contract.dtype

    def save(self, target: Path) -> None:
        """Write the changed export to the new folder `target`, with a manifest as if it had been exported like this."""
        target.mkdir()
        for name in self.manifest.files:
            if name == MODEL_NAME:
                continue
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            # not linked: ONNX's readers refuse weights that have a second name
            shutil.copyfile(self.folder / name, target / name)
        ir.save(self.model, target / MODEL_NAME)
        replace(self.manifest, reports={}).write(target)

    def layers(self, kind: str) -> list[int]:
        """Layers that have a state of `kind`."""
        return [s.layer for s in self.contract.states if s.kind == kind]

    def moe_layers(self) -> list[int]:
        """Layers with a mixture of experts."""
        found = [n for n in self.model.graph if (n.domain, n.op_type) == (DOMAIN, "MixtureOfExperts")]
        return [int(_name(n.inputs[1]).split(".")[2]) for n in found]

    def tensors_after(self, layer: int) -> tuple[str, ...]:
        """The states of the next layer, or else the logits: they are the first to show what `layer` puts out."""
        later = [s for s in self.contract.states if s.layer > layer]
        return tuple(f"{s.layer}.{s.kind}" for s in later if s.layer == later[0].layer) or ("logits",)

    def nodes(self, op: str) -> list[ir.Node]:
        """Every node of one of the custom ops. Raises ValidationError when there is none."""
        found = [n for n in self.model.graph if (n.domain, n.op_type) == (DOMAIN, op)]
        if not found:
            raise ValidationError(
                f"the graph has no {op}", seen=str(self.folder), fix="give an export with KDA, MLA and experts"
            )
        return found

    def mixer(self, layer: int) -> ir.Node:
        """The node that makes the states of `layer`."""
        state = next(s for s in self.contract.states if s.layer == layer)
        node = next(o for o in self.model.graph.outputs if o.name == state.present_name).producer()
        assert node is not None
        return node

    def weight(self, name: str) -> np.ndarray:
        """A copy of an initializer's values, to be changed and given to `set_weight`."""
        value = self.model.graph.initializers[name].const_value
        assert value is not None
        return np.array(value.numpy())

    def set_weight(self, name: str, value: np.ndarray) -> None:
        """Replace an initializer's values, inside the graph's file."""
        self.model.graph.initializers[name].const_value = ir.Tensor(value, name=name)

    def constant(self, value: Sequence[int] | int) -> ir.Value:
        """An int64 initializer."""
        self._names += 1
        name = f"fault.constant.{self._names}"
        tensor = ir.tensor(np.array(value, dtype=np.int64), name=name)
        result = ir.Value(
            name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
        )
        self.model.graph.register_initializer(result)
        return result

    def add(self, before: ir.Node | None, op: str, *inputs: ir.Value, **attributes: Attribute) -> ir.Value:
        """The output of a new standard node, put before another or at the end."""
        node = ir.node(op, list(inputs), attributes)
        self._names += 1
        node.outputs[0].name = f"fault.{self._names}"
        self._place(before, node)
        return node.outputs[0]

    def _place(self, before: ir.Node | None, node: ir.Node) -> None:
        if before is None:
            self.model.graph.append(node)
        else:
            self.model.graph.insert_before(before, node)

    def value(self, name: str) -> ir.Value:
        """A graph input by name."""
        return next(v for v in self.model.graph.inputs if v.name == name)

    def replace_output(self, name: str, make: Callable[[ir.Value], ir.Value]) -> None:
        """Let `make` compute the graph output `name` from what it was."""
        outputs = self.model.graph.outputs
        index = next(i for i, o in enumerate(outputs) if o.name == name)
        right = outputs[index]
        right.name = f"{name}.right"
        wrong = make(right)
        wrong.name, wrong.shape, wrong.type = name, right.shape, right.type
        outputs[index] = wrong

    def repeat(self, node: ir.Node, changes: dict[int, ir.Value]) -> ir.Node:
        """The same node once more at the end, with other inputs at some indices; its outputs have new names."""
        inputs = [changes.get(i, value) for i, value in enumerate(node.inputs)]
        again = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs))
        for output in again.outputs:
            self._names += 1
            output.name = f"fault.{self._names}"
        self.model.graph.append(again)
        return again

    def set_bodies(self, flavour: Flavour) -> None:
        """Exchange the bodies of all custom ops."""
        set_bodies(self.model, flavour, self.dtype)
        self.manifest = replace(self.manifest, details={**self.manifest.details, "body": flavour})

    def set_attribute(self, op: str, name: str, value: AttributeValue) -> None:
        """Change an attribute of every node of a custom op, and its body with it."""
        for node in self.nodes(op):
            node.attributes[name] = ir.convenience.convert_attribute(name, value)
        set_bodies(self.model, self.manifest.details["body"], self.dtype, [op])


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name is not None
    return value.name
