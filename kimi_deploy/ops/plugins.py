"""Which ops have a TensorRT plugin, and what identifies it: name, version, namespace, fields.

The C++ plugins (a generated header, `cpp_header.py`) and the Python ones (`engine/plugin.py`) both follow from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kimi_deploy.errors import ContractError
from kimi_deploy.ops.registry import OPS
from kimi_deploy.ops.spec import DOMAIN, DOMAIN_VERSION, Attribute, AttributeValue, OpSpec
from kimi_deploy.ops.standard import CAUSAL_CONV_WITH_STATE, LINEAR_ATTENTION, OptionalAttribute

ABI_FIELD = "abi"
IN_PLACE_FIELD = "in_place_state"
IN_PLACE = OptionalAttribute(
    IN_PLACE_FIELD,
    "int",
    "1: the engine's state outputs are its state inputs, one buffer for both; 0: two buffers",
    default=0,
)

WORKSPACE_FIELD = "workspace_blocks"
WORKSPACE_BLOCK = 256
"""Bytes of a block of workspace."""
WORKSPACE = OptionalAttribute(
    WORKSPACE_FIELD,
    "int",
    f"written into a plan: blocks of {WORKSPACE_BLOCK} bytes that TensorRT keeps for the layer; -1: not asked yet; "
    "kernels that need more are refused, not run over the end",
    default=-1,
)


@dataclass(frozen=True)
class PluginSpec:
    """The plugin of an op. `namespace` is TensorRT's; ops of our own domain also carry their ABI hash as a field."""

    op: OpSpec
    namespace: str
    version: str

    @property
    def abi(self) -> str | None:
        """The hash that a node must carry; None for ONNX's operators, whose contract is not ours to version."""
        return self.op.abi if self.namespace == DOMAIN else None

    @property
    def fields(self) -> tuple[Attribute, ...]:
        """Everything the plugin is made from and serialises, in order."""
        abi = (Attribute(ABI_FIELD, "string", "content hash of the op's contract"),) if self.abi else ()
        return (*self.op.attributes, *abi, *((IN_PLACE,) if self.op.aliases else ()), WORKSPACE)

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.namespace}::{self.op.name}" if self.namespace else self.op.name

    def complete(self, values: Mapping[str, AttributeValue]) -> dict[str, AttributeValue]:
        """`values` with the defaults of absent optional fields, in the order of `fields`, checked against the op.

        Raises ContractError for an unknown or missing field, a wrong type or value, and another ABI than this op's.
        """
        known = {f.name: f for f in self.fields}
        unknown = sorted(set(values) - set(known))
        required = [f.name for f in self.fields if not isinstance(f, OptionalAttribute)]
        missing = [n for n in required if n not in values]
        if unknown or missing:
            raise ContractError(
                f"plugin {self.label}: the fields do not match the op",
                seen="; ".join(
                    f"{what} {names}" for what, names in (("unknown", unknown), ("missing", missing)) if names
                ),
                expected=f"{required}, and at most {sorted(set(known) - set(required))}",
                fix="export the model again with this version of kimi-deploy",
            )
        if self.abi is not None and values[ABI_FIELD] != self.abi:
            raise ContractError(
                f"plugin {self.label}: the graph was exported for another ABI of the op than this plugin has",
                seen=f"graph: {values[ABI_FIELD]}",
                expected=f"plugin: {self.abi}",
                fix="export the model again with this version of kimi-deploy, or install the version that exported it",
            )
        full = {f.name: values.get(f.name, getattr(f, "default", "")) for f in self.fields}
        self.op.check_attributes({a.name: full[a.name] for a in self.op.attributes})
        if full.get(IN_PLACE_FIELD, 0) not in (0, 1):
            raise ContractError(
                f"plugin {self.label}: {IN_PLACE_FIELD} is not valid",
                seen=repr(full[IN_PLACE_FIELD]),
                expected="0 or 1",
                fix=IN_PLACE.doc,
            )
        return full


PLUGINS: dict[str, PluginSpec] = {
    spec.op.name: spec
    for spec in (
        PluginSpec(OPS["KimiDeltaAttention"], DOMAIN, str(DOMAIN_VERSION)),
        PluginSpec(OPS["MixtureOfExperts"], DOMAIN, str(DOMAIN_VERSION)),
        # what TensorRT-RTX's parser looks for: exactly these names, version "1", no namespace
        PluginSpec(LINEAR_ATTENTION, "", "1"),
        PluginSpec(CAUSAL_CONV_WITH_STATE, "", "1"),
    )
}
"""Every plugin, by op."""

PLUGIN_OPS: frozenset[str] = frozenset(name for name, plugin in PLUGINS.items() if plugin.namespace == DOMAIN)
"""The ops of our graphs that have a plugin; ONNX's own operators have one too, which our graphs do not need."""
