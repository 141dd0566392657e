"""Sizes as people write them: bytes and tokens, in either case, with or without a space before the unit."""

from __future__ import annotations

import re
from typing import Any

import click

_BYTES = {"": 1, "b": 1}
_BYTES |= {f"{p}{b}": n**i for b, n in (("", 1000), ("b", 1000), ("ib", 1024)) for i, p in enumerate("kmgt", 1)}
_TOKENS = {"": 1, "k": 1024, "m": 1024**2}


class ByteSize(click.ParamType):
    """5GB, 1.5GiB, 500M, or plain bytes; GB and G are powers of 1000, GiB of 1024. The value is a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
        size = int(float(match[1]) * _BYTES[match[2].lower()]) if match and match[2].lower() in _BYTES else 0
        if size < 1:
            self.fail(f"{value!r} is not a size: write 5GB, 1.5GiB or a number of bytes", param, ctx)
        return size


class TokenCount(click.ParamType):
    """A number of tokens from `least` to `most`: 131072, or 128K and 1M in powers of two."""

    name = "tokens"

    def __init__(self, least: int = 1, most: int = 2**31 - 1) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)\s*([A-Za-z]?)", value.strip())
        if match is None or match[2].lower() not in _TOKENS:
            self.fail(f"{value!r} is not a number of tokens: write 4096, 128K or 1M", param, ctx)
        count = int(match[1]) * _TOKENS[match[2].lower()]
        if not self.least <= count <= self.most:
            self.fail(f"{value!r} is not in the range {self.least:,} to {self.most:,} tokens", param, ctx)
        return count
