"""What of an export is finished: a file of lines, each whole or ignored, that outlives the process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType


class Journal:
    """The finished pieces of one export, with the digest of each of their regions.

    A journal belongs to a `fingerprint`: one of another export, or one that cannot be read, is begun anew. A piece is
    recorded after its bytes were handed to the operating system, so a killed process loses nothing that is recorded;
    a machine that stops may, which is why a second run reads finished pieces back.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.finished = _read(path, fingerprint)
        """What was recorded before this run."""
        self.resumed = bool(self.finished)
        if not self.resumed:
            path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)

    def record(self, piece: int, digests: tuple[str, ...]) -> None:
        """Add a finished piece; from any thread, as one write appends one line."""
        os.write(self._file, (json.dumps([piece, *digests]) + "\n").encode())


def _read(path: Path, fingerprint: str) -> dict[int, tuple[str, ...]]:
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if json.loads(header) != {"fingerprint": fingerprint}:
            return {}
        # a kill can cut the last line short
        entries = [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError):
        return {}
    return {piece: tuple(digests) for piece, *digests in entries}
