"""The library under test: emulated everywhere, and on a GPU with `pytest -m gpu`, through the same tests."""

import pytest

from kimi_deploy.kernels.kda import KdaKernels
from kimi_deploy.kernels.library import FILES, KernelLibrary

from .build import build
from .device import CudaDevice, EmulatedDevice


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
    return CudaDevice(KdaKernels(KernelLibrary.open(kind="cuda")))
