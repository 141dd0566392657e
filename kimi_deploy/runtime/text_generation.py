"""Text in, text out: a runner with the tokenizer, stop ids and chat template of its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.errors import NotFiniteError, StateError, UsageError
from kimi_deploy.runtime.base import Runner
from kimi_deploy.runtime.generation import (
    FinishReason,
    GenerationResult,
    Token,
    check_capacity,
    check_prompts,
    generate,
)
from kimi_deploy.runtime.sampling import Sampling
from kimi_deploy.runtime.state import State
from kimi_deploy.runtime.state_file import load_snapshot, read_summary
from kimi_deploy.text.chat import render_chat
from kimi_deploy.text.stopping import stop_token_ids
from kimi_deploy.text.token_ids import TokenIds
from kimi_deploy.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

_PENDING = "pending_tokens"


@dataclass(frozen=True)
class Completion:
    """What followed one prompt."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason


class TextGenerator:
    """Completes prompts with a runner of a folder and what that folder says about text.

    The runner comes last, because it is what is costly to open: `encode` and `check` do without one.
    """

    def __init__(self, folder: Path, *, as_ids: bool = False) -> None:
        """`as_ids`: the text is token ids, and the folder's tokenizer is not opened.

        Raises ConfigError or TokenizerError when the folder's files cannot be used.
        """
        self._folder, self._config = folder, KimiLinearConfig.from_folder(folder)
        self._tokenizer: Tokenizer = TokenIds(self._config.vocab_size) if as_ids else load_tokenizer(folder)
        self.stop_ids = stop_token_ids(self._config, self._tokenizer, folder)

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of a plain prompt, or of a user's message in the model's chat format."""
        if not chat:
            return self._tokenizer.encode(prompt)
        text = render_chat(self._folder, [{"role": "user", "content": prompt}])
        return self._tokenizer.encode(text, allow_special=True)

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        extra_stop_ids: Sequence[int] = (),
        state_file: Path | None = None,
        capacity: int | None = None,
    ) -> None:
        """Refuse what `load` and `complete` would refuse, as far as it can be known without the model.

        Raises UsageError for an empty prompt, a `capacity` below what is needed and a stop id outside the vocabulary,
        StateError for a state file that is none.
        """
        top = self._config.vocab_size - 1
        for i in extra_stop_ids:
            if not 0 <= i <= top:
                raise UsageError("a stop id is not in the vocabulary", seen=str(i), expected=f"0 to {top}")
        saved, pending = 0, []
        if state_file is not None:
            lengths, notes = read_summary(state_file)
            pending = self._pending(state_file, len(lengths), notes)
            saved = int(lengths[0]) + len(pending)
        check_prompts([[*pending, *prompt] for prompt in prompts], max_new_tokens)
        if capacity is not None and "full_attention" in self._config.layer_types:
            check_capacity(capacity, max(map(len, prompts)), max_new_tokens, saved)

    def complete(
        self,
        runner: Runner,
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

        Stops at the folder's stop ids and the extra ones. Raises as `generation.generate` does; when what comes out is
        not finite, it is said how to find out whether the folder's files are damaged.
        """
        decoders = [StreamDecoder(self._tokenizer) for _ in prompts]
        texts = [""] * len(prompts)

        def add(row: int, text: str) -> None:
            texts[row] += text
            on_text(row, text)

        def on_token(token: Token) -> None:
            add(token.row, decoders[token.row].push(token.id))

        try:
            result = generate(
                runner,
                prompts,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop_ids=self.stop_ids | set(extra_stop_ids),
                state=state,
                capacity=capacity,
                on_token=on_token,
            )
        except NotFiniteError as error:
            # only sizes were compared when the folder was opened
            raise NotFiniteError(
                error.what,
                seen=error.seen,
                expected=error.expected,
                fix=f"`kimi-deploy inspect {self._folder}` says whether a file is damaged; if none is: {error.fix}",
            ) from error
        for row, decoder in enumerate(decoders):
            add(row, decoder.flush())
        rows = zip(texts, result.tokens, result.finish_reasons, strict=True)
        return [Completion(*row) for row in rows], result

    def save(self, result: GenerationResult, path: Path) -> None:
        """Save the state of one sequence with the token it has not consumed yet, so that `load` can go on from it."""
        result.state.save(path, {_PENDING: json.dumps(result.pending)})

    def load(self, runner: Runner, path: Path, new_tokens: int, capacity: int | None = None) -> tuple[State, list[int]]:
        """A state of `save` with room for `new_tokens` more (or `capacity` in all), and the tokens to begin with.

        Raises StateError when the file is damaged, of another model, or of more than one sequence.
        """
        snapshot = load_snapshot(path, runner.contract, runner.fingerprint)
        pending = self._pending(path, len(snapshot.lengths), snapshot.notes)
        needed = int(snapshot.lengths[0]) + len(pending) + new_tokens
        return runner.resume(snapshot, capacity or max(snapshot.capacity, needed)), pending

    def _pending(self, path: Path, sequences: int, notes: dict[str, str]) -> list[int]:
        """The token that a saved generation goes on with, if any."""
        try:
            pending = json.loads(notes.get(_PENDING, "[]"))
        except ValueError:
            pending = None
        top = self._config.vocab_size - 1
        valid = isinstance(pending, list) and all(type(i) is int and 0 <= i <= top for i in pending)
        if sequences != 1 or not valid or len(pending) > 1:
            raise StateError(
                f"{path.name} cannot be continued here",
                seen=f"{sequences} sequences, pending tokens {str(pending)[:80]}",
                expected="one sequence and at most one pending token",
                fix="use a file that --save-state wrote",
            )
        return pending
