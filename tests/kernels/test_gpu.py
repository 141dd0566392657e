"""What only a GPU can show: long runs, many blocks at once, and replays of a CUDA graph."""

import numpy as np
import pytest

from kimi_deploy.kernels.kda import arguments_of

from .cases import GATES, check, make_case, oracle
from .device import run_kernel
from .implementations import to_torch, triton

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("distribution", ["plain", "slow", "repeated"])
@pytest.mark.parametrize("steps", [500, 4096])
def test_long_prefill(cuda, steps, distribution, gate):
    arrays, attributes = make_case(steps=steps, dim=128, heads=2, gate=gate, distribution=distribution)
    bound = "kda_prefill_bfloat16" if distribution == "plain" else "kda_prefill_correlated"
    check(run_kernel(cuda, "prefill", arrays, attributes), oracle(arrays, attributes), bound)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_a_full_chip_gives_what_one_row_gives(cuda, mode):
    steps = 1 if mode == "decode" else 200
    arrays, attributes = make_case(batch=40, steps=steps, dim=128, heads=32)
    result = run_kernel(cuda, mode, arrays, attributes, in_place=True)
    for n in (0, 17, 39):
        of_row = {k: a[n : n + 1] if a.shape[0] == 40 else a for k, a in arrays.items()}
        one = run_kernel(cuda, mode, of_row, attributes)
        for name, array in one.items():
            np.testing.assert_array_equal(result[name][n].view(np.uint8), array[0].view(np.uint8))


def test_a_replayed_graph_is_the_eager_run_over_many_steps(cuda):
    """Decode on fixed buffers, in place, 50 steps: captured once and replayed, against called each time."""
    import torch

    arrays, attributes = make_case(batch=3, steps=50, dim=128, heads=4)
    of_steps = ("qkv", "decay", "beta", "output_gate")

    def decode_all(run_step):
        views = {}
        for name, array in arrays.items():
            part = array[:, :1] if name in of_steps else array
            views[name] = cuda.upload(cuda.buffer(part.nbytes), np.ascontiguousarray(part))
        steps = {name: cuda.upload(cuda.buffer(arrays[name].nbytes), arrays[name]) for name in of_steps}
        views["output"] = torch.full_like(views["decay"], float("nan"))
        views |= {s.replace("past", "present"): views[s] for s in ("past_conv_state", "past_recurrent_state")}
        step = run_step(views)
        outputs = []
        for t in range(50):
            for name in of_steps:
                views[name].copy_(steps[name][:, t : t + 1])
            step()
            outputs.append(views["output"].clone())
        torch.cuda.synchronize()
        return torch.stack(outputs), views["past_recurrent_state"].clone(), views["past_conv_state"].clone()

    def eager(views):
        arguments = arguments_of(views, attributes, stream=torch.cuda.current_stream().cuda_stream)
        return lambda: cuda.kernels.library.decode(arguments)

    def captured(views):
        kept = {name: view.clone() for name, view in views.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stream = torch.cuda.current_stream().cuda_stream
            cuda.kernels.library.decode(arguments_of(views, attributes, stream=stream))
        for name, view in views.items():
            view.copy_(kept[name])
        return graph.replay

    for a, b in zip(decode_all(eager), decode_all(captured), strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("kind", ["triton decode", "triton prefill", "cuda prefill"])
def test_replays_of_a_graph_move_the_states_as_calls_do(request, kind):
    """Eight calls in place, and eight replays of one captured call: the same bits, the state advanced as often."""
    import torch

    name, mode = kind.split()
    arrays, attributes = make_case(batch=2, steps=1 if mode == "decode" else 40, dim=128, heads=2)
    tensors = {key: x.cuda() for key, x in to_torch(arrays).items()}
    states = [tensors["past_conv_state"], tensors["past_recurrent_state"]]
    present = {"present_conv_state": states[0], "present_recurrent_state": states[1]}
    if name == "triton":

        def call():
            return triton(**tensors, **attributes, **present)[0]
    else:
        kernels = request.getfixturevalue("cuda").kernels
        views = tensors | present | {"output": torch.full_like(tensors["decay"], float("nan"))}
        size = kernels.workspace_size(views, attributes)
        workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")

        def call():
            stream = torch.cuda.current_stream().cuda_stream
            kernels.prefill(views, attributes, workspace=workspace, stream=stream)
            return views["output"]

    kept = [x.clone() for x in states]

    def eight(step):
        for x, original in zip(states, kept, strict=True):
            x.copy_(original)
        for _ in range(8):
            output = step()
        torch.cuda.synchronize()
        return [x.clone().view(torch.uint8) for x in (output, *states)]

    expected = eight(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()

    def replay():
        graph.replay()
        return captured

    for a, b in zip(eight(replay), expected, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(states[1], kept[1])
