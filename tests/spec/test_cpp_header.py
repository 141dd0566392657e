"""plugins/generated/kimi_ops.h is what the specs say, and its dimension programs compute what the specs compute."""

from pathlib import Path

import pytest

from kimi_deploy.errors import ContractError
from kimi_deploy.ops.cpp_header import header, ort_header, postfix, symbols_of
from kimi_deploy.ops.plugins import PLUGINS, PluginSpec
from kimi_deploy.ops.registry import OPS
from kimi_deploy.ops.spec import OpSpec, evaluate_dim

GENERATED = Path(__file__).parents[2] / "plugins" / "generated"
OPERATIONS = {
    "kAdd": lambda a, b: a + b,
    "kSubtract": lambda a, b: a - b,
    "kMultiply": lambda a, b: a * b,
    "kDivide": lambda a, b: a // b,
    "kMax": max,
}


@pytest.mark.parametrize(
    ("name", "argument", "text"), [("kimi_ops.h", "", header()), ("kimi_ort_ops.h", " ort", ort_header())]
)
def test_the_header_is_current(name: str, argument: str, text: str) -> None:
    command = f"python -m kimi_deploy.ops.cpp_header{argument} > {GENERATED / name}"
    assert (GENERATED / name).read_text(encoding="utf-8") == text, f"run {command}"


SPECS = {plugin.op.name: plugin.op for plugin in PLUGINS.values()} | OPS


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_dimension_program_computes_the_dimension(spec: OpSpec) -> None:
    symbols = symbols_of(spec)
    sizes = {name: 3 + 7 * i for i, name in enumerate(symbols)}
    for port in (*spec.inputs, *spec.outputs):
        for dim in port.dims:
            stack: list[int] = []
            for kind, value in postfix(dim, symbols):
                if kind in ("kConstant", "kSymbol"):
                    stack.append(value if kind == "kConstant" else sizes[symbols[value]])
                else:
                    second, first = stack.pop(), stack.pop()
                    stack.append(OPERATIONS[kind](first, second))
            assert stack == [evaluate_dim(dim, sizes)], dim


def test_a_dimension_without_a_c_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="no C\\+\\+ form"):
        postfix("2 ** sequence", ["sequence"])


@pytest.mark.parametrize("plugin", PLUGINS.values(), ids=PLUGINS)
def test_absent_optional_fields_get_the_schemas_defaults_and_others_are_refused(plugin: PluginSpec) -> None:
    samples = {"int": 2, "float": 0.5, "string": plugin.abi}
    required = {
        f.name: f.choices[0] if f.choices else samples[f.type] for f in plugin.fields if not hasattr(f, "default")
    }
    full = plugin.complete(required)
    assert list(full) == [f.name for f in plugin.fields]
    assert {f.name: full[f.name] for f in plugin.fields if hasattr(f, "default")} == {
        f.name: f.default for f in plugin.fields if hasattr(f, "default")
    }
    with pytest.raises(ContractError, match="unknown"):
        plugin.complete(required | {"threads": 1})
    for name in required:
        with pytest.raises(ContractError, match=f"missing.*{name}"):
            plugin.complete({k: v for k, v in required.items() if k != name})
