"""The plugin library under test, driven by the host: emulated kernels everywhere, device memory with `-m gpu`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_deploy.engine.plugin_library import FILES, default_path
from tests.kernels.build import build

from .host import Host
from .memory import CudaMemory, HostMemory, Memory


def headers() -> list[str]:
    """CMake's option for TensorRT's headers: none with TENSORRT_ROOT, which CMake reads itself, else the package that
    carries them, whose code is not imported.
    """
    spec = importlib.util.find_spec("kernel_lens")
    if "TENSORRT_ROOT" in os.environ or spec is None or spec.submodule_search_locations is None:
        return []
    return [f"-DTENSORRT_INCLUDE_DIR={Path(spec.submodule_search_locations[0]) / 'include' / 'tensorrt'}"]


def built(*targets: str) -> Path:
    options = ("-DKIMI_CUDA=OFF", "-DKIMI_PLUGIN_TESTS=ON", "-DKIMI_TENSORRT=AUTO", *headers())
    return build("plugins-emulated", *options, targets=targets)


@pytest.fixture(scope="session")
def host_library() -> Path:
    """What drives plugins, whatever their kernels run on."""
    return built("kimi_plugin_host") / "libkimi_plugin_host.so"


@pytest.fixture(scope="session")
def plugin_build() -> Path:
    """The emulated plugin library, the one without kernels, and the programs of the tests."""
    return built("kimi_plugins_emulated", "kimi_plugins_without_kernels", "plugin_cost", "plugin_layout")


@pytest.fixture(scope="session", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def driven(request: pytest.FixtureRequest, host_library: Path) -> Iterator[tuple[Host, Memory]]:
    """A library and the memory that its pointers lead to."""
    cuda = request.param == "cuda"
    library = default_path("cuda") if cuda else request.getfixturevalue("plugin_build") / FILES["emulated"]
    host = Host(host_library, library)
    yield host, CudaMemory() if cuda else HostMemory()
    host.close()


@pytest.fixture(scope="session")
def host(host_library: Path, plugin_build: Path) -> Iterator[Host]:
    """The emulated library."""
    host = Host(host_library, plugin_build / FILES["emulated"])
    yield host
    host.close()
