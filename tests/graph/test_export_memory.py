"""How much memory an export really takes, measured on a process that exports more bytes than it may hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_deploy.checkpoint import released_tensors
from kimi_deploy.checkpoint.files import SINGLE_NAME
from kimi_deploy.checkpoint.presets import PRESETS
from kimi_deploy.checkpoint.safetensors_file import layout_header, reserve
from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.contract import DTYPES, Dtype
from kimi_deploy.plan.memory import weight_bytes
from kimi_deploy.plan.report import export_resident_bytes
from kimi_deploy.weights import weight_table
from tests.configs import raw_config

ABOVE_THE_LARGEST_TENSOR = 2_000_000_000
WIDE = {
    "hidden_size": 1024,
    "vocab_size": 196_608,
    "num_experts": 96,
    "moe_intermediate_size": 512,
    "dtype": "bfloat16",
}
EXPORT = """
import sys
from pathlib import Path
from kimi_deploy.cli.main import cli
cli(["export", *sys.argv[1:]], standalone_mode=False)
# of this program alone, where getrusage also counts the process that started it
status = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


def zeros(folder: Path, raw: dict[str, object]) -> KimiLinearConfig:
    """A whole checkpoint in bfloat16 whose file is one hole: read as any other, it takes neither time nor disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    config = KimiLinearConfig.from_folder(folder)
    tensors = [(t.name, t.dtype, t.shape) for t in released_tensors(config, "bfloat16")]
    tensors.sort(key=lambda t: t[1] != "F32")
    header, infos = layout_header(tensors, SINGLE_NAME)
    reserve(folder / SINGLE_NAME, header, infos)
    return config


def test_an_export_holds_far_less_than_it_writes_and_what_the_plan_says(tmp_path: Path) -> None:
    config = zeros(tmp_path / "model", raw_config("KKM", **WIDE))
    arguments = [str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--dtype", "bfloat16"]
    done = subprocess.run([sys.executable, "-c", EXPORT, *arguments], capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[-1])
    planned = export_resident_bytes(config, "bfloat16")
    written = (tmp_path / "out" / "weights.bin").stat().st_size
    (tmp_path / "out" / "weights.bin").unlink()
    # to hold all that is written beside the process, or all of the experts, would be beyond the plan
    assert written > 1.1 * planned
    assert 0.75 * planned < peak < planned


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_of_an_export_is_near_its_largest_tensor(preset: str, dtype: Dtype) -> None:
    config = PRESETS[preset].config
    assert export_resident_bytes(config, dtype) <= largest(config, dtype) + ABOVE_THE_LARGEST_TENSOR


def largest(config: KimiLinearConfig, dtype: Dtype) -> int:
    """Bytes of the largest tensor that an export writes: experts are one tensor a layer."""
    return max(weight_bytes(weight, dtype) for weight in weight_table(config))
