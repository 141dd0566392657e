"""A folder is written whole or not at all, whenever the process dies; the next run leaves nothing lying beside it."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kimi_deploy.errors import UsageError
from kimi_deploy.output_folder import output_folder, partial_folder, resumable_folder

# what changes a disk, or says that it is changed
CALLS = ("mkdir", "replace", "fsync", "unlink", "rmdir", "open")
OLD, NEW = {"a": "old", "b": "old"}, {"a": "new", "c/d": "new"}


def known(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def write(target: Path, overwrite: bool = True) -> None:
    with output_folder(target, overwrite=overwrite, known=known) as folder:
        fill(folder, NEW)


def write_on(target: Path, overwrite: bool = True) -> None:
    with resumable_folder(target, overwrite=overwrite, known=known) as (folder, journal):
        journal.write_text("begun")
        fill(folder, NEW)


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in known(folder)}


def dies(work: Callable[[], None], at: int) -> bool:
    """Run `work` in a child that SIGKILLs itself at the call number `at` of CALLS; False when it makes fewer."""

    def child() -> None:
        calls = 0

        def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **settings: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **settings)

            return call

        for name in CALLS:
            setattr(os, name, deadly(getattr(os, name)))
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("writer", [write, write_on])
@pytest.mark.parametrize("before", [{}, OLD])
def test_a_run_killed_anywhere_leaves_the_old_or_the_new_and_the_next_run_leaves_nothing_beside(
    writer: Callable[..., None], before: dict[str, str], tmp_path: Path
) -> None:
    at, finished = 0, 0
    while True:
        at += 1
        root = tmp_path / str(at)
        target = root / "out"
        fill(root, {"else": "mine", ".out.notes": "mine"})
        fill(target, before)
        if not dies(lambda: writer(target), at):  # noqa: B023
            break
        if target.exists():
            assert content(target) in (before, NEW), at
            finished += content(target) == NEW
        # without leave to replace anything: what was there is there again, or the run had finished
        try:
            writer(target, False)
        except UsageError:
            assert content(target) in (before, NEW), at
        writer(target)
        assert content(target) == NEW, at
        assert sorted(p.name for p in root.iterdir()) == [".out.notes", "else", "out"], at
    assert at > 10
    # deaths after the last rename are among them
    assert finished > 2


@pytest.mark.parametrize("folder", [output_folder, resumable_folder])
def test_a_second_process_is_refused_while_the_first_is_at_work(folder: Any, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with (
        folder(target, overwrite=False, known=known),
        pytest.raises(UsageError, match="another process"),
        folder(target, overwrite=False, known=known),
    ):
        pytest.fail("entered")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_at_the_last_rename_puts_back_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    fill(target, OLD)
    real = os.replace

    def fails(source: Path, to: Path) -> None:
        if to == target and Path(source).name == "content":
            raise OSError(5, "Input/output error")
        real(source, to)

    monkeypatch.setattr(os, "replace", fails)
    for writer in (write, write_on):
        with pytest.raises(OSError, match="Input/output"):
            writer(target)
        assert content(target) == OLD
    assert sorted(p.name for p in tmp_path.iterdir()) == [partial_folder(target).name, "out"]
    monkeypatch.undo()
    write_on(target)
    assert content(target) == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_work_that_another_process_removes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock was taken on a folder that has no name any more."""
    target = tmp_path / "out"
    real, removed = os.open, []

    def open_and_lose(path: Any, *arguments: Any, **settings: Any) -> int:
        file = real(path, *arguments, **settings)
        if Path(path) == partial_folder(target) and not removed:
            removed.append(path)
            shutil.rmtree(path)
        return file

    monkeypatch.setattr(os, "open", open_and_lose)
    write_on(target)
    assert removed
    assert content(target) == NEW


@pytest.mark.parametrize("writer", [write, write_on])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_where_it_leads_is_written(
    there: bool, writer: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may lead to the disk that has the room."""
    disk, home = tmp_path / "disk", tmp_path / "home"
    disk.mkdir()
    home.mkdir()
    if there:
        fill(disk / "out", OLD)
    (home / "link").symlink_to("../disk/out")
    monkeypatch.chdir(home)
    writer(Path("link"))
    assert (home / "link").is_symlink()
    assert content(disk / "out") == NEW
    assert [p.name for folder in (home, disk) for p in folder.iterdir()] == ["link", "out"]


@pytest.mark.parametrize("folder", [output_folder, resumable_folder])
def test_a_mount_point_is_refused_before_anything_is_written(folder: Any) -> None:
    """The system lets nothing take its place, which would be known only after the work."""
    with (
        pytest.raises(UsageError, match=r"(?s)mount point.*-o /NAME"),
        folder(Path("/"), overwrite=True, known=lambda _: pytest.fail("searched")),
    ):
        pytest.fail("entered")


def test_a_file_system_without_locks_is_not_called_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UsageError, match=r"(?s)cannot be locked.*No locks available"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
