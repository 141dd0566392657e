"""The timed calls of the standard operators are calls that the kernels take, with the bytes they are said to move."""

import pytest
import torch

from kimi_deploy.bench.kernels.standard import StandardCase, cases, measure, num_bytes
from kimi_deploy.errors import BackendError
from kimi_deploy.kernels.library import FILES, KernelLibrary
from kimi_deploy.kernels.standard import StandardKernels
from tests.capabilities import needs_no_cuda
from tests.kernels.build import build


@pytest.fixture(scope="module")
def kernels() -> StandardKernels:
    folder = build("kernels-emulated", "-DKIMI_CUDA=OFF", targets=("kimi_kernels_emulated",))
    return StandardKernels(KernelLibrary.open(folder / FILES["emulated"]))


@pytest.mark.parametrize("op", sorted({case.op for case in cases()}))
def test_a_case_is_a_call_that_the_kernels_take(kernels: StandardKernels, op: str) -> None:
    case = next(c for c in cases() if c.op == op)
    torch.manual_seed(0)
    arrays = case.arrays("cpu")
    arrays["output"].fill_(torch.nan)
    before = arrays["past_state"].clone()
    case.call(kernels, arrays)
    assert arrays["output"].isfinite().all()
    assert not torch.equal(arrays["present_state"], before)


def test_bytes_count_the_state_twice_and_everything_else_once() -> None:
    arrays = StandardCase("LinearAttention", 1, 1).arrays("cpu")
    state = 2 * 32 * 128 * 128 * 4
    assert num_bytes(arrays) == state + 2 * (2 * 16 * 128 + 2 * 32 * 128 + 2 * 32)


@needs_no_cuda
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(BackendError, match="CUDA device"):
        measure()
