"""Contract of QuantizedMixtureOfExperts: MixtureOfExperts whose experts' weights are stored in 4 or 8 bits."""

from kimi_deploy.ops.mixture_of_experts.spec import SPEC as FLOAT_SPEC
from kimi_deploy.ops.spec import Attribute, OpSpec, Port

_GATE_UP = ("num_experts", "2*intermediate")
_DOWN = ("num_experts", "hidden")
_LEVELS = "two 4-bit levels share a byte, the first in its low half"

SPEC = OpSpec(
    name="QuantizedMixtureOfExperts",
    doc="MixtureOfExperts with weights (level - zero point) * scale, scale and zero point each of block_size inputs "
    "of one row; 2^(bits - 1) stands for absent zero points. The router is not quantised. With int8 "
    "activations every input of a product is rounded by blocks as well: to the nearest of -127 .. 127 times the "
    "block's largest magnitude over 127, halves to even.",
    inputs=(
        *FLOAT_SPEC.inputs[:3],
        Port(
            "gate_up_levels", (*_GATE_UP, "hidden*bits//8"), "uint8", f"rows interleaved: gate 0, up 0, ...; {_LEVELS}"
        ),
        Port("gate_up_scales", (*_GATE_UP, "hidden//block_size"), "float32", "of each block of a row"),
        Port("down_levels", (*_DOWN, "intermediate*bits//8"), "uint8", f"output projections; {_LEVELS}"),
        Port("down_scales", (*_DOWN, "intermediate//block_size"), "float32", "of each block of a row"),
        Port(
            "gate_up_zero_points",
            (*_GATE_UP, "(hidden//block_size*bits+7)//8"),
            "uint8",
            "packed like the levels",
            optional=True,
        ),
        Port(
            "down_zero_points",
            (*_DOWN, "(intermediate//block_size*bits+7)//8"),
            "uint8",
            "packed like the levels",
            optional=True,
        ),
    ),
    outputs=FLOAT_SPEC.outputs,
    attributes=(
        *FLOAT_SPEC.attributes,
        Attribute("bits", "int", "4 or 8"),
        Attribute("block_size", "int", "inputs that share a scale; divides hidden and intermediate"),
        Attribute("symmetric", "int", "1: both zero points are absent, 0: both are given"),
        Attribute("activations", "string", "what a product reads", ("float32", "int8")),
    ),
)
