"""The tokenizer of byte-level models, such as the demo: an id below 256 is that byte.

It needs no vocabulary file; `tokenizer_config.json` says `"tokenizer_class": "ByteTokenizer"`, names the special
tokens in `added_tokens_decoder`, and gives `vocab_size` where the model's embedding has more rows than that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kimi_deploy.errors import TokenizerError
from kimi_deploy.output_file import whole_file
from kimi_deploy.text.files import added_tokens, bad_value, read_json, special_token_id
from kimi_deploy.text.protocol import Tokenizer, unknown_id, utf8
from kimi_deploy.text.special_tokens import SpecialTokens

CLASS_NAME = "ByteTokenizer"
NUM_BYTES = 256
BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID = 256, 257, 258
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")

_MAX_VOCAB = 1 << 24


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes, named ids above them are special tokens.

    An id that has no name but is below `vocab_size` decodes to `<|reserved_token_ID|>` and is never encoded.
    """

    def __init__(self, folder: Path) -> None:
        """Raises TokenizerError when `tokenizer_config.json` is missing or cannot be used."""
        config = read_json(folder, "tokenizer_config.json")
        if config is None or config.get("tokenizer_class") != CLASS_NAME:
            raise TokenizerError(
                "no byte tokenizer in the model folder",
                seen=str(folder),
                expected=f'tokenizer_config.json with "tokenizer_class": "{CLASS_NAME}"',
                fix="use the tokenizer files of the checkpoint",
            )
        self._names = added_tokens(config, NUM_BYTES, _MAX_VOCAB)
        smallest = max(self._names, default=NUM_BYTES - 1) + 1
        size = config.get("vocab_size", smallest)
        if isinstance(size, bool) or not isinstance(size, int) or not smallest <= size <= _MAX_VOCAB:
            raise bad_value("tokenizer_config.json", "vocab_size", size, f"an integer from {smallest} to {_MAX_VOCAB}")
        self._vocab_size = size
        specials = {name: i for i, name in self._names.items()}
        eos = special_token_id(config, "eos_token", specials)
        self._bos_token_id = special_token_id(config, "bos_token", specials)
        self._eos_token_ids = () if eos is None else (eos,)
        self._special_tokens = SpecialTokens(specials)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def bos_token_id(self) -> int | None:
        return self._bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._eos_token_ids

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        data = utf8(text)
        if not allow_special:
            return list(data)
        ids: list[int] = []
        for part in self._special_tokens.split(text):
            ids.extend([part] if isinstance(part, int) else part.encode("utf-8"))
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes_of(int(i)) for i in ids)

    def _bytes_of(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._vocab_size:
            raise unknown_id(token_id, self._vocab_size)
        if token_id < NUM_BYTES:
            return bytes((token_id,))
        return self._names.get(token_id, f"<|reserved_token_{token_id}|>").encode("utf-8")


def write_byte_tokenizer(
    folder: Path, *, extra_special_tokens: Sequence[str] = (), vocab_size: int | None = None
) -> None:
    """Write `tokenizer_config.json` of a byte tokenizer to `folder`, whole or not at all.

    Its special tokens are `SPECIAL_TOKENS` (bos 256, eos 257, pad 258), then `extra_special_tokens` from id 259
    on. `vocab_size` is the number of rows of the model's embedding when it has more. Raises TokenizerError for a
    special token that is empty or given twice, and a `vocab_size` that is too small for them.
    """
    names = (*SPECIAL_TOKENS, *extra_special_tokens)
    if len(set(names)) != len(names) or not all(names):
        raise TokenizerError(
            "the special tokens cannot be told apart", seen=repr(names), expected="different names", fix="rename them"
        )
    smallest = NUM_BYTES + len(names)
    size = smallest if vocab_size is None else vocab_size
    if not smallest <= size <= _MAX_VOCAB:
        raise TokenizerError(
            "the vocabulary has no room for the byte tokenizer",
            seen=f"vocab_size {size}",
            expected=f"{smallest} to {_MAX_VOCAB}: 256 bytes and {len(names)} special tokens",
            fix="give the model a larger vocabulary",
        )
    config: dict[str, Any] = {
        "tokenizer_class": CLASS_NAME,
        "vocab_size": size,
        "added_tokens_decoder": {
            str(NUM_BYTES + n): {"content": name, "special": True} for n, name in enumerate(names)
        },
        "bos_token": names[0],
        "eos_token": names[1],
        "pad_token": names[2],
    }
    with whole_file(folder / "tokenizer_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
