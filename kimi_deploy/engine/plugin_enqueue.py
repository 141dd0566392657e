"""Running a plugin by the project's torch op on the memory that TensorRT bound: where there is no kernel library."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from kimi_deploy.engine.plugin_call import Binding, PluginCall
from kimi_deploy.engine.plugin_memory import Device, tensor_at
from kimi_deploy.ops.torch_ops import overload


def run_op(call: PluginCall, device: Device) -> None:
    """Run torch.ops.kimi.<op> on the call's inputs and write its results to its outputs, in order on its CUDA stream.

    An output may be the memory of a state input: the op returns new tensors, which are copied out after it read its
    inputs.
    """
    name = call.plugin.op.name
    attributes = {a.name: call.fields[a.name] for a in call.plugin.op.attributes}
    with _on_stream(call.stream, device), torch.inference_mode():
        results = overload(name)(*(_tensor(b, device) for b in call.inputs), **attributes)
        results = results if isinstance(results, (tuple, list)) else (results,)
        for binding, result in zip(call.outputs, results, strict=True):
            _tensor(binding, device).copy_(result, non_blocking=True)


def _tensor(binding: Binding, device: Device) -> torch.Tensor:
    return tensor_at(binding.address, binding.shape, getattr(torch, binding.dtype), device)


def _on_stream(stream: int, device: Device) -> AbstractContextManager[object]:
    if device == "cpu":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream))
