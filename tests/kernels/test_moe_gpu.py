"""What only a GPU can show of the MixtureOfExperts kernels: layers of full size, and replays of a CUDA graph."""

import pytest

from kimi_deploy.kernels.kda import KdaKernels
from kimi_deploy.kernels.library import KernelLibrary
from kimi_deploy.kernels.moe import MoeKernels

from .device import CudaDevice
from .moe_cases import check_moe, moe_case, run_moe

pytestmark = pytest.mark.gpu

LAYER_OF_48B = {"hidden": 2304, "inner": 1024, "experts": 256, "top_k": 8}


@pytest.fixture(scope="module")
def cuda():
    return CudaDevice(KdaKernels(KernelLibrary.open(kind="cuda")))


@pytest.mark.parametrize("steps", [1, 8, 9, 300])
def test_a_layer_of_full_width(cuda, steps):
    """64 of its experts: the reference is float64 on the CPU."""
    arrays, attributes = moe_case(steps=steps, dtype="bfloat16", **LAYER_OF_48B | {"experts": 64})
    check_moe(run_moe(cuda, arrays, attributes), arrays, attributes)


def test_a_token_does_not_depend_on_the_others(cuda):
    """Bit for bit, in a chip full of tiles."""
    arrays, attributes = moe_case(steps=2048, hidden=512, inner=256, experts=64, top_k=8, dtype="float16")
    whole = run_moe(cuda, arrays, attributes)
    for start in (0, 1000, 2000):
        part = arrays | {"hidden_states": arrays["hidden_states"][:, start : start + 40]}
        assert run_moe(cuda, part, attributes).tobytes() == whole[:, start : start + 40].tobytes()


@pytest.mark.parametrize("steps", [1, 100])
def test_a_replayed_graph_reads_what_is_there_by_then(cuda, steps):
    import torch

    arrays, attributes = moe_case(steps=steps, hidden=256, inner=128, experts=32, top_k=4, dtype="float16")
    views = {name: cuda.upload(cuda.buffer(a.nbytes), a) for name, a in arrays.items()}
    views["output"] = torch.empty_like(views["hidden_states"])
    kernels = MoeKernels(cuda.kernels.library)
    workspace = torch.full((kernels.workspace_size(views, attributes),), 0xFF, dtype=torch.uint8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        kernels.run(views, attributes, workspace=workspace, stream=stream)
    for seed in (1, 2):
        other, _ = moe_case(steps=steps, hidden=256, inner=128, experts=32, top_k=4, dtype="float16", seed=seed)
        views["hidden_states"].copy_(torch.from_numpy(other["hidden_states"]))
        graph.replay()
        torch.cuda.synchronize()
        given = arrays | {"hidden_states": other["hidden_states"]}
        assert views["output"].cpu().numpy().tobytes() == run_moe(cuda, given, attributes).tobytes()
