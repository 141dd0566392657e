"""enqueue on device memory and on a stream of its own: what the host cannot show."""

from __future__ import annotations

import pytest
import torch

from kimi_deploy.engine.plugin_call import Binding, PluginCall
from kimi_deploy.engine.plugin_enqueue import run_op
from kimi_deploy.ops.plugins import PLUGINS
from kimi_deploy.ops.torch_ops import overload
from tests.ops.torch_cases import assert_close, kda_attributes, kda_inputs

pytestmark = pytest.mark.gpu

PLUGIN = PLUGINS["KimiDeltaAttention"]
SPEC = PLUGIN.op
ATTRIBUTES = kda_attributes(4, 32, "bounded")


def bindings(tensors: list[torch.Tensor]) -> list[Binding]:
    return [Binding(t.data_ptr(), tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors]


def run(inputs: list[torch.Tensor], outputs: list[torch.Tensor], stream: torch.cuda.Stream) -> None:
    call = PluginCall(PLUGIN, ATTRIBUTES, {}, bindings(inputs), bindings(outputs), stream=stream.cuda_stream)
    run_op(call, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_enqueue_on_a_stream_gives_what_the_op_gives(dtype: torch.dtype) -> None:
    kinds = {"T": dtype, "float32": torch.float32, "int32": torch.int32}
    case = kda_inputs(3, 40, ATTRIBUTES, lengths=[40, 17, 0])
    inputs = [t.to("cuda", kinds[SPEC.input(name).dtype]).contiguous() for name, t in case.items()]
    expected = overload(SPEC.name)(*inputs, **ATTRIBUTES)
    outputs = [torch.full_like(e, float("nan")) for e in expected]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    run(inputs, outputs, stream)
    stream.synchronize()
    for port, seen, wanted in zip(SPEC.outputs, outputs, expected, strict=True):
        assert_close(seen.cpu(), wanted.cpu(), "float32", port.name)
    # states written over their inputs
    aliased = [torch.full_like(expected[0], float("nan")), inputs[8], inputs[9]]
    run(inputs, aliased, stream)
    stream.synchronize()
    for seen, wanted in zip(aliased, outputs, strict=True):
        assert torch.equal(seen, wanted)
