"""`torch.ops.kimi.*` is the reference behind a checked schema: fakes, gradients, refusals, no aliases."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from kimi_deploy.errors import ContractError
from kimi_deploy.ops.registry import OPS
from kimi_deploy.ops.torch_ops import REFERENCES, overload
from tests.ops.quantized_cases import quantized_arrays, quantized_attributes
from tests.ops.torch_cases import (
    Attributes,
    Tensors,
    assert_close,
    in_dtype,
    in_float64,
    kda_attributes,
    kda_inputs,
    mla_attributes,
    mla_inputs,
    moe_attributes,
    moe_inputs,
    same_bits,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def case(
    op: str, *, lengths: bool = True, steps: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensors, Attributes]:
    """Inputs of two rows, the second a step short, and attributes."""
    valid = [steps, steps - 1] if lengths else None
    match op:
        case "KimiDeltaAttention":
            attributes = kda_attributes()
            tensors = kda_inputs(2, steps, attributes, lengths=valid)
        case "LatentAttention":
            attributes = mla_attributes()
            tensors = mla_inputs([0, 3], steps, steps + 4, lengths=valid)
        case "MixtureOfExperts":
            attributes = moe_attributes(8, 2, 4, 2)
            tensors = moe_inputs(2, steps, attributes)
        case _:
            attributes = quantized_attributes(experts=8, top_k=2, groups=4, kept=2)
            arrays = quantized_arrays(attributes, 2, steps)
            tensors = {n: torch.from_numpy(a.copy()) for n, a in arrays.items()}
    return in_dtype(op, tensors, dtype), attributes


def call(op: str, tensors: Tensors, attributes: Attributes) -> tuple[torch.Tensor, ...]:
    """The op's outputs, always as a tuple."""
    results = overload(op)(*(tensors.get(p.name) for p in OPS[op].inputs), **attributes)
    return results if isinstance(results, tuple) else (results,)


def reference(op: str, tensors: Tensors, attributes: Attributes) -> tuple[torch.Tensor, ...]:
    results = REFERENCES[op](**tensors, **attributes)
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, lengths: bool) -> None:
    tensors, attributes = case(op, lengths=lengths)
    leaves = {n: x.requires_grad_(x.is_floating_point()) for n, x in tensors.items()}
    arguments = tuple(leaves.get(p.name) for p in OPS[op].inputs)
    torch.library.opcheck(overload(op), arguments, attributes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_the_op_is_the_reference(op: str, lengths: bool, dtype: torch.dtype) -> None:
    for steps in (1, 20):
        tensors, attributes = case(op, lengths=lengths and steps > 1, steps=steps, dtype=dtype)
        for actual, expected in zip(call(op, tensors, attributes), reference(op, tensors, attributes), strict=True):
            assert same_bits(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_the_gradient_is_the_references(op: str) -> None:
    tensors, attributes = case(op, steps=20, dtype=torch.float64)
    found = []
    for function in (call, reference):
        leaves = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in tensors.items()}
        sum(x.sin().sum() for x in function(op, leaves, attributes)).backward()
        found.append({n: x.grad for n, x in leaves.items() if x.is_floating_point()})
    for name in found[0]:
        actual, expected = found[0][name], found[1][name]
        if name == "router_bias":  # moves a choice, which has no slope
            assert expected is None
            assert not actual.any()
        else:
            assert torch.equal(actual, expected), name
            assert actual.any(), name


@pytest.mark.parametrize("op", OPS)
def test_any_one_input_may_be_the_only_one_with_a_gradient(op: str) -> None:
    tensors, attributes = case(op, dtype=torch.float64)
    every = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in tensors.items()}
    call(op, every, attributes)[0].sum().backward()
    for name in (n for n, x in tensors.items() if x.is_floating_point()):
        leaf = tensors[name].clone().requires_grad_()
        call(op, tensors | {name: leaf}, attributes)[0].sum().backward()
        assert torch.equal(leaf.grad, every[name].grad), name


@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_is_refused(op: str) -> None:
    tensors, attributes = case(op, dtype=torch.float64)
    name = OPS[op].inputs[0].name
    leaf = tensors[name].requires_grad_()
    (gradient,) = torch.autograd.grad(call(op, tensors, attributes)[0].square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_no_output_aliases_an_input_and_no_input_is_written(op: str) -> None:
    for steps in (1, 20):
        tensors, attributes = case(op, steps=steps, lengths=steps > 1)
        before = {n: x.clone() for n, x in tensors.items()}
        outputs = call(op, tensors, attributes)
        memory = [x.untyped_storage().data_ptr() for x in (*tensors.values(), *outputs)]
        assert len(set(memory)) == len(memory)
        assert all(same_bits(tensors[n], before[n]) for n in tensors)


@pytest.mark.parametrize("op", OPS)
def test_strides_of_the_inputs_do_not_matter(op: str) -> None:
    tensors, attributes = case(op)
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in tensors.items()}
    assert any(not x.is_contiguous() for x in strided.values())
    for actual, expected in zip(call(op, strided, attributes), call(op, tensors, attributes), strict=True):
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_fakes_keep_batch_and_sequence_symbolic(op: str, dtype: torch.dtype) -> None:
    tensors, attributes = case(op, dtype=dtype)
    real = call(op, tensors, attributes)
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment) as mode:
        symbols: dict[str, torch.SymInt] = {}
        fakes = {}
        for port in OPS[op].inputs:
            if port.name not in tensors:
                continue
            shape = []
            for dim, size in zip(port.dims, tensors[port.name].shape, strict=True):
                if dim in ("batch", "sequence", "capacity") and dim not in symbols:
                    symbols[dim] = environment.create_unbacked_symint()
                shape.append(symbols.get(dim, size))
            fakes[port.name] = torch.empty(shape, dtype=tensors[port.name].dtype)
        assert mode is not None
        outputs = call(op, fakes, attributes)
    for port, fake, expected in zip(OPS[op].outputs, outputs, real, strict=True):
        assert fake.dtype == expected.dtype
        for dim, symbolic, size in zip(port.dims, fake.shape, expected.shape, strict=True):
            # the very symbol of the inputs: nothing was specialised and nothing was guessed
            assert str(symbolic) == str(symbols[dim]) if dim in symbols else symbolic == size


