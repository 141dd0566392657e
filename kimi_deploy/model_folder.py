"""A model folder and the paths inside it, which are untrusted: a name in it may not lead anywhere else."""

from __future__ import annotations

import os
from pathlib import Path

from kimi_deploy.errors import CheckpointError, UsageError


def require_folder(path: Path, expected: str) -> None:
    """Raise UsageError, which says what was `expected`, unless `path` is a folder."""
    if path.is_file():
        raise UsageError(
            "this is a file, not a folder", seen=str(path), expected=expected, fix="give the folder it is in"
        )
    if not path.is_dir():
        raise UsageError("there is no such folder", seen=str(path), expected=expected, fix="check the path")


def file_in_folder(folder: Path, name: str) -> Path:
    """The regular file `name` directly in `folder`.

    A link may point inside the folder, or, in a Hugging Face hub cache (`<repo>/snapshots/<revision>`), into
    the `<repo>/blobs` that the cache keeps its files in. Raises CheckpointError for a name that is not a plain
    file name and for a link that leads elsewhere, FileNotFoundError when there is no such file.
    """
    if not name or name in (".", "..") or any(c in "/\\:" or not c.isprintable() for c in name):
        raise CheckpointError(
            "a file name leaves the model folder",
            seen=ascii(name)[:200],
            expected="a plain file name, without a path",
            fix="use a checkpoint whose index names files of its own folder",
        )
    path = folder / name
    root = folder.resolve()
    # unlike Path.resolve, realpath does not raise on a link to itself
    target = Path(os.path.realpath(path))
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(a) for a in allowed):
        raise CheckpointError(
            "a link leaves the model folder",
            seen=f"{path.name} -> {target}",
            expected=f"a file inside {root}",
            fix="copy the file into the folder",
        )
    if not target.is_file():
        raise FileNotFoundError(path)
    return path
