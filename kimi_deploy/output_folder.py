"""Write a folder whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kimi_deploy.errors import DiskSpaceError, UsageError

CUT_SHORT = (KeyboardInterrupt, SystemExit, OSError, MemoryError, DiskSpaceError)
"""What stops a run for a reason that lies outside what it writes: the same run can go on later."""

CONTENT, REPLACED = "content", "replaced"
"""What is in a folder of work beside its journal: what takes the target's place, and what was there before."""

Known = Callable[[Path], set[str]]
"""Given a folder, the names of the files in it that the same command wrote; empty when it wrote none of it."""


@contextmanager
def output_folder(target: Path, *, overwrite: bool, known: Known) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success it takes target's place, on any error it is removed.

    Raises UsageError, before anything is written, when `target` is a file or cannot be made, or is a folder that is not
    empty and `overwrite` is false or it holds a single file that is not `known`: what is replaced is what the same
    command wrote, never a checkpoint, another artefact or a user's work. Raises it too when another process is at work
    on the same target, and for a mount point, which nothing can take the place of. What a killed run has left is
    removed by the next, and what it was about to replace put back.
    """
    target = _real(target)
    work = target.parent / f".{target.name}.tmp"
    with _at_work(work, target, overwrite, known):
        try:
            content = work / CONTENT
            shutil.rmtree(content, ignore_errors=True)
            content.mkdir()
            yield content
            _take_place(work, target)
        finally:
            _clean_up(work, target)


@contextmanager
def resumable_folder(target: Path, *, overwrite: bool, known: Known) -> Iterator[tuple[Path, Path]]:
    """Yield (a folder that takes target's place on success, a file for a journal), both kept where a run is cut short.

    They lie in `.NAME.partial` beside `target`. A kill or an error of `CUT_SHORT` leaves them once there is a journal
    and something beside it, and the next call yields them as they are; any other error removes them. Raises UsageError
    and cleans up as `output_folder`.
    """
    target = _real(target)
    work = partial_folder(target)
    with _at_work(work, target, overwrite, known):
        content, journal = work / CONTENT, work / "journal"
        keep = False
        try:
            if not journal.exists():
                shutil.rmtree(content, ignore_errors=True)
            content.mkdir(exist_ok=True)
            yield content, journal
            _take_place(work, target)
        except CUT_SHORT:
            keep = journal.exists() and content.is_dir() and any(content.iterdir())
            raise
        finally:
            _put_back(work, target)
            if not keep:
                _clean_up(work, target)


def partial_folder(target: Path) -> Path:
    """Where `resumable_folder` keeps what a run that was cut short has made of `target`."""
    target = _real(target)
    return target.parent / f".{target.name}.partial"


def _real(target: Path) -> Path:
    """Where a link leads, be it there yet or not: the link stays, and the disk that it leads to is the one written."""
    return Path(os.path.realpath(target))


@contextmanager
def _at_work(work: Path, target: Path, overwrite: bool, known: Known) -> Iterator[None]:
    """`work` is there and this process's alone, `target` may be replaced, and nothing of a killed run is in the way."""
    if work.is_dir():
        with _locked(work, target):
            _put_back(work, target)
            if target.exists() and not (work / CONTENT).exists():
                # killed after its last rename
                _clean_up(work, target)
    if target.exists():
        _check_replaceable(target, overwrite, known)
    with _locked(work, target):
        yield


@contextmanager
def _locked(work: Path, target: Path) -> Iterator[None]:
    lock = _lock(work, target)
    try:
        yield
    finally:
        os.close(lock)


def _lock(work: Path, target: Path) -> int:
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                "the output folder cannot be made", seen=f"{target}: {error.strerror}", fix="give another -o"
            ) from error
        # another process may remove the folder, as it ends, at any point before the lock is held
        try:
            lock = os.open(work, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UsageError(
                "another process is writing this output", seen=str(work), fix="wait for it, or give another -o"
            ) from None
        except OSError as error:
            os.close(lock)
            with suppress(OSError):
                work.rmdir()
            raise UsageError(
                "the output folder cannot be locked",
                seen=f"{work}: {error.strerror}",
                expected="a file system with flock, which keeps a second process off",
                fix="give -o on another file system",
            ) from error
        if work.is_dir() and os.path.samestat(os.fstat(lock), work.stat()):
            return lock
        os.close(lock)


def _take_place(work: Path, target: Path) -> None:
    content = work / CONTENT
    # a name that outlives a power cut must not stand for bytes that do not
    for path in (*content.rglob("*"), content):
        _to_disk(path)
    if target.exists():
        os.replace(target, work / REPLACED)
    os.replace(content, target)
    _to_disk(target.parent)


def _put_back(work: Path, target: Path) -> None:
    """After a run that ended between its two last renames."""
    if (work / REPLACED).is_dir() and not target.exists():
        os.replace(work / REPLACED, target)


def _clean_up(work: Path, target: Path) -> None:
    _put_back(work, target)
    shutil.rmtree(work, ignore_errors=True)


def _to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _check_replaceable(target: Path, overwrite: bool, known: Known) -> None:
    if not target.is_dir():
        raise UsageError("the output is not a folder", seen=str(target), fix="give another -o")
    if target.is_mount():
        raise UsageError(
            "the output folder is a mount point",
            seen=str(target),
            expected="a folder that another can take the place of when it is whole",
            fix=f"give -o {target / 'NAME'}",
        )
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
