"""Validate an exported folder against the checkpoint it was made from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnxruntime

from kimi_deploy import __version__
from kimi_deploy.checkpoint import Checkpoint
from kimi_deploy.errors import UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.quantization.scheme import recorded_scheme
from kimi_deploy.runtime.base import kernels_to_dict
from kimi_deploy.runtime.open import find_backend, open_runner
from kimi_deploy.runtime.torch_runner import TorchRunner
from kimi_deploy.text.tokenizer import Tokenizer, tokenizer_if_any
from kimi_deploy.validate import quantized
from kimi_deploy.validate.checks import PADDED
from kimi_deploy.validate.diagnosis import where_to_look
from kimi_deploy.validate.exact_graph import exact_runner
from kimi_deploy.validate.folders import check_folders, check_source
from kimi_deploy.validate.parity import Parity
from kimi_deploy.validate.prompts import LONG, Prompt, longest, own_prompts, passages, shipped_prompts
from kimi_deploy.validate.report import Failure, Report
from kimi_deploy.validate.selection import Selection, command
from kimi_deploy.validate.tolerances import tolerance

Progress = Callable[..., AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Settings:
    """What to run: sizes in tokens, the user's own texts, where to run it, and which part of it."""

    max_tokens: int = 96
    long_tokens: int = 200
    greedy_tokens: int = 256
    text: Path | None = None
    prompts_file: Path | None = None
    backend: str | None = None
    provider: str = "cpu"
    threads: int | None = None
    kernels: str | Path = "auto"
    selection: Selection = field(default_factory=Selection)

    def within(self, capacity: int | None) -> Settings:
        """These settings with sizes that a state of `capacity` tokens holds in every check; None is any."""
        if capacity is None:
            return self
        most = min(self.max_tokens, max(1, capacity // 2))
        return replace(
            self,
            max_tokens=most,
            long_tokens=min(self.long_tokens, max(1, capacity - PADDED)),
            greedy_tokens=min(self.greedy_tokens, max(1, capacity - most)),
        )

    def longest(self, prompt: Prompt) -> int:
        """The most tokens of a shipped prompt."""
        return self.long_tokens if prompt.name == LONG else self.max_tokens

    def command(self, model: Path, export: Path) -> list[str]:
        """The words of the command that runs the whole of this validation again."""
        words = ["kimi-deploy", "validate", str(model), str(export)]
        default = Settings()
        for name in (
            "max_tokens",
            "long_tokens",
            "greedy_tokens",
            "text",
            "prompts_file",
            "backend",
            "provider",
            "threads",
            "kernels",
        ):
            value = getattr(self, name)
            if value != getattr(default, name):
                words += [f"--{name.replace('_', '-')}", str(value)]
        return words


def validate_export(model: Path, export: Path, settings: Settings, progress: Progress) -> Report:
    """The checks of `settings` on `export`, or an engine, against the float32 PyTorch model of the checkpoint `model`.

    Raises UsageError when a folder is not of its kind, the export was made from another checkpoint, or a text or a
    selection cannot be used, and ManifestError when the export's files are not what its manifest says.
    """
    check_folders(model, export)
    manifest = Manifest.read(export)
    find_backend(export, settings.backend)
    manifest.check_op_abi()
    checkpoint = Checkpoint.open(model)
    fingerprint = checkpoint.fingerprint()
    check_source(manifest, export, model, fingerprint)
    # without one random ids are as good as text
    tokenizer = tokenizer_if_any(model)
    own = _own_prompts(settings, tokenizer, model)
    dtype = manifest.details["dtype"]
    shipped = shipped_prompts(tokenizer, checkpoint.config.vocab_size, settings.max_tokens, settings.long_tokens)
    prompts = shipped + own
    _check_selection(settings.selection, prompts, checkpoint.config.num_hidden_layers)
    manifest.verify(export)
    candidate = open_runner(export, provider=settings.provider, threads=settings.threads, kernels=settings.kernels)
    settings = settings.within(candidate.largest_state[1])
    shipped = [Prompt(p.name, p.ids[: settings.longest(p)]) for p in shipped]
    own = [Prompt(p.name, p.ids[: settings.max_tokens]) for p in own]
    prompts = shipped + own
    where = f"{settings.provider}, our kernels" if candidate.kernels else settings.provider
    if manifest.kind == "onnx":
        backend, runtime = f"ONNX Runtime ({where})", f"onnxruntime {onnxruntime.__version__}"
    else:
        backend = str(manifest.details["backend"])
        runtime = f"{backend} {manifest.details['backend_version']}"
    scheme = recorded_scheme(manifest.details)
    parity = Parity(
        TorchRunner(model) if scheme is None else quantized.quantized_runner(model, export, quantized.exact(scheme)),
        candidate
        if scheme is None or scheme.activations == "float32"
        else exact_runner(export, manifest, settings.provider, settings.threads, settings.kernels),
        tolerance(f"graph_{dtype}"),
        greedy_tokens=settings.greedy_tokens,
        exact_greedy=dtype == "float32",
        same_dtype=None if dtype == "float32" else TorchRunner(model, dtype),
    )
    with progress("comparing", parity.steps(prompts), unit="checks") as advance:
        report = parity.run(
            prompts,
            backend,
            advance,
            greedy_prompt=longest([p for p in shipped if p.name.startswith("corpus")]),
            selection=settings.selection,
        )
    if scheme is not None:
        own_checks = quantized.Checks(model, export, scheme, candidate, settings.selection.checks)
        with progress("measuring what the quantisation costs"):
            texts = passages(tokenizer, checkpoint.config.vocab_size) + own
            report.add(own_checks.run(texts, is_text=tokenizer is not None))
    if not report.rows:
        raise UsageError(
            "this part of the validation compares nothing",
            seen=f"--only {' '.join(settings.selection.checks)}, prompt {settings.selection.prompt}, {dtype}",
            expected="reference-dtype for a 16-bit export, reference-forms for a prompt above 16 tokens",
        )
    report.facts = {
        "kimi_deploy": __version__,
        "checkpoint": fingerprint,
        "artefact": manifest.artefact_hash(),
        "name": manifest.source.get("name"),
        "dtype": dtype,
        "body": manifest.details.get("body"),
        "runtime": runtime,
        "kernels": kernels_to_dict(candidate.kernels),
        "whole": settings.selection.whole,
        "prompts": [{"name": p.name, "tokens": len(p.ids)} for p in prompts],
        "greedy_tokens": settings.greedy_tokens,
        **({} if scheme is None else own_checks.facts()),
    }
    row = report.first_failure
    if row is not None:
        again = command(settings.command(model, export), row.check, row.prompt_index, row.tensor)
        report.failure = Failure(row, where_to_look(row.tensor, candidate.contract.states), again)
    return report


def _check_selection(selection: Selection, prompts: list[Prompt], layers: int) -> None:
    for option, value, count in (("prompt-index", selection.prompt, len(prompts)), ("layer", selection.layer, layers)):
        if value is not None and not 0 <= value < count:
            raise UsageError(f"--{option} is out of range", seen=str(value), expected=f"0 to {count - 1}")


def _own_prompts(settings: Settings, tokenizer: Tokenizer | None, model: Path) -> list[Prompt]:
    prompts = []
    for option, path, by_line in (("--text", settings.text, False), ("--prompts-file", settings.prompts_file, True)):
        if path is not None and tokenizer is None:
            raise UsageError(f"{option} needs a tokenizer", seen=f"none in {model}", fix="add the tokenizer's files")
        if path is not None and tokenizer is not None:
            prompts += own_prompts(option, path, tokenizer, settings.max_tokens, by_line=by_line)
    return prompts
