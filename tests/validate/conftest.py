"""Small models with text, and their exports."""

from pathlib import Path

import pytest
import torch

from kimi_deploy.checkpoint.synth import synthesize
from tests.configs import config
from tests.graph.conftest import export
from tests.models import write_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate") / "model"
    return write_model(folder, config(layers="KKM", vocab_size=264), tokenizer=True)


@pytest.fixture(scope="session")
def exported(model: Path) -> Path:
    return export(model, model.parent / "export")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset with grouped experts, where float16 exchanges experts and whole groups on near ties."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    synthesize("tiny", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_float16(tiny: Path) -> Path:
    return export(tiny, tiny.parent / "export", "float16")
