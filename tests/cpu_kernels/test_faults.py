"""A fault in what a CPU kernel computes is found by validate, at the tensor where it is."""

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from kimi_deploy.cli.main import cli
from kimi_deploy.runtime.ort_kernels import OrtKernels
from kimi_deploy.validate.run import Settings, validate_export
from tests.capabilities import needs_x86
from tests.configs import config
from tests.cpu_kernels.faults import FAULTS, LEVEL_NAME, KernelFault, build_fault
from tests.graph.conftest import export, no_progress
from tests.models import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("faults") / "model", config(layers="KKM", vocab_size=264))


@pytest.fixture(scope="module")
def exported(model: Path) -> Path:
    return export(model, model.parent / "export")


@needs_x86
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_of_a_kernel_is_caught_and_named(
    fault: KernelFault, library: OrtKernels, model: Path, exported: Path, tmp_path: Path
) -> None:
    wrong = OrtKernels.open(build_fault(fault, library.path, tmp_path))
    assert wrong.choose(LEVEL_NAME)
    settings = Settings(max_tokens=24, long_tokens=70, greedy_tokens=8, threads=1, kernels=str(wrong.path))
    report = validate_export(model, exported, settings, no_progress)
    assert report.failure is not None
    assert (report.failure.row.check, report.failure.row.tensor) == (fault.check, fault.tensor)
    assert report.facts["kernels"]["library"] == wrong.sha256 != library.sha256
    # the command that was printed fails in the same way, and passes with the library as it is
    words = shlex.split(report.failure.command)[1:]
    again = CliRunner().invoke(cli, [*words, "--json"])
    assert again.exit_code == 1
    assert json.loads(again.stdout)["first_failure"]["tensor"] == fault.tensor
    right = [str(library.path) if word == str(wrong.path) else word for word in words]
    assert right != words
    assert CliRunner().invoke(cli, right).exit_code == 0
