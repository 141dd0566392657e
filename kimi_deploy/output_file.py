"""Write a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kimi_deploy.errors import UsageError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write under; on success it takes path's place, on any error it is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(option: str, path: Path) -> None:
    """Refuse a file that could not be written, before the work that it would hold. Raises UsageError."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{option}: no folder {parent}", fix="make it first")
    if path.is_dir():
        raise UsageError(f"{option}: the file is a folder", seen=str(path), fix="name a file in it")
    try:
        # only a file that is made proves that one can be: read-only mounts do not show in permissions
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise UsageError(
            f"{option}: the folder {parent} cannot be written", seen=str(error.strerror), fix="give another folder"
        ) from error
