"""A plugin's fields between TensorRT and Python: read with nothing assumed, written as they are serialised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from kimi_deploy.errors import ContractError
from kimi_deploy.ops.plugins import PluginSpec
from kimi_deploy.ops.spec import AttributeType, AttributeValue

# what TensorRT's parser makes of an ONNX attribute of that type
_FIELD_TYPES: dict[AttributeType, str] = {"int": "INT32", "float": "FLOAT32", "string": "CHAR"}
_NUMPY = {"INT32": np.int32, "FLOAT32": np.float32, "CHAR": np.uint8}


def field_types(plugin: PluginSpec) -> dict[str, str]:
    """Name -> PluginFieldType name of every field of the plugin, in order."""
    return {f.name: _FIELD_TYPES[f.type] for f in plugin.fields}


def write_fields(module: Any, plugin: PluginSpec, values: Mapping[str, AttributeValue]) -> tuple[Any, list[np.ndarray]]:
    """PluginFieldCollection of `values`, in the plugin's order, and the arrays it points into: keep both alive.

    A value that is left out is left out of the collection.
    """
    fields, arrays = [], []
    for name, kind in field_types(plugin).items():
        if name not in values:
            continue
        value = values[name]
        content: Any = list(value.encode()) if isinstance(value, str) else [value]
        arrays.append(np.array(content, _NUMPY[kind]))
        fields.append(module.PluginField(name, arrays[-1], getattr(module.PluginFieldType, kind)))
    return module.PluginFieldCollection(fields), arrays


def read_fields(module: Any, plugin: PluginSpec, fields: Iterable[Any]) -> dict[str, AttributeValue]:
    """Every field of the plugin from a PluginFieldCollection, optional ones with their defaults.

    Raises ContractError for an unknown, missing, repeated or wrongly typed field, a value the op does not
    take, and the ABI of another version of the op.
    """
    types = field_types(plugin)
    values: dict[str, AttributeValue] = {}
    for item in fields:
        kind = types.get(item.name)
        if kind is None or item.name in values:
            raise ContractError(
                f"plugin {plugin.label}: field {item.name!r} is {'unknown' if kind is None else 'given twice'}",
                expected=f"exactly {list(types)}",
                fix="export the model again with this version of kimi-deploy",
            )
        if item.type != getattr(module.PluginFieldType, kind):
            raise ContractError(
                f"plugin {plugin.label}: field {item.name} has the wrong type", seen=str(item.type), expected=kind
            )
        values[item.name] = _value(kind, item.data)
    return plugin.complete(values)


def _value(kind: str, data: Any) -> AttributeValue:
    array = np.asarray(data)
    if kind == "CHAR":
        # some producers count the terminating zero, some do not
        return array.astype(np.uint8).tobytes().rstrip(b"\0").decode("utf-8", "replace")
    return int(array.reshape(-1)[0]) if kind == "INT32" else float(array.reshape(-1)[0])
