"""One small export with every custom op, shared by the engine tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kimi_deploy.engine.plugin_executors import KernelExecutor
from kimi_deploy.engine.recipe import EngineRecipe, Profile
from kimi_deploy.kernels.library import FILES, KernelLibrary
from kimi_deploy.onnx.export import export_model
from tests.configs import config
from tests.kernels.build import build
from tests.models import write_model

torch.set_num_threads(1)

# small sizes and one architecture: a build is seconds
RECIPE = EngineRecipe(
    backend="tensorrt-rtx",
    compute_capabilities=("8.9",),
    # whatever is built on this machine
    plugin_ops=("KimiDeltaAttention",),
    prefill=Profile(batch=(1, 1, 2), sequence=(1, 8, 32), capacity=(1, 64, 64), num_logits=(1, 1, 4)),
    decode=Profile(batch=(1, 1, 2), capacity=(1, 64, 64)),
)


def no_progress(what: str, total: int | None = None, unit: str = "bytes") -> nullcontext[Callable[[int], None]]:
    return nullcontext(lambda n: None)


@pytest.fixture(scope="session")
def executor() -> KernelExecutor:
    """The kernels on the CPU, for Python plugins."""
    folder = build("kernels-emulated", "-DKIMI_CUDA=OFF", targets=("kimi_kernels_emulated",))
    return KernelExecutor(KernelLibrary.open(folder / FILES["emulated"]))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small", config("KKM"), tokenizer=False)


@pytest.fixture(scope="session")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KDA twice, MLA, a dense layer and two mixtures of experts, with ONNX Runtime's bodies."""
    output = tmp_path_factory.mktemp("export") / "small"
    export_model(checkpoint, output, dtype="float32", flavour="ort", overwrite=False, progress=no_progress)
    return output


@pytest.fixture(scope="session")
def engine(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the plugin."""
    from kimi_deploy.engine.engine_from_onnx import build_engine

    output = tmp_path_factory.mktemp("engine") / "small"
    build_engine(export, output, replace(RECIPE), overwrite=False, progress=no_progress)
    return output


@pytest.fixture(scope="session")
def plain_engine(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without any plugin, in a process where `engine` may have registered them."""
    from kimi_deploy.engine.engine_from_onnx import build_engine

    output = tmp_path_factory.mktemp("plain_engine") / "small"
    build_engine(export, output, replace(RECIPE, plugin="none"), overwrite=False, progress=no_progress)
    return output
