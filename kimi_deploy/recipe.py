"""Recipes: TOML files that, with a commit, reproduce an artefact. Unknown keys and wrong types are refused."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_deploy.errors import UsageError


def read_recipe(path: Path, keys: Mapping[str, type]) -> dict[str, Any]:
    """The table in `path`, which may hold only `keys`, each with a value of its type.

    Raises UsageError naming the file and the key.
    """
    fix = "give a TOML file: one in export/ for export, one in engines/ for build-engine"
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("no such recipe", seen=str(path), fix=fix) from None
    except OSError as error:
        raise UsageError("the recipe cannot be read", seen=f"{path}: {error.strerror}", fix=fix) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError("the recipe is not TOML", seen=f"{path}: {error}", fix=fix) from error
    for key, value in raw.items():
        if key not in keys:
            raise UsageError(f"{path}: unknown key {key!r}", expected=f"some of {sorted(keys)}")
        if not isinstance(value, keys[key]) or (isinstance(value, bool) and keys[key] is not bool):
            raise UsageError(f"{path}: {key} has the wrong type", seen=repr(value), expected=keys[key].__name__)
    return raw
