"""TensorRT plugins made from OpSpecs: fields, shapes, dtypes and aliases from the spec, the launch from an executor.

Name, version, namespace and fields are those of the C++ plugins (`plugins/tensorrt`), so that a plan that was built
with the ones runs with the others. A plugin has the op's name and version "1", and our ops' have the namespace `kimi`:
what TensorRT's ONNX parser looks for when a node `kimi::X` has plugin_namespace="kimi". enqueue runs the kernel
library, or torch where it is not built (`plugin_executors.py`); an engine can be built without either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kimi_deploy.engine.backend import Backend
from kimi_deploy.engine.plugin_call import Binding, Executor, PluginCall
from kimi_deploy.engine.plugin_fields import field_types, read_fields, write_fields
from kimi_deploy.errors import ContractError, EngineError, KimiDeployError
from kimi_deploy.ops.plugins import IN_PLACE_FIELD, WORKSPACE_BLOCK, WORKSPACE_FIELD, PluginSpec
from kimi_deploy.ops.spec import AttributeValue, OpSpec, Port

_T_DTYPES = ("FLOAT", "HALF", "BF16")
_FIXED_DTYPES = {"float32": "FLOAT", "int32": "INT32"}
_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32"}


class Dimension:
    """A TensorRT dimension expression that computes, for `OpSpec.output_shapes`."""

    def __init__(self, module: Any, builder: Any, expression: Any) -> None:
        self._module, self._builder, self.expression = module, builder, expression

    def _apply(self, operation: str, first: Any, second: Any) -> Dimension:
        operands = [x.expression if isinstance(x, Dimension) else self._builder.constant(x) for x in (first, second)]
        kind = getattr(self._module.DimensionOperation, operation)
        return Dimension(self._module, self._builder, self._builder.operation(kind, *operands))

    def __add__(self, other: Any) -> Dimension:
        return self._apply("SUM", self, other)

    def __radd__(self, other: Any) -> Dimension:
        return self._apply("SUM", other, self)

    def __sub__(self, other: Any) -> Dimension:
        return self._apply("SUB", self, other)

    def __rsub__(self, other: Any) -> Dimension:
        return self._apply("SUB", other, self)

    def __mul__(self, other: Any) -> Dimension:
        return self._apply("PROD", self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Dimension:
        return self._apply("FLOOR_DIV", self, other)


def ports_of(spec: OpSpec, num_inputs: int) -> list[Port]:
    """The input ports of a node with `num_inputs` inputs: only optional ones at the end may be absent.

    Raises ContractError for any other number.
    """
    ports = list(spec.inputs[:num_inputs])
    if num_inputs > len(spec.inputs) or any(not p.optional for p in spec.inputs[num_inputs:]):
        raise ContractError(
            f"plugin {spec.name}: wrong number of inputs",
            seen=str(num_inputs),
            expected=f"{[p.name for p in spec.inputs]}",
        )
    return ports


def creator_class(backend: Backend, plugin: PluginSpec) -> type[Any]:
    """The plugin creator class of an op for one backend's module.

    `creator_class(...)(executor=None)`: what runs the plugins, by default `plugin_executors.default_executor()`, asked
    for when it is first needed. A refusal is logged, kept in `refusals`, and given to TensorRT as None, which turns it
    into a parser error of that node.
    """
    trt = backend.module
    make = plugin_class(backend, plugin)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[name-defined]
        def __init__(self, executor: Executor | None = None) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = plugin.op.name
            self.plugin_version = plugin.version
            self.plugin_namespace = plugin.namespace
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField(name, b"", getattr(trt.PluginFieldType, kind))
                    for name, kind in field_types(plugin).items()
                ]
            )
            self.executor = executor
            self.refusals: list[KimiDeployError] = []

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            try:
                return make(read_fields(trt, plugin, fields), self._executor, self.refusals.append)
            except KimiDeployError as error:
                self.refusals.append(error)
                backend.logger.log(trt.ILogger.Severity.ERROR, f"{name or plugin.label}: {error}")
                return None

        def _executor(self) -> Executor:
            from kimi_deploy.engine.plugin_executors import default_executor

            return self.executor or default_executor()

    return Creator


def plugin_class(backend: Backend, plugin: PluginSpec) -> type[Any]:
    """The IPluginV3 class of an op for one backend's module."""
    trt, spec = backend.module, plugin.op
    build_interface = getattr(trt, "IPluginV3OneBuildV2", trt.IPluginV3OneBuild)
    output_names = [p.name for p in spec.outputs]
    input_names = [p.name for p in spec.inputs]
    aliased = {output_names.index(present): input_names.index(past) for past, present in spec.aliases}

    bases: Any = (trt.IPluginV3, trt.IPluginV3OneCore, build_interface, trt.IPluginV3OneRuntime)

    class Plugin(*bases):  # type: ignore[misc]
        def __init__(
            self,
            fields: Mapping[str, AttributeValue],
            executor: Callable[[], Executor],
            refuse: Callable[[KimiDeployError], None] | None = None,
        ) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name = spec.name
            self.plugin_version = plugin.version
            self.plugin_namespace = plugin.namespace
            self.num_outputs = len(spec.outputs)
            # the whole of its state: what is serialised
            self.fields = dict(fields)
            self._executor, self._refuse = executor, refuse

        @property
        def attributes(self) -> dict[str, AttributeValue]:
            return {a.name: self.fields[a.name] for a in spec.attributes}

        def get_capability_interface(self, type: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.fields, self._executor, self._refuse)

        def get_fields_to_serialize(self) -> Any:
            # TensorRT reads the values after this call returns
            self._serialized = write_fields(trt, plugin, self.fields)
            return self._serialized[0]

        def get_aliased_input(self, output_index: int) -> int:
            return aliased.get(output_index, -1) if self.fields.get(IN_PLACE_FIELD) == 1 else -1

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            ports = ports_of(spec, len(input_types))
            return [_dtype_of(trt, p, next(_model_types(p, ports, input_types), input_types[0])) for p in spec.outputs]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            symbols: dict[str, Any] = {k: v for k, v in self.attributes.items() if isinstance(v, int)}
            for port, dims in zip(ports_of(spec, len(inputs)), inputs, strict=True):
                for axis, symbol in enumerate(port.dims):
                    if symbol.isidentifier() and symbol not in symbols:
                        symbols[symbol] = Dimension(trt, builder, dims[axis])
            shapes = spec.output_shapes(symbols)
            return [
                trt.DimsExprs([d.expression if isinstance(d, Dimension) else builder.constant(d) for d in shape])
                for shape in shapes
            ]

        def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            ports = [*ports_of(spec, num_inputs), *spec.outputs]
            # entries after pos are not to be read
            descriptions = [d.desc for d in in_out[: pos + 1]]
            if descriptions[pos].format != trt.TensorFormat.LINEAR:
                return False
            kind, port = descriptions[pos].type, ports[pos]
            if port.dtype in _FIXED_DTYPES:
                return bool(kind == _dtype_of(trt, port, None))
            types = [d.type for d in descriptions]
            first = next(_model_types(port, ports[: min(num_inputs, pos + 1)], types), types[0])
            return bool(kind == first and kind in [getattr(trt.DataType, t) for t in _T_DTYPES])

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            # the last bound is the largest
            sizes = [self._workspace(inputs, bound) for bound in ("min", "opt", "max")]
            self.fields[WORKSPACE_FIELD] = -(-sizes[-1] // WORKSPACE_BLOCK)

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return -(-self._workspace(inputs, "max") // WORKSPACE_BLOCK) * WORKSPACE_BLOCK

        def _workspace(self, inputs: Sequence[Any], bound: str) -> int:
            """Bytes at the smallest, likeliest or largest shapes; a refusal is kept for whoever ordered the build."""
            bindings = [Binding(0, tuple(getattr(i, bound)), _NAMES[i.desc.type.name]) for i in inputs]
            try:
                return self._executor().workspace(self._call(bindings))
            except KimiDeployError as error:
                # TensorRT would end the process
                if self._refuse is None:
                    raise
                self._refuse(error)
                return 0

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            call = self._call([Binding(0, tuple(i.dims), _NAMES[i.type.name]) for i in inputs])
            needed = self._executor().workspace(call)
            if needed > call.workspace_size:
                raise EngineError(
                    f"plugin {plugin.label}: the engine keeps less workspace for this layer than what runs it needs",
                    seen=f"{call.workspace_size} bytes",
                    expected=f"{needed} bytes",
                    fix="build the engine again where the same kernel library is installed",
                )

        def _call(self, inputs: Sequence[Binding], **rest: Any) -> PluginCall:
            names = [p.name for p in ports_of(spec, len(inputs))]
            symbols = spec.bind(dict(zip(names, (b.shape for b in inputs), strict=True)), self.attributes)
            blocks = int(self.fields[WORKSPACE_FIELD])
            # no plan says it: everything there is
            size = blocks * WORKSPACE_BLOCK if blocks >= 0 else 2**63 - 1
            return PluginCall(plugin, self.fields, symbols, inputs, workspace_size=size, **rest)

        def set_tactic(self, tactic: int) -> None:
            pass

        def attach_to_context(self, resource_context: Any) -> Any:
            return self.clone()

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            for index in range(len(spec.outputs)):
                past = self.get_aliased_input(index)
                if past >= 0 and outputs[index] != inputs[past]:
                    raise EngineError(
                        f"plugin {plugin.label}: an output is not the memory of the input it was declared to be",
                        seen=f"{output_names[index]} and {input_names[past]} are two buffers",
                        fix="build the engine with preview feature ALIASED_PLUGIN_IO_10_03, or without in_place_state",
                    )
            read, written = (
                [Binding(p, tuple(d.dims), _NAMES[d.type.name]) for p, d in zip(pointers, descs, strict=True)]
                for pointers, descs in ((inputs, input_desc), (outputs, output_desc))
            )
            call = self._call(read, outputs=written, workspace=workspace, stream=stream)
            self._executor().enqueue(call)

    return Plugin


def _model_types(port: Port, inputs: Sequence[Port], types: Sequence[Any]) -> Iterator[Any]:
    """The types that decide about `port`: those of inputs of its kind; none where it has a type of its own."""
    return (t for t, p in zip(types, inputs, strict=False) if p.dtype == port.dtype)


def _dtype_of(trt: Any, port: Port, model: Any) -> Any:
    """A port's DataType, where `model` is that of its T or S."""
    fixed = _FIXED_DTYPES.get(port.dtype)
    return model if fixed is None else getattr(trt.DataType, fixed)
