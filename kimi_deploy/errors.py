"""Typed errors: each says what failed, what was seen, what was expected and how to fix it.

The command line prints them without a traceback and exits with `exit_code`.
"""

from __future__ import annotations


class KimiDeployError(Exception):
    """Base of every error raised on purpose.

    `what` failed, what was `seen`, what was `expected`, and the `fix`; the last three are optional but a
    message to a user should carry all that are known.
    """

    exit_code = 1

    def __init__(self, what: str, *, seen: str = "", expected: str = "", fix: str = "") -> None:
        self.what, self.seen, self.expected, self.fix = what, seen, expected, fix
        lines = [what]
        lines += [f"  {name}: {text}" for name, text in (("seen", seen), ("expected", expected), ("fix", fix)) if text]
        super().__init__("\n".join(lines))

    def to_dict(self) -> dict[str, str]:
        """The error as plain data, for `--json`."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "seen": self.seen,
            "expected": self.expected,
            "fix": self.fix,
        }


class UsageError(KimiDeployError):
    """Arguments that cannot be used together, or a path that is not what the command takes."""

    exit_code = 2


class ConfigError(KimiDeployError):
    """A config.json that is missing, unreadable, out of range, or of a model this toolkit does not run."""


class CheckpointError(KimiDeployError):
    """A checkpoint whose files, names, shapes or dtypes are not what its config says."""


class TokenizerError(KimiDeployError):
    """Tokenizer or chat-template files that are missing or unusable."""


class ContractError(KimiDeployError):
    """An op called, or a graph written, against its contract: wrong port, shape, dtype, attribute or ABI."""


class ExportError(KimiDeployError):
    """An export that could not be made, or that did not pass its own checks."""


class DiskSpaceError(ExportError):
    """Too little room on the disk for an output; what an earlier run has written of it is good, and is kept."""


class ManifestError(KimiDeployError):
    """An artefact whose manifest is missing, unreadable or does not match the files beside it."""


class WrongArtefactError(ManifestError):
    """A folder that is not of the kind the command takes: wrong usage, not a damaged artefact."""

    exit_code = 2


class StateError(KimiDeployError):
    """A model state that is full, not finite, of another model, or asked for something states cannot do."""


class NotFiniteError(StateError):
    """A NaN or an infinity in a model's state or logits: of damaged weights, or of a dtype that is too narrow."""


class BackendError(KimiDeployError):
    """A runtime that is not installed, too old, or cannot run what it was given on this machine."""


class EngineError(KimiDeployError):
    """An engine that could not be built, or that does not fit the machine, the plugins or the graph."""


class ValidationError(KimiDeployError):
    """A parity check that failed."""


def install_line(extra: str, options: str = "") -> str:
    """The command that installs an extra of this package, which is on no index: in the root of a clone."""
    return f"pip install {options + ' ' if options else ''}'.[{extra}]' in the root of a clone of kimi-deploy"
