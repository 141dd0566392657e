"""Help is the first thing a user sees: it must work where nothing but click is installed."""

import json
import subprocess
import sys

import pytest

from kimi_deploy.cli.main import COMMANDS

HEAVY = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "polygraphy",
    "tokenizers",
    "tiktoken",
    "transformers",
    "rich",
    "numpy",
    "pydantic",
    "matplotlib",
)

BLOCK = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {HEAVY!r}:
            raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Block())
from kimi_deploy.cli.main import main
sys.argv = ['kimi-deploy'] + sys.argv[1:]
main()
"""


def run_blocked(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCK, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", [None, *COMMANDS])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_works_without_any_heavy_package(command: str | None, flag: str) -> None:
    done = run_blocked(*([command] if command else []), flag)
    assert done.returncode == 0, done.stderr
    assert "Usage: kimi-deploy" in done.stdout
    if command is None:
        assert all(name in done.stdout for name in COMMANDS)


def test_the_block_is_real() -> None:
    done = run_blocked("doctor")
    assert done.returncode != 0
    assert "blocked" in done.stderr


def test_version_is_printed() -> None:
    from kimi_deploy import __version__

    assert __version__ in run_blocked("--version").stdout


@pytest.mark.parametrize("arguments", [["nonsense"], ["export"], ["export", "x"], ["generate", "x", "--no-such-flag"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    done = run_blocked(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "-h lists arguments and options" in done.stderr


def test_wrong_usage_is_json_where_that_is_asked_for() -> None:
    done = run_blocked("generate", "x", "--threads", "none", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["error"]) == (2, "UsageError")
    assert "--threads" in found["what"]


def test_no_command_prints_the_help() -> None:
    done = run_blocked()
    assert "Usage: kimi-deploy" in done.stdout + done.stderr
