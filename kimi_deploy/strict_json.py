"""JSON objects from untrusted files: bounded, UTF-8, and no key twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kimi_deploy.errors import KimiDeployError

_FIX = "download or save the checkpoint again"


def parse_json_object(data: bytes, what: str, error: type[KimiDeployError], fix: str = _FIX) -> dict[str, Any]:
    """One JSON object in UTF-8. Raises `error` naming `what` for anything else, and for a key that occurs twice.

    A key given twice would be read one way here and another way elsewhere.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {ascii(key)[:100]} occurs twice")
            result[key] = value
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as reason:
        raise error(
            f"{what} is not valid", seen=ascii(str(reason))[1:-1][:200], expected="a JSON object in UTF-8", fix=fix
        ) from None
    if not isinstance(value, dict):
        raise error(f"{what} is not valid", seen=f"a {type(value).__name__}", expected="a JSON object", fix=fix)
    return value


def read_json_object(path: Path, max_bytes: int, error: type[KimiDeployError], fix: str = _FIX) -> dict[str, Any]:
    """`parse_json_object` of a file of at most `max_bytes`; `error` also for a file that cannot be read."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise error(f"{path.name} is too long", seen=f"{size} bytes", expected=f"at most {max_bytes}", fix=fix)
        data = path.read_bytes()
    except OSError as reason:
        raise error(f"{path.name} cannot be read", seen=str(reason), expected="a readable file", fix=fix) from reason
    return parse_json_object(data, path.name, error, fix)
