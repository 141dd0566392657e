"""A plugin's whole life, in the order in which TensorRT builds and runs an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod

import numpy as np

from kimi_deploy.ops.plugins import WORKSPACE_BLOCK, PluginSpec
from kimi_deploy.ops.spec import AttributeValue

from .host import HWC8, Host, Plugin, Tensor, numpy_dtype
from .memory import Buffer, Memory, contents

NAN = b"\xff"
"""Every float of these bytes is a NaN."""


def sample_fields(plugin: PluginSpec) -> dict[str, AttributeValue]:
    """Every field of a plugin, none of them its default."""
    samples: dict[str, AttributeValue] = {"int": 4, "float": 0.25, "string": plugin.abi or ""}
    fields = {f.name: f.choices[-1] if f.choices else samples[f.type] for f in plugin.fields}
    return fields | {name: 1 for name in ("in_place_state", "ndim") if name in fields}


def output_tensors(
    spec: PluginSpec, inputs: Sequence[Tensor], attributes: Mapping[str, AttributeValue]
) -> list[Tensor]:
    """What the spec says of the outputs."""
    ports = spec.op.inputs[: len(inputs)]
    full = spec.op.bind({p.name: t.shape for p, t in zip(ports, inputs, strict=True)}, attributes)
    model = {p.dtype: t.dtype for p, t in zip(ports, inputs, strict=True)}
    kinds = {"T": inputs[0].dtype, "S": model.get("S", inputs[0].dtype), "float32": "float32", "int32": "int32"}
    return [
        Tensor(shape, kinds[p.dtype]) for shape, p in zip(spec.op.output_shapes(full), spec.op.outputs, strict=True)
    ]


@dataclass
class Context:
    """A plugin attached to an execution context, with a workspace of its own."""

    plugin: Plugin
    spec: PluginSpec
    attributes: Mapping[str, AttributeValue]
    memory: Memory
    workspace: Buffer
    last_shapes: list[tuple[int, ...]] = field(default_factory=list)

    def run(self, inputs: Sequence[np.ndarray], *, in_place: bool = False) -> dict[str, np.ndarray]:
        """One enqueue on buffers of exactly the right sizes, outputs and workspace full of NaN before it.

        The workspace is used up to what these shapes need and no further; where steps are padded, in part.
        Inputs must come out as they went in; `in_place`: but for states, which are outputs too.
        """
        tensors = [Tensor.of(a) for a in inputs]
        made = output_tensors(self.spec, tensors, self.attributes)
        memory = self.memory
        read = [memory.allocate(a.nbytes) for a in inputs]
        for buffer, array in zip(read, inputs, strict=True):
            memory.write(buffer, array.tobytes())
        names = [p.name for p in self.spec.op.inputs]
        past = {names.index(a): b for a, b in self.spec.op.aliases} if in_place else {}
        of_output = {b: read[a] for a, b in past.items()}
        written = []
        for port, tensor in zip(self.spec.op.outputs, made, strict=True):
            size = prod(tensor.shape) * numpy_dtype(tensor.dtype).itemsize
            written.append(of_output.get(port.name) or memory.allocate(size))
            if port.name not in of_output:
                memory.write(written[-1], NAN * size)
        memory.write(self.workspace, NAN * self.workspace.size)
        lengths = dict(zip(names, inputs, strict=False)).get("sequence_lengths")
        padded = lengths is not None and bool((lengths < inputs[0].shape[1]).any())
        shapes = [t.shape for t in tensors]
        if shapes != self.last_shapes:
            assert self.plugin.shape_change(tensors, made), self.plugin.host.messages()
            self.last_shapes = shapes
        ok = self.plugin.enqueue(
            tensors,
            made,
            [b.address for b in read],
            [b.address for b in written],
            self.workspace.address,
            memory.stream(),
        )
        assert ok, self.plugin.host.messages()
        memory.synchronize()
        needed = self.plugin.workspace(tensors, made)
        used = np.flatnonzero(np.frombuffer(contents(memory, self.workspace), np.uint8) != NAN[0])
        assert used.size == 0 or used[-1] < needed, f"byte {used[-1]} was written of a workspace of {needed}"
        # all of it, so that scratch which a plugin has elsewhere, and contexts would share, shows in part too
        blocks = np.zeros(-(-needed // WORKSPACE_BLOCK), bool)
        blocks[used // WORKSPACE_BLOCK] = True
        assert blocks.all() or padded, f"unused of a workspace of {needed}: blocks {np.flatnonzero(~blocks)[:9]}"
        assert blocks.any() or needed == 0, "the workspace was not used"
        for index, (buffer, array) in enumerate(zip(read, inputs, strict=True)):
            assert index in past or contents(memory, buffer) == array.tobytes(), f"input {index} was written"
        return {
            port.name: np.frombuffer(contents(memory, b), numpy_dtype(t.dtype)).reshape(t.shape)
            for port, b, t in zip(self.spec.op.outputs, written, made, strict=True)
        }


def captured(context: Context, calls: Sequence[Sequence[np.ndarray]]) -> Iterator[dict[str, bytes]]:
    """Inputs of one shape through one recorded enqueue, replayed for each: the outputs' bytes by port."""
    import torch

    memory, spec, host = context.memory, context.spec, context.plugin.host
    tensors = [Tensor.of(a) for a in calls[0]]
    made = output_tensors(spec, tensors, context.attributes)
    read = [memory.allocate(a.nbytes) for a in calls[0]]
    written = [memory.allocate(prod(t.shape) * numpy_dtype(t.dtype).itemsize) for t in made]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        assert context.plugin.enqueue(
            tensors,
            made,
            [b.address for b in read],
            [b.address for b in written],
            context.workspace.address,
            torch.cuda.current_stream().cuda_stream,
        ), host.messages()
    for inputs in calls:
        for buffer, array in zip(read, inputs, strict=True):
            memory.write(buffer, array.tobytes())
        graph.replay()
        yield {p.name: contents(memory, b) for p, b in zip(spec.op.outputs, written, strict=True)}


