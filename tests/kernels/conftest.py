"""The library under test: emulated everywhere, and on a GPU with `pytest -m gpu`, through the same tests."""

import pytest

from kimi_deploy.kernels.kda import KdaKernels
from kimi_deploy.kernels.library import FILES, KernelLibrary

from ..capabilities import interprets_triton
from .build import build
from .device import CudaDevice, EmulatedDevice
from .implementations import Cuda, Reference, Triton


@pytest.fixture(scope="session")
def emulated_library():
    folder = build("kernels-emulated", "-DKIMI_CUDA=OFF", targets=("kimi_kernels_emulated",))
    return KernelLibrary.open(folder / FILES["emulated"])


@pytest.fixture(scope="session")
def emulated(emulated_library):
    return EmulatedDevice(KdaKernels(emulated_library))


@pytest.fixture(scope="session", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return request.getfixturevalue("cuda")


@pytest.fixture(scope="session")
def cuda():
    return CudaDevice(KdaKernels(KernelLibrary.open(kind="cuda")))


@pytest.fixture(
    scope="session",
    params=[
        "recurrent",
        "chunkwise",
        pytest.param("triton-interpreted", marks=interprets_triton),
        "prefill-emulated",
        "decode-emulated",
        *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton-cuda", "prefill-cuda", "decode-cuda")),
    ],
)
def implementation(request):
    """Every implementation in turn; the tests of `test_matrix.py` know no other difference between them."""
    form, _, where = request.param.partition("-")
    if not where:
        return Reference(form, form=form)
    if form == "triton":
        return Triton(request.param, device="cuda" if where == "cuda" else "cpu")
    dtypes = ("float16", "bfloat16") if form == "prefill" else ("float32", "float16", "bfloat16")
    return Cuda(request.param, dtypes, device=request.getfixturevalue(where), mode=form)
