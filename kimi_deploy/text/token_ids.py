"""Token ids instead of text: for a model folder without a tokenizer, and for what must not depend on one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from kimi_deploy.errors import UsageError
from kimi_deploy.text.protocol import Tokenizer, unknown_id


class TokenIds(Tokenizer):
    """A tokenizer whose text is the ids themselves: "1, 2 3" encodes to [1, 2, 3], which decode to "1 2 3 "."""

    bos_token_id = None
    eos_token_ids = ()

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._vocab_size

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The ids that `text` lists. Raises UsageError for anything else, and for an id outside the vocabulary."""
        words = re.split(r"\s*,\s*|\s+", text.strip())
        expected = f"ids from 0 to {self._vocab_size - 1}, separated by commas or spaces"
        for word in words:
            if not word:
                raise UsageError(
                    "a prompt of token ids has no token ids in some place", seen=repr(text[:80]), expected=expected
                )
            # no vocabulary has an id of more digits, and Python refuses to read very many
            if not re.fullmatch(r"-?[0-9]+", word):
                raise UsageError(
                    "a prompt of token ids has something else in it", seen=repr(word[:80]), expected=expected
                )
            if len(word) > 18 or not 0 <= int(word) < self._vocab_size:
                raise UsageError("a token id is not in the vocabulary", seen=word[:80], expected=expected)
        return [int(word) for word in words]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Each id in decimal with a space behind it. Raises TokenizerError for an id outside the vocabulary."""
        parts = []
        for i in ids:
            if not 0 <= i < self._vocab_size:
                raise unknown_id(i, self._vocab_size)
            parts.append(b"%d " % i)
        return b"".join(parts)
