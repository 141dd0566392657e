"""What only a GPU can show of the standard operators' kernels: many blocks at once, and replays of a CUDA graph."""

import numpy as np
import pytest

from kimi_deploy.kernels.kda import KdaKernels
from kimi_deploy.kernels.library import KernelLibrary
from kimi_deploy.kernels.standard import StandardKernels

from .device import CudaDevice
from .standard_cases import (
    causal_conv_case,
    causal_conv_oracle,
    check_causal_conv,
    linear_attention_case,
    run_causal_conv,
    run_linear_attention,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cuda():
    return CudaDevice(KdaKernels(KernelLibrary.open(kind="cuda")))


@pytest.mark.parametrize("steps", [1, 200])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_full_chip_gives_what_one_row_gives(cuda, steps, in_place):
    arrays, attributes = linear_attention_case(
        batch=40, steps=steps, q_heads=32, kv_heads=32, key_dim=128, value_dim=128, dtype="bfloat16"
    )
    result = run_linear_attention(cuda, arrays, attributes, in_place=in_place)
    for n in (0, 17, 39):
        one = run_linear_attention(cuda, {k: a[n : n + 1] for k, a in arrays.items()}, attributes)
        for name, array in one.items():
            np.testing.assert_array_equal(result[name][n].view(np.uint8), array[0].view(np.uint8))


@pytest.mark.parametrize(("steps", "width"), [(1, 4), (4096, 4), (300, 1024)])
def test_a_wide_convolution(cuda, steps, width):
    arrays, attributes = causal_conv_case(channels=1000, steps=steps, width=width, dtype="bfloat16")
    expected = causal_conv_oracle(arrays, attributes)
    check_causal_conv(run_causal_conv(cuda, arrays, attributes, in_place=True), expected)


def test_a_replayed_graph_is_the_eager_run_over_many_steps(cuda):
    """Convolution, then attention, a step at a time, states in place: captured once, against called each time."""
    import torch

    kernels, steps = StandardKernels(cuda.kernels.library), 50
    attention, heads = linear_attention_case(
        batch=3, steps=steps, q_heads=4, kv_heads=4, key_dim=128, value_dim=64, dtype="float16"
    )
    conv, activation = causal_conv_case(batch=3, channels=4 * 64, steps=steps, dtype="float16")

    def on_device(arrays):
        return {name: cuda.upload(cuda.buffer(a.nbytes), np.ascontiguousarray(a)) for name, a in arrays.items()}

    def decode_all(prepare):
        attention_steps, conv_steps = on_device(attention), on_device(conv)
        conv_view = conv_steps | {"input": conv_steps["input"][:, :, :1].clone()}
        view = {n: a if n == "past_state" else a[:, :1].clone() for n, a in attention_steps.items()}
        conv_view |= {"present_state": conv_view["past_state"], "output": torch.empty_like(conv_view["input"])}
        view["value"] = conv_view["output"].view(3, 1, 4 * 64)
        view |= {"present_state": view["past_state"], "output": torch.empty_like(view["value"])}

        def step():
            stream = torch.cuda.current_stream().cuda_stream
            kernels.causal_conv(conv_view, activation, stream=stream)
            kernels.linear_attention(view, heads, stream=stream)

        replay = prepare(step, (conv_view["past_state"], view["past_state"]))
        outputs = []
        for t in range(steps):
            conv_view["input"].copy_(conv_steps["input"][:, :, t : t + 1])
            for name in ("query", "key", "decay", "beta"):
                view[name].copy_(attention_steps[name][:, t : t + 1])
            replay()
            outputs.append(view["output"].clone())
        torch.cuda.synchronize()
        return torch.stack(outputs), view["past_state"], conv_view["past_state"]

    def captured(step, states):
        kept = [s.clone() for s in states]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        torch.cuda.synchronize()
        # capture launches nothing, so that no state has moved
        for state, before in zip(states, kept, strict=True):
            assert torch.equal(state, before)
        return graph.replay

    for a, b in zip(decode_all(lambda step, states: step), decode_all(captured), strict=True):
        assert torch.equal(a, b)
