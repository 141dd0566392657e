"""A file that a command writes is whole or not there, and one that cannot be written is refused before the work."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kimi_deploy.cli.main import cli
from kimi_deploy.errors import UsageError
from kimi_deploy.output_file import whole_file


def test_a_file_that_fails_while_it_is_written_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("place", "words"),
    [("none/chart.png", "no folder"), (".", "is a folder"), ("/proc/chart.png", "cannot be written")],
)
def test_a_chart_that_cannot_be_written_is_refused(tmp_path: Path, place: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"--chart: .*{words}"):
        CliRunner().invoke(cli, ["plan", "tiny", "--chart", str(tmp_path / place)], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_full_disk_under_the_output_is_an_error_without_a_traceback(form: list[str]) -> None:
    command = [sys.executable, "-m", "kimi_deploy", "plan", "tiny", *form]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
