"""The library of CPU kernels, built for the tests in a folder of its own: other tests run function bodies."""

from pathlib import Path

import pytest
import torch

from kimi_deploy.runtime.ort_kernels import FILE, OrtKernels
from tests.kernels.build import build

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def library_path() -> Path:
    return build("cpu-tests", "-DKIMI_CPU=ON", targets=("kimi_ort",)) / FILE


@pytest.fixture(scope="session")
def library(library_path: Path) -> OrtKernels:
    return OrtKernels.open(library_path)
