"""Write a folder whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kimi_deploy.errors import DiskSpaceError, UsageError

CUT_SHORT = (KeyboardInterrupt, SystemExit, OSError, MemoryError, DiskSpaceError)
"""What stops a run for a reason that lies outside what it writes: the same run can go on later."""

Known = Callable[[Path], set[str]]
"""Given a folder, the names of the files in it that the same command wrote; empty when it wrote none of it."""


@contextmanager
def output_folder(target: Path, *, overwrite: bool, known: Known) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success it takes target's place, on any error it is removed.

    Raises UsageError, before anything is written, when `target` is a file or cannot be made, or is a folder that is not
    empty and `overwrite` is false or it holds a single file that is not `known`: what is replaced is what the same
    command wrote, never a checkpoint, another artefact or a user's work.
    """
    target = _checked(target, overwrite, known)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    _make(temporary, target)
    try:
        yield temporary
        _take_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def resumable_folder(target: Path, *, overwrite: bool, known: Known) -> Iterator[tuple[Path, Path]]:
    """Yield (a folder that takes target's place on success, a file for a journal), both kept where a run is cut short.

    They lie in `.NAME.partial` beside `target`. A kill or an error of `CUT_SHORT` leaves them once there is a journal
    and something beside it, and the next call yields them as they are; any other error removes them. Raises UsageError
    as `output_folder`, and when another process is at work on the same target.
    """
    target = _checked(target, overwrite, known)
    work = partial_folder(target)
    _make(work, target)
    content, journal = work / "content", work / "journal"
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise UsageError(
            "another process is writing this output", seen=str(work), fix="wait for it, or give another -o"
        ) from None
    keep = False
    try:
        if not journal.exists():
            shutil.rmtree(content, ignore_errors=True)
        content.mkdir(exist_ok=True)
        yield content, journal
        _take_place(content, target)
    except CUT_SHORT:
        keep = journal.exists() and content.is_dir() and any(content.iterdir())
        raise
    finally:
        os.close(lock)
        if not keep:
            shutil.rmtree(work, ignore_errors=True)


def partial_folder(target: Path) -> Path:
    """Where `resumable_folder` keeps what a run that was cut short has made of `target`."""
    target = Path(os.path.abspath(target))
    return target.with_name(f".{target.name}.partial")


def _checked(target: Path, overwrite: bool, known: Known) -> Path:
    target = Path(os.path.abspath(target))
    if target.exists():
        _check_replaceable(target, overwrite, known)
    return target


def _make(temporary: Path, target: Path) -> None:
    try:
        temporary.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            "the output folder cannot be made", seen=f"{target}: {error.strerror}", fix="give another -o"
        ) from error


def _take_place(temporary: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    # a name that outlives a power cut must not stand for bytes that do not
    for path in (*temporary.rglob("*"), temporary):
        _to_disk(path)
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    _to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _check_replaceable(target: Path, overwrite: bool, known: Known) -> None:
    if not target.is_dir():
        raise UsageError("the output is not a folder", seen=str(target), fix="give another -o")
    content = {p.relative_to(target).as_posix() for p in target.rglob("*") if not p.is_dir() or p.is_symlink()}
    if not content and not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            "the output folder is not empty",
            seen=str(target),
            expected="a new or empty folder",
            fix="give another -o, or --force to replace what this command wrote there before",
        )
    foreign = sorted(content - known(target))
    if foreign or not content:
        raise UsageError(
            "the output folder holds something that this command did not write",
            seen=f"{target}: {foreign[:5] or 'folders'}",
            expected="nothing, or only an earlier output of the same command",
            fix="give another -o, or move those files away",
        )
