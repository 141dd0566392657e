"""What of an export is finished: a file of lines, each whole or ignored, that outlives the process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType


class Journal:
    """The finished pieces of one export, with the digest of each of their regions.

    A journal belongs to a `fingerprint`: one of another export is begun anew. It is read up to the first line that is
    not whole, and cut there: what is recorded next would be glued to that line, and lost with it. A piece is recorded
    after its bytes were handed to the operating system, so a killed process loses nothing that is recorded; a machine
    that stops may, which is why a second run reads finished pieces back.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.finished, whole = _read(path, fingerprint)
        """What was recorded before this run."""
        self.resumed = bool(self.finished)
        if self.resumed:
            os.truncate(path, whole)
        else:
            path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)

    def record(self, piece: int, digests: tuple[str, ...]) -> None:
        """Add a finished piece; from any thread, as one write appends one line."""
        os.write(self._file, (json.dumps([piece, *digests]) + "\n").encode())


def _read(path: Path, fingerprint: str) -> tuple[dict[int, tuple[str, ...]], int]:
    """The finished pieces, and how many bytes of the file say so."""
    finished: dict[int, tuple[str, ...]] = {}
    whole = 0
    try:
        header, *lines = path.read_bytes().splitlines(keepends=True)
        if json.loads(header) != {"fingerprint": fingerprint}:
            return {}, 0
        whole = len(header)
        # a kill can cut the last line short, and a machine that stops can leave anything there
        for line in lines:
            piece, *digests = json.loads(line)
            if not line.endswith(b"\n"):
                break
            finished[piece] = tuple(digests)
            whole += len(line)
    except (OSError, ValueError, TypeError):
        pass
    return finished, whole
