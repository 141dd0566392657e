"""Text in, text out: a runner with the tokenizer, stop ids and chat template of its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.errors import StateError, UsageError
from kimi_deploy.runtime.base import Runner
from kimi_deploy.runtime.generation import FinishReason, GenerationResult, Token, generate
from kimi_deploy.runtime.sampling import Sampling
from kimi_deploy.runtime.state import State
from kimi_deploy.runtime.state_file import load_snapshot
from kimi_deploy.text.chat import render_chat
from kimi_deploy.text.stopping import stop_token_ids
from kimi_deploy.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

_PENDING = "pending_tokens"


@dataclass(frozen=True)
class Completion:
    """What followed one prompt."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason


class TextGenerator:
    """Completes prompts with a runner and what its folder says about text."""

    def __init__(self, folder: Path, runner: Runner, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer` is used instead of the folder's, which is then not opened.

        Raises ConfigError or TokenizerError when the folder's files cannot be used.
        """
        self._folder, self._runner = folder, runner
        self._tokenizer: Tokenizer = tokenizer or load_tokenizer(folder)
        self.stop_ids = stop_token_ids(KimiLinearConfig.from_folder(folder), self._tokenizer, folder)

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of a plain prompt, or of a user's message in the model's chat format."""
        if not chat:
            return self._tokenizer.encode(prompt)
        text = render_chat(self._folder, [{"role": "user", "content": prompt}])
        return self._tokenizer.encode(text, allow_special=True)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        extra_stop_ids: Sequence[int] = (),
        state: State | None = None,
        capacity: int | None = None,
        on_text: Callable[[int, str], object] = lambda row, text: None,
    ) -> tuple[list[Completion], GenerationResult]:
        """Complete token prompts in one batch; `on_text(row, text)` sees each piece of text as it is complete.

        Stops at the folder's stop ids and the extra ones. Raises as `generation.generate` does, and UsageError for a
        stop id outside the vocabulary.
        """
        top = self._runner.contract.vocab_size - 1
        for i in extra_stop_ids:
            if not 0 <= i <= top:
                raise UsageError("a stop id is not in the vocabulary", seen=str(i), expected=f"0 to {top}")
        decoders = [StreamDecoder(self._tokenizer) for _ in prompts]
        texts = [""] * len(prompts)

        def add(row: int, text: str) -> None:
            texts[row] += text
            on_text(row, text)

        def on_token(token: Token) -> None:
            add(token.row, decoders[token.row].push(token.id))

        result = generate(
            self._runner,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=self.stop_ids | set(extra_stop_ids),
            state=state,
            capacity=capacity,
            on_token=on_token,
        )
        for row, decoder in enumerate(decoders):
            add(row, decoder.flush())
        rows = zip(texts, result.tokens, result.finish_reasons, strict=True)
        return [Completion(*row) for row in rows], result

    def save(self, result: GenerationResult, path: Path) -> None:
        """Save the state of one sequence with the token it has not consumed yet, so that `load` can go on from it."""
        result.state.save(path, {_PENDING: json.dumps(result.pending)})

    def load(self, path: Path, new_tokens: int, capacity: int | None = None) -> tuple[State, list[int]]:
        """A state of `save` with room for `new_tokens` more (or `capacity` in all), and the tokens to begin with.

        Raises StateError when the file is damaged, of another model, or of more than one sequence.
        """
        snapshot = load_snapshot(path, self._runner.contract, self._runner.fingerprint)
        pending = json.loads(snapshot.notes.get(_PENDING, "[]"))
        top = self._runner.contract.vocab_size - 1
        valid = isinstance(pending, list) and all(type(i) is int and 0 <= i <= top for i in pending)
        if len(snapshot.lengths) != 1 or not valid or len(pending) > 1:
            raise StateError(
                f"{path.name} cannot be continued here",
                seen=f"{len(snapshot.lengths)} sequences, pending tokens {str(pending)[:80]}",
                expected="one sequence and at most one pending token",
                fix="use a file that --save-state wrote",
            )
        needed = int(snapshot.lengths[0]) + len(pending) + new_tokens
        return self._runner.resume(snapshot, capacity or max(snapshot.capacity, needed)), pending