def refused(op: str, tensors: Tensors, attributes: Attributes, match: str) -> None:
    """By the real and by the fake implementation."""
    with pytest.raises(ContractError, match=match):
        call(op, tensors, attributes)
    with pytest.raises(ContractError, match=match):
        call(op, {n: x.to("meta") for n, x in tensors.items()}, attributes)


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_dtype_of_any_input_is_refused(op: str) -> None:
    tensors, attributes = case(op)
    first = OPS[op].inputs[0].name
    for port in OPS[op].inputs:
        if port.name in tensors:
            wrong = {"T": torch.float16, "float32": torch.bfloat16, "int32": torch.int64, "uint8": torch.int64}[
                port.dtype
            ]
            # the first input says what T is, so that another one is the first to differ
            name = port.name if port.name != first else r"\w+"
            refused(op, tensors | {port.name: tensors[port.name].to(wrong)}, attributes, f"{name} has the wrong dtype")
    integers = {n: x.to(torch.int32) for n, x in tensors.items()}
    refused(op, integers, attributes, f"{first} has the wrong dtype")


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_shape_of_any_input_is_refused(op: str) -> None:
    tensors, attributes = case(op)
    dims = [d for p in OPS[op].inputs for d in p.dims]
    for port in OPS[op].inputs:
        if port.name not in tensors:
            continue
        tensor = tensors[port.name]
        refused(op, tensors | {port.name: tensor[None]}, attributes, f"{port.name} has the wrong rank")
        for axis, dim in enumerate(port.dims):
            # a size that nothing else depends on may be any
            if dims.count(dim) == 1 and dim.isidentifier() and dim not in attributes:
                continue
            longer = torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
            refused(op, tensors | {port.name: longer}, attributes, "has the wrong size on axis")


@pytest.mark.parametrize("op", OPS)
def test_wrong_attributes_are_refused(op: str) -> None:
    tensors, attributes = case(op)
    for attribute in OPS[op].attributes:
        if attribute.choices:
            refused(op, tensors, attributes | {attribute.name: "other"}, f"attribute {attribute.name} is not valid")
        elif attribute.type == "int" and any(attribute.name in d for p in OPS[op].inputs for d in p.dims):
            refused(op, tensors, attributes | {attribute.name: attributes[attribute.name] + 1}, "wrong size")


@pytest.mark.parametrize("op", OPS)
def test_another_device_is_refused(op: str) -> None:
    tensors, attributes = case(op)
    last = [p.name for p in OPS[op].inputs if p.name in tensors][-1]
    with pytest.raises(ContractError, match=f"{last} is on another device"):
        # of two devices torch takes the implementation of the first that is not meta
        call(op, tensors | {last: tensors[last].to("meta")}, attributes)


@pytest.mark.parametrize("op", OPS)
def test_nothing_to_compute_is_refused(op: str) -> None:
    tensors, attributes = case(op)
    names = {p.name: p.dims for p in OPS[op].inputs if p.name in tensors}
    no_rows = {n: x[:0] if names[n][0] == "batch" else x for n, x in tensors.items()}
    no_steps = {n: x[:, :0] if names[n][1:2] == ("sequence",) else x for n, x in tensors.items()}
    for empty in (no_rows, no_steps):
        with pytest.raises(ContractError, match="nothing to compute"):
            call(op, empty, attributes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "float64"),
        (torch.float32, "float32"),
        (torch.float16, "op_float16"),
        (torch.bfloat16, "op_bfloat16"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_the_op_on_a_gpu_is_the_float64_op_on_the_cpu(op: str, dtype: torch.dtype, name: str) -> None:
    for steps in (1, 20, 130):
        tensors, attributes = case(op, steps=steps, lengths=steps > 1, dtype=dtype)
        if dtype == torch.float64:
            tensors = in_float64(tensors)
        outputs = call(op, {n: x.cuda() for n, x in tensors.items()}, attributes)
        for actual, expected in zip(outputs, call(op, in_float64(tensors), attributes), strict=True):
            assert actual.device.type == "cuda"
            assert_close(actual.cpu(), expected, name, f"{steps} steps")


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_the_gradient_on_a_gpu_is_the_one_on_the_cpu(op: str) -> None:
    tensors, attributes = case(op, steps=70, dtype=torch.float64)
    tensors = in_float64(tensors)
    found = []
    for device in ("cuda", "cpu"):
        leaves = {n: x.detach().to(device).requires_grad_(x.is_floating_point()) for n, x in tensors.items()}
        sum(x.sin().sum() for x in call(op, leaves, attributes)).backward()
        found.append({n: x.grad.cpu() for n, x in leaves.items() if x.is_floating_point()})
    for name, expected in found[1].items():
        assert_close(found[0][name], expected, "float64", name)
