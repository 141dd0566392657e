"""An exported file explains itself: a script with only ONNX Runtime and NumPy drives it from its metadata."""

import subprocess
import sys
from pathlib import Path

import pytest

from kimi_deploy.runtime.generation import generate
from kimi_deploy.runtime.ort_runner import OrtRunner
from tests.runtime.export_folder import write_export_folder

SCRIPT = Path(__file__).parents[2] / "examples" / "generate_onnxruntime.py"
# everything but the standard library, ONNX Runtime and NumPy is out of reach
BLOCKED = f"""
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('kimi_deploy', 'torch', 'onnx', 'onnx_ir', 'ml_dtypes', 'transformers'):
            raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Block())
sys.argv[0] = {str(SCRIPT)!r}
runpy.run_path({str(SCRIPT)!r}, run_name='__main__')
"""


def run_script(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-c", BLOCKED, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip("\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export_folder(tmp_path_factory.mktemp("export"))


def test_the_script_gives_the_tokens_of_the_runner(folder: Path) -> None:
    prompt = [72, 101, 5, 9]
    expected = generate(OrtRunner(folder, threads=1), [prompt], max_new_tokens=24).tokens[0]
    out = run_script(folder, "--ids", ",".join(map(str, prompt)), "--max-new-tokens", "24")
    assert [int(i) for i in out.split(",")] == expected


def test_the_script_reads_and_writes_bytes_as_text(folder: Path) -> None:
    expected = generate(OrtRunner(folder, threads=1), [list("Hé".encode())], max_new_tokens=24).tokens[0]
    out = run_script(folder, "--text", "Hé", "--max-new-tokens", "24")
    assert out == bytes(t for t in expected if t < 256).decode(errors="replace").strip("\n")


@pytest.mark.parametrize("wrong", [["--text", ""], ["--ids", "9999"], ["--ids", "abc"], ["--ids", "-1"]])
def test_the_script_refuses_a_prompt_that_is_none(wrong: list[str], folder: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(folder), wrong[0] + "=" + wrong[1]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
