"""What every test runs on: Triton's interpreter where there is no GPU, function bodies on ONNX Runtime."""

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this once, when it is first imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def no_built_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Function bodies run unless a test asks for a library of kernels, whether or not one was built here."""
    with pytest.MonkeyPatch.context() as patch:
        missing = tmp_path_factory.mktemp("kernels") / "none.so"
        patch.setattr("kimi_deploy.runtime.ort_kernels.default_path", lambda: missing)
        yield
