"""Prompts that parity is checked on: a shipped corpus of real text, and token sequences that break weak code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_deploy.errors import UsageError
from kimi_deploy.text.tokenizer import Tokenizer

LONG = "long"


@dataclass(frozen=True, eq=False)
class Prompt:
    """A named sequence of token ids, int64 [T]."""

    name: str
    ids: np.ndarray


def shipped_prompts(tokenizer: Tokenizer | None, vocab_size: int, max_tokens: int, long_tokens: int) -> list[Prompt]:
    """The prompts of every validation: passages of the corpus, sequences that break weak code, and one long text.

    Each has at most `max_tokens` tokens, the long one exactly `long_tokens`. Passages go through `tokenizer`; without
    one they are seeded random ids of as many tokens. They are from books of the King James Bible (public domain) that
    the demo model was not trained on.
    """
    whole = passages(tokenizer, vocab_size)
    encoded = [p.ids for p in whole]
    prompts = [Prompt(p.name, p.ids[:max_tokens]) for p in whole]
    return [
        *prompts,
        *_adversarial_prompts(tokenizer, vocab_size, max_tokens),
        Prompt(LONG, np.resize(np.concatenate(encoded), long_tokens)),
    ]


def passages(tokenizer: Tokenizer | None, vocab_size: int) -> list[Prompt]:
    """The passages of the corpus, whole, as `shipped_prompts` encodes them."""
    text = (Path(__file__).parent / "corpus" / "prompts.txt").read_text(encoding="utf-8")
    stripped = (p.strip() for p in text.split("\n\n"))
    return [Prompt(f"corpus {n}", _encode(tokenizer, p, vocab_size)) for n, p in enumerate(stripped, 1)]


def _adversarial_prompts(tokenizer: Tokenizer | None, vocab_size: int, max_tokens: int) -> list[Prompt]:
    """One token, one repeated (every key equal: the worst case of the triangular inverse), random ids, random bytes."""
    random = np.random.default_rng(0)
    ids = random.integers(0, vocab_size, max_tokens).astype(np.int64)
    # every byte is a character of this encoding, and few of them are text
    noise = random.integers(0, 256, max_tokens, dtype=np.uint8).tobytes().decode("latin-1")
    return [
        Prompt("one token", np.array([vocab_size // 2], dtype=np.int64)),
        Prompt("repeated token", np.full(max_tokens, vocab_size // 3, dtype=np.int64)),
        Prompt("random tokens", ids),
        Prompt("random bytes", _encode(tokenizer, noise, vocab_size)[:max_tokens]),
    ]


def _encode(tokenizer: Tokenizer | None, text: str, vocab_size: int) -> np.ndarray:
    if tokenizer is not None:
        return np.array(tokenizer.encode(text), dtype=np.int64)
    seed = np.frombuffer(text.encode(), np.uint8).sum(dtype=np.int64)
    return np.random.default_rng(int(seed)).integers(0, vocab_size, len(text)).astype(np.int64)


def own_prompts(option: str, path: Path, tokenizer: Tokenizer, max_tokens: int, *, by_line: bool) -> list[Prompt]:
    """The user's own text, whole or a prompt per line that is not blank, each cut to `max_tokens`.

    Raises UsageError, naming `option`, when the file is missing, is not UTF-8, or has no token.
    """
    fix = "give a UTF-8 text file"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} is not UTF-8", seen=f"{path}: {error}", fix=fix) from error
    except OSError as error:
        raise UsageError(f"{option} cannot be read", seen=f"{path}: {error.strerror}", fix=fix) from error
    texts = {path.name: text}
    if by_line:
        texts = {f"{path.name}:{n}": line for n, line in enumerate(text.splitlines(), 1) if line.strip()}
    prompts = [Prompt(name, _encode(tokenizer, t, 0)[:max_tokens]) for name, t in texts.items() if t]
    if not prompts:
        raise UsageError(f"{option} is empty", seen=str(path), expected="at least one token", fix=fix)
    return prompts


def longest(prompts: Sequence[Prompt]) -> Prompt:
    """The first of those with the most tokens."""
    return max(prompts, key=lambda p: len(p.ids))
