"""A small checkpoint and its export, made once."""

from pathlib import Path

import pytest

from tests.configs import config
from tests.graph.conftest import export
from tests.models import write_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("bench")
    model = write_model(root / "model", config(layers="KM", rms_norm_eps=1e-5))
    return model, export(model, root / "export")
