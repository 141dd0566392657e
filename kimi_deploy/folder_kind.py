"""What a folder is by the names of its files, and the error of one that is no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from kimi_deploy.errors import WrongArtefactError

MANIFEST_NAME = "manifest.json"
CONFIG_NAME = "config.json"
KINDS = ("checkpoint", "export", "engine", "plan")
_ARTEFACTS = {"onnx": "export", "engine": "engine", "plan": "plan"}
_LISTED, _LOOKED_AT = 8, 1000


def no_model(
    folder: Path,
    expected: str = "an export or an engine (with manifest.json), or a checkpoint (with config.json)",
    fix: str = "make an export with `kimi-deploy export MODEL -o DIR`",
    kinds: Sequence[str] = KINDS,
) -> WrongArtefactError:
    """The error of a command that was given a `folder` with neither config.json nor manifest.json.

    It names the folders up to two levels below that are a model, of `kinds` or not: most often the parent of one was
    taken for it.
    """
    below = _models_below(folder)
    fitting = [path for path, kind in below if kind in kinds]
    listed = ", ".join(f"{path} ({kind})" for path, kind in below[:_LISTED])
    listed += f" and {len(below) - _LISTED} more" if len(below) > _LISTED else ""
    return WrongArtefactError(
        "the folder holds no model",
        seen=f"no {CONFIG_NAME} and no {MANIFEST_NAME} in {folder}; below it: {listed or 'no model'}",
        expected=expected,
        fix=f"give the folder of one, as {fitting[0]}" if fitting else fix,
    )


def kind_of(folder: Path) -> str:
    """One of `KINDS`, by the manifest or the config.json of `folder`, or "" when it is none; never raises."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
        return _ARTEFACTS.get(manifest["kind"], "") if isinstance(manifest, dict) else ""
    except FileNotFoundError:
        return "checkpoint" if (folder / CONFIG_NAME).is_file() else ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _models_below(folder: Path) -> list[tuple[Path, str]]:
    """Folders at most two levels below that are a model of some kind, with the kind; hidden ones are not looked at."""
    found: list[tuple[Path, str]] = []
    budget = _LOOKED_AT

    def look(parent: Path, levels: int) -> None:
        nonlocal budget
        for path in _folders(parent):
            if budget == 0:
                return
            budget -= 1
            kind = kind_of(path)
            if kind:
                found.append((path, kind))
            elif levels > 1:
                look(path, levels - 1)

    look(folder, 2)
    return found


def _folders(parent: Path) -> Iterator[Path]:
    try:
        yield from sorted(p for p in parent.iterdir() if not p.name.startswith(".") and p.is_dir())
    except OSError:
        return
