"""manifest.json: what an artefact is, what it was made from, and the hash of every file beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from kimi_deploy import __version__
from kimi_deploy.errors import ManifestError, WrongArtefactError
from kimi_deploy.folder_kind import CONFIG_NAME, MANIFEST_NAME, no_model
from kimi_deploy.model_folder import require_folder
from kimi_deploy.output_file import whole_file

MANIFEST_VERSION = 1
ArtefactKind = Literal["onnx", "engine", "plan"]
"""An export, an engine of one, and a TensorRT plan of another exporter's graph, which has no states of ours."""
WEIGHT_SUFFIXES = (".bin", ".safetensors")
"""Of the files that an export's graph has its weights in."""
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Required:
    """Keys that a manifest of one kind must have."""

    source: frozenset[str]
    details: frozenset[str]
    files: frozenset[str]


REQUIRED: dict[str, Required] = {
    "onnx": Required(frozenset({"checkpoint"}), frozenset({"dtype", "body"}), frozenset({"model.onnx"})),
    "engine": Required(frozenset({"checkpoint"}), frozenset(), frozenset({"engine.plan"})),
    "plan": Required(frozenset({"model", "sha256"}), frozenset({"backend", "profiles"}), frozenset({"engine.plan"})),
}


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    `files` maps each file's name inside the folder to {"bytes", "sha256"}; `details` holds what only this
    kind of artefact has (dtype and body flavour, or profiles and capabilities); `source` says what it was
    made from; `op_abi` maps every custom op in it to its ABI hash; `reports` maps each accuracy report beside it to its
    sha256 (`kimi_deploy.validate.accuracy`).
    """

    kind: ArtefactKind
    source: dict[str, Any]
    op_abi: dict[str, str]
    details: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    reports: dict[str, str] = field(default_factory=dict)
    kimi_deploy_version: str = __version__
    manifest_version: int = MANIFEST_VERSION

    def write(
        self,
        folder: Path,
        progress: Callable[[int], None] | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Hash every file of `folder`, write manifest.json there and return the completed manifest.

        `progress` is called with the number of bytes hashed since the last call. `hashes` gives the sha256 of files,
        by their names, that the caller has just read.
        """
        known = hashes or {}
        files = {
            path.relative_to(folder).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": known.get(path.relative_to(folder).as_posix()) or sha256(path, progress),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST_NAME and path.name not in self.reports
        }
        complete = Manifest(self.kind, self.source, self.op_abi, self.details, files, self.reports)
        write_text(folder / MANIFEST_NAME, json.dumps(complete.to_dict(), indent=2) + "\n")
        return complete

    def to_dict(self) -> dict[str, Any]:
        """The content of manifest.json as plain data."""
        return asdict(self)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `folder/manifest.json`.

        Raises UsageError when there is no such folder, WrongArtefactError when it has no manifest, ManifestError when
        that is unreadable, of another version, or names files outside the folder.
        """
        path = folder / MANIFEST_NAME
        require_folder(folder, "a folder written by `kimi-deploy export` or `kimi-deploy build-engine`")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            expected = "a folder written by `kimi-deploy export` or `kimi-deploy build-engine`"
            if not (folder / CONFIG_NAME).is_file():
                raise no_model(
                    folder, expected, "run `kimi-deploy export MODEL -o DIR` first", ("export", "engine")
                ) from None
            raise WrongArtefactError(
                "the folder is a checkpoint, not an export or an engine",
                seen=f"{CONFIG_NAME} and no {MANIFEST_NAME} in {folder}",
                expected=expected,
                fix=f"run `kimi-deploy export {folder} -o DIR` and give DIR",
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ManifestError("manifest.json cannot be read", seen=f"{path}: {error}", fix="export again") from error
        if not isinstance(raw, dict):
            raise ManifestError(
                "manifest.json is not a JSON object", seen=f"{path}: {str(raw)[:80]}", fix="export again"
            )
        version = raw.get("manifest_version")
        if version != MANIFEST_VERSION:
            raise ManifestError(
                "manifest.json is of another version",
                seen=repr(version),
                expected=str(MANIFEST_VERSION),
                fix="export again with this version of kimi-deploy",
            )
        try:
            manifest = cls(**raw)
        except TypeError as error:
            raise ManifestError("manifest.json is not complete", seen=str(error), fix="export again") from error
        manifest._check_fields()
        return manifest

    def _check_fields(self) -> None:
        """Raise ManifestError unless every field is of its type and has the keys that `kind` must have."""

        def refuse(what: str, seen: object, expected: str) -> NoReturn:
            raise ManifestError(
                f"manifest.json: {what} is not valid", seen=repr(seen)[:200], expected=expected, fix="make it again"
            )

        if self.kind not in REQUIRED:
            refuse("kind", self.kind, f"one of {sorted(REQUIRED)}")
        required = REQUIRED[self.kind]
        for name in ("source", "op_abi", "details", "files", "reports"):
            if not isinstance(getattr(self, name), dict):
                refuse(name, getattr(self, name), "an object")
        for name, keys in (("source", required.source), ("details", required.details), ("files", required.files)):
            missing = sorted(keys - getattr(self, name).keys())
            if missing:
                refuse(name, f"no {missing}", f"at least {sorted(keys)}")
        if self.kind == "onnx" and not any(Path(name).suffix in WEIGHT_SUFFIXES for name in self.files):
            refuse("files", "no weight file", f"at least one of {', '.join(WEIGHT_SUFFIXES)}")
        for name, abi in self.op_abi.items():
            if not isinstance(abi, str):
                refuse(f"op_abi of {name}", abi, "16 hex digits")
        for name, digest in self.reports.items():
            if Path(name).name != name or not isinstance(digest, str):
                refuse(f"reports entry {name!r}", digest, "the name of a file beside the manifest, and its sha256")
        for name, entry in self.files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                refuse("files", f"{name!r}, outside the folder", "names inside the folder")
            if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
                refuse(f"files entry {name}", entry, "bytes and sha256")
            if not isinstance(entry.get("sha256"), str):
                refuse(f"files entry {name}", entry, "bytes and sha256")

    @classmethod
    def files_of(cls, kind: ArtefactKind) -> Callable[[Path], set[str]]:
        """For `output_folder`: the files of an artefact of `kind`, by its manifest; none where there is no such one."""

        def known(folder: Path) -> set[str]:
            try:
                manifest = cls.read(folder)
            except ManifestError:
                return set()
            return {*manifest.files, *manifest.reports, MANIFEST_NAME} if manifest.kind == kind else set()

        return known

    def artefact_hash(self) -> str:
        """sha256 over the names and hashes of all files: what an accuracy report is about."""
        text = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(self.files.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def check_kind(self, kind: ArtefactKind) -> None:
        """Raise WrongArtefactError unless the artefact is of `kind`."""
        if self.kind != kind:
            words = {
                "onnx": "an export, as `kimi-deploy export` writes",
                "engine": "an engine, as `kimi-deploy build-engine EXPORT` writes",
                "plan": "a plan of another exporter's graph, as `kimi-deploy build-engine FILE.onnx` writes",
            }
            raise WrongArtefactError(
                "the folder holds another kind of artefact",
                seen=words[self.kind],
                expected=words[kind],
                fix="give the other folder",
            )

    def verify(self, folder: Path, hashes: bool = True) -> None:
        """Check that every listed file is there with its size and, unless `hashes` is false, its hash.

        Raises ManifestError naming the first file that differs.
        """
        for name, entry in self.files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                raise ManifestError(
                    f"{name} does not match the manifest",
                    seen="missing" if size is None else f"{size} bytes",
                    expected=f"{entry['bytes']} bytes",
                    fix="copy the whole folder again, or make it again",
                )
            if hashes and sha256(path) != entry["sha256"]:
                raise ManifestError(
                    f"{name} does not match the manifest",
                    seen="another sha256",
                    expected=entry["sha256"],
                    fix="copy the whole folder again, or make it again",
                )

    def check_op_abi(self) -> None:
        """Raise ManifestError when the artefact was made with another contract of one of this package's ops."""
        from kimi_deploy.ops.registry import OPS

        for name, abi in self.op_abi.items():
            ours = OPS[name].abi if name in OPS else "no such op"
            if ours != abi:
                raise ManifestError(
                    f"the artefact was made with another ABI of {name}",
                    seen=abi,
                    expected=ours,
                    fix="export (and build) again with this version, or run it with the version that made it: "
                    f"{self.kimi_deploy_version}",
                )


def sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
