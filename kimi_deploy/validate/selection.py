"""Which part of a validation to run: the checks by name, one prompt, one layer."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

# of quantised exports alone, after all others
QUANTIZED_CHECKS = ("rounded-inputs", "quality")
# of the reference alone: its own noise
REFERENCE_CHECKS = ("reference-forms", "reference-dtype")
# of an export against the reference
PARITY_CHECKS = (
    "prefill",
    "split-prefill",
    "decode-steps",
    "ragged-batch",
    "padding",
    "chunk-boundaries",
    "resume",
    "full-cache",
    "greedy",
)
# in the order they run
CHECKS = (*REFERENCE_CHECKS, *PARITY_CHECKS, *QUANTIZED_CHECKS)


@dataclass(frozen=True)
class Selection:
    """`checks` to run, `prompt` index to run them on, `layer` whose states alone are compared; None is all."""

    checks: tuple[str, ...] = CHECKS
    prompt: int | None = None
    layer: int | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is left out, so that the result is a verdict on the artefact."""
        return set(self.checks) == set(CHECKS) and self.prompt is None and self.layer is None

    def takes(self, check: str, prompt: int) -> bool:
        """Whether `check` runs on the prompt of that index."""
        return check in self.checks and self.prompt in (None, prompt)


def command(base: list[str], check: str, prompt: int | None, tensor: str) -> str:
    """`base`, a whole validation, narrowed to one check, prompt and, where a state differs, layer."""
    words = [*base, "--only", check]
    if prompt is not None:
        words += ["--prompt-index", str(prompt)]
    layer = tensor.split(".")[0]
    if layer.isdigit():
        words += ["--layer", layer]
    return shlex.join(words)
