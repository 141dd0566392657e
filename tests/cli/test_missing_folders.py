"""A folder that is not there is wrong usage, in every command that takes one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kimi_deploy.cli.main import COMMANDS, cli
from kimi_deploy.errors import UsageError

DEMO = Path(__file__).parents[2] / "models" / "demo"

# arguments in which MISSING is a folder that does not exist
CALLS = {
    "export": [["MISSING", "-o", "OUT"]],
    "build-engine": [["MISSING", "-o", "OUT"]],
    "refit": [["MISSING", "MISSING", "-o", "OUT"]],
    "generate": [["MISSING", "--prompt", "x"]],
    "validate": [["MISSING", "MISSING"], [str(DEMO), "MISSING"]],
    "inspect": [["MISSING"]],
    "plan": [["MISSING"]],
    "bench": [["MISSING", "MISSING"], [str(DEMO), "MISSING"], ["MISSING", str(DEMO)]],
}
TAKE_NO_FOLDER = {"synth", "doctor"}


def test_every_command_is_covered() -> None:
    assert set(CALLS) | TAKE_NO_FOLDER == set(COMMANDS)


@pytest.mark.parametrize("call", [(command, arguments) for command, calls in CALLS.items() for arguments in calls])
def test_a_missing_folder_exits_2_and_is_named(call: tuple[str, list[str]], tmp_path: Path) -> None:
    command, arguments = call
    missing, output = tmp_path / "missing", tmp_path / "out"
    words = [{"MISSING": str(missing), "OUT": str(output)}.get(a, a) for a in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "kimi_deploy", command, *words, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["error"] == "UsageError"
    assert str(missing) in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["export", "generate", "validate", "inspect", "plan", "bench", "refit"])
def test_a_file_in_a_folders_place_is_called_a_file(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text\n")
    words = [{"MISSING": str(tmp_path / "file"), "OUT": str(tmp_path / "out")}.get(a, a) for a in CALLS[command][0]]
    with pytest.raises(UsageError, match="this is a file, not a folder"):
        CliRunner().invoke(cli, [command, *words], catch_exceptions=False)
