"""`torch.ops.kimi.*`, made from the OpSpecs: schema, fake kernel, checks, reference implementation, gradient.

Importing this module registers the ops, once in a process. The reference runs on any device, except
where `ON_CUDA` names a faster implementation for CUDA tensors. The gradient recomputes the reference's forward pass, so
that nothing between its inputs and outputs is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from kimi_deploy.errors import ContractError
from kimi_deploy.ops.kimi_delta_attention import cuda
from kimi_deploy.ops.kimi_delta_attention.reference import kimi_delta_attention
from kimi_deploy.ops.latent_attention.reference import latent_attention
from kimi_deploy.ops.mixture_of_experts.reference import mixture_of_experts
from kimi_deploy.ops.quantized_mixture_of_experts.reference import quantized_mixture_of_experts
from kimi_deploy.ops.registry import OPS
from kimi_deploy.ops.spec import DOMAIN, OpSpec

REFERENCES: dict[str, Callable[..., Any]] = {
    "KimiDeltaAttention": kimi_delta_attention,
    "LatentAttention": latent_attention,
    "MixtureOfExperts": mixture_of_experts,
    "QuantizedMixtureOfExperts": quantized_mixture_of_experts,
}
ON_CUDA: dict[str, Callable[..., Any]] = {"KimiDeltaAttention": cuda.kimi_delta_attention}

# float64 is for oracles and gradient checks; no exported graph has it
T_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_library = torch.library.Library(DOMAIN, "DEF")


def register() -> None:
    """Nothing: the ops are registered once this module is imported. For callers that import it only for that."""


def overload(name: str) -> torch._ops.OpOverload:
    """The torch op of the ONNX op `name`."""
    result: torch._ops.OpOverload = getattr(torch.ops.kimi, OPS[name].torch_name).default
    return result


def _named(spec: OpSpec, tensors: Sequence[torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    return dict(zip((p.name for p in spec.inputs), tensors, strict=False))


def _check(spec: OpSpec, tensors: Mapping[str, torch.Tensor | None], attributes: Mapping[str, Any]) -> dict[str, int]:
    """Everything the contract asks of a call; returns the bound symbols."""
    spec.check_attributes(attributes)
    first = tensors[spec.inputs[0].name]
    assert first is not None
    for port in spec.inputs:
        tensor = tensors.get(port.name)
        if tensor is None:
            continue
        if port.dtype == "T":
            allowed: tuple[torch.dtype, ...] = (first.dtype,) if first.dtype in T_DTYPES else T_DTYPES
        elif port.dtype == "float32" and first.dtype == torch.float64:
            allowed = (torch.float32, torch.float64)
        else:
            allowed = (getattr(torch, port.dtype),)
        if tensor.dtype not in allowed:
            raise ContractError(
                f"{spec.name}: input {port.name} has the wrong dtype",
                seen=str(tensor.dtype),
                expected=" or ".join(map(str, allowed)),
            )
        if tensor.device != first.device:
            raise ContractError(
                f"{spec.name}: input {port.name} is on another device",
                seen=str(tensor.device),
                expected=str(first.device),
            )
    shapes = {name: tensor.shape for name, tensor in tensors.items() if tensor is not None}
    return spec.bind(shapes, attributes)


def _register(spec: OpSpec) -> None:
    qualified = f"{DOMAIN}::{spec.torch_name}"
    by_output = {present: past for past, present in spec.aliases}
    _library.define(spec.torch_schema)

    def run(compute: Callable[..., Any], *tensors: torch.Tensor | None, **attributes: Any) -> Any:
        symbols = _check(spec, _named(spec, tensors), attributes)
        if not symbols["batch"] * symbols["sequence"]:
            raise ContractError(
                f"{spec.name}: nothing to compute",
                seen=f"batch {symbols['batch']}, sequence {symbols['sequence']}",
                expected="at least one row and one step",
            )
        outputs = compute(*tensors, **attributes)
        # as the fake kernel says, whatever the strides of the inputs
        return tuple(x.contiguous() for x in outputs) if isinstance(outputs, tuple) else outputs.contiguous()

    def fake(*tensors: torch.Tensor | None, **attributes: Any) -> Any:
        named = _named(spec, tensors)
        symbols = _check(spec, named, attributes)
        first = named[spec.inputs[0].name]
        assert first is not None
        outputs = []
        for port, shape in zip(spec.outputs, spec.output_shapes(symbols), strict=True):
            state = named.get(by_output.get(port.name, ""))
            outputs.append(first.new_empty(shape, dtype=first.dtype if state is None else state.dtype))
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def setup_context(
        ctx: Any, inputs: tuple[torch.Tensor | None, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        ctx.save_for_backward(*inputs)
        ctx.attributes = keyword_only_inputs

    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad)
        # an absent last input may be left out of one and not of the other
        inputs = list(ctx.saved_tensors)[: len(wanted)]
        found = iter(gradient_op(inputs, list(gradients), wanted, **ctx.attributes))
        return tuple(next(found) if w else None for w in wanted)

    implementations = {"cpu": REFERENCES, "cuda": REFERENCES | ON_CUDA}
    for device, chosen in implementations.items():
        torch.library.impl(qualified, device, lib=_library)(partial(run, chosen[spec.name]))
    torch.library.register_fake(qualified, fake, lib=_library)
    gradient_op = _register_gradient(spec)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)


def _register_gradient(spec: OpSpec) -> Callable[..., list[torch.Tensor]]:
    """The op's gradient as an op of its own, so that a compiler traces it without looking inside.

    From inputs, the outputs' gradients and which inputs' gradients are wanted; returns those, in order.
    """
    reference = REFERENCES[spec.name]
    name = f"{spec.torch_name}_backward"
    attributes_schema = spec.torch_schema.split("*, ")[1].split(")")[0]
    _library.define(f"{name}(Tensor?[] inputs, Tensor?[] gradients, bool[] wanted, *, {attributes_schema}) -> Tensor[]")

    def implementation(
        inputs: list[Any], gradients: list[torch.Tensor | None], wanted: list[bool], **attributes: Any
    ) -> list[torch.Tensor]:
        inputs = [x if x is None else x.detach() for x in inputs]
        with torch.enable_grad():
            leaves = [x.requires_grad_() for x, w in zip(inputs, wanted, strict=True) if w]
            outputs = reference(*inputs, **attributes)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            used = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        if not used:  # the router bias alone reaches no output
            return [torch.zeros_like(x) for x in leaves]
        found = torch.autograd.grad(
            [o for o, _ in used], leaves, [g for _, g in used], allow_unused=True, materialize_grads=True
        )
        return [x.contiguous() for x in found]

    def fake(inputs: list[Any], gradients: list[Any], wanted: list[bool], **attributes: Any) -> list[torch.Tensor]:
        return [x.new_empty(x.shape) for x, w in zip(inputs, wanted, strict=True) if w]

    for device in ("cpu", "cuda"):
        torch.library.impl(f"{DOMAIN}::{name}", device, lib=_library)(implementation)
    torch.library.register_fake(f"{DOMAIN}::{name}", fake, lib=_library)
    result: Callable[..., list[torch.Tensor]] = getattr(torch.ops.kimi, name)
    return result


for _spec in OPS.values():
    _register(_spec)
