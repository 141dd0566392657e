"""A folder that is not there, or is none of the kind a command takes, is wrong usage, and is said so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kimi_deploy.cli.main import COMMANDS, cli
from kimi_deploy.errors import UsageError, WrongArtefactError
from kimi_deploy.folder_kind import no_model

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


# of the calls with a good folder, those in which it stands where it belongs
TAKE_A_MODEL = [
    (command, i) for command, calls in CALLS.items() for i in range(len(calls)) if calls[i][1:] != [str(DEMO)]
]


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A folder of two models, one of them a level further down, as in the cache of the Hugging Face hub."""
    (tmp_path / "parent" / "snapshots" / "revision").mkdir(parents=True)
    (tmp_path / "parent" / "snapshots" / "revision" / "config.json").write_text("{}")
    (tmp_path / "parent" / "made").mkdir()
    (tmp_path / "parent" / "made" / "manifest.json").write_text('{"kind": "onnx"}')
    (tmp_path / "parent" / ".hidden").mkdir()
    (tmp_path / "parent" / ".hidden" / "config.json").write_text("{}")
    return tmp_path / "parent"


@pytest.mark.parametrize(("command", "which"), TAKE_A_MODEL)
def test_the_parent_of_models_exits_2_and_they_are_named(
    command: str, which: int, parent: Path, tmp_path: Path
) -> None:
    words = [{"MISSING": str(parent), "OUT": str(tmp_path / "out")}.get(a, a) for a in CALLS[command][which]]
    with pytest.raises(WrongArtefactError, match="the folder holds no model") as error:
        CliRunner().invoke(cli, [command, *words], catch_exceptions=False)
    assert error.value.exit_code == 2
    assert f"{parent / 'made'} (export), {parent / 'snapshots' / 'revision'} (checkpoint)" in error.value.seen
    assert ".hidden" not in str(error.value)
    assert str(parent) in error.value.fix


def test_the_fix_names_a_folder_of_the_kind_that_is_wanted(parent: Path) -> None:
    assert str(parent / "snapshots" / "revision") in no_model(parent, kinds=("checkpoint",)).fix
    assert str(parent / "made") in no_model(parent, kinds=("export",)).fix


def test_an_empty_folder_is_said_to_hold_nothing(tmp_path: Path) -> None:
    error = no_model(tmp_path)
    assert "below it: no model" in error.seen
    assert "kimi-deploy export" in error.fix


def test_a_checkpoint_in_an_exports_place_is_told_how_to_export(tmp_path: Path) -> None:
    with pytest.raises(WrongArtefactError, match="is a checkpoint, not an export") as error:
        CliRunner().invoke(cli, ["build-engine", str(DEMO), "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert f"kimi-deploy export {DEMO} -o DIR" in error.value.fix


@pytest.mark.parametrize(("kind", "words"), [("onnx", "an export"), ("engine", "an engine"), ("plan", "a plan")])
def test_validate_names_what_stands_in_the_checkpoints_place(kind: str, words: str, parent: Path) -> None:
    (parent / "made" / "manifest.json").write_text(json.dumps({"kind": kind}))
    with pytest.raises(UsageError, match=f"MODEL is {words}, not a checkpoint"):
        CliRunner().invoke(cli, ["validate", str(parent / "made"), str(parent / "made")], catch_exceptions=False)