@contextmanager
def built(
    host: Host,
    memory: Memory,
    spec: PluginSpec,
    fields: Mapping[str, AttributeValue],
    inputs: Sequence[Tensor],
    *,
    contexts: int = 1,
) -> Iterator[list[Context]]:
    """Build phase, plan and runtime of a plugin for the profile of `inputs`: what is left are attached contexts.

    On the way everything that TensorRT asks is checked against the spec; each object goes once the next is made.
    """
    full = spec.complete(fields)
    attributes = {a.name: full[a.name] for a in spec.op.attributes}
    outputs = output_tensors(spec, inputs, attributes)
    with host.plugin(spec.op.name, list(fields.items())) as first:
        assert first is not None, host.messages()
        assert first.identity == f"{spec.op.name} {spec.version} {spec.namespace}"
        assert first.output_types([t.dtype for t in inputs]) == [t.dtype for t in outputs]
        assert first.output_shapes(inputs) == [t.shape for t in outputs]
        for position in range(len(inputs) + len(outputs)):
            assert first.supports(position, inputs, outputs), position
            every = [*inputs, *outputs]
            tensor = every[position]
            every[position] = Tensor(tensor.shape, tensor.dtype, format=HWC8)
            assert not first.supports(position, every[: len(inputs)], every[len(inputs) :]), position
        with first.clone() as clone:
            assert clone.configure(inputs, outputs), host.messages()
            size = clone.workspace(inputs, outputs)
            serialized = clone.serialize()
    assert host.messages() == ""
    with ExitStack() as stack:
        with host.plugin_from(spec.op.name, serialized) as read:
            assert read is not None, host.messages()
            assert read.serialize() == serialized
            attached = [stack.enter_context(read.attach()) for _ in range(contexts)]
        yield [Context(p, spec, attributes, memory, memory.allocate(size)) for p in attached]
    assert host.messages() == ""
