"""The standard operators' specs say what onnx's own schemas say."""

import pytest
from onnx import defs, helper

from kimi_deploy.ops.spec import OpSpec
from kimi_deploy.ops.standard import STANDARD_OPS, OptionalAttribute

NOT_ONNX = {"ndim"}


@pytest.mark.parametrize("spec", STANDARD_OPS.values(), ids=STANDARD_OPS)
def test_ports_attributes_and_defaults_are_those_of_the_schema(spec: OpSpec) -> None:
    schema = defs.get_schema(spec.name, 27, "")
    optional = defs.OpSchema.FormalParameterOption.Optional
    for ports, parameters in ((spec.inputs, schema.inputs), (spec.outputs, schema.outputs)):
        assert [(p.name, p.dtype, p.optional) for p in ports] == [
            (p.name, p.type_str, p.option == optional) for p in parameters
        ]
    ours = {a.name: a for a in spec.attributes if a.name not in NOT_ONNX}
    assert set(ours) == set(schema.attributes)
    for name, attribute in schema.attributes.items():
        assert ours[name].type.upper() == attribute.type.name
        assert isinstance(ours[name], OptionalAttribute) != attribute.required
        if not attribute.required:
            value = helper.get_attribute_value(attribute.default_value)
            assert ours[name].default == (value.decode() if isinstance(value, bytes) else value)
