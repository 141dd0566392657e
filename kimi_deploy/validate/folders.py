"""Whether two folders are a checkpoint and an artefact made from it. Needs no torch: it is asked first."""

from __future__ import annotations

from pathlib import Path

from kimi_deploy.errors import UsageError
from kimi_deploy.folder_kind import kind_of
from kimi_deploy.manifest import MANIFEST_NAME, Manifest
from kimi_deploy.model_folder import require_folder


def check_folders(model: Path, export: Path) -> None:
    """Raise UsageError when a folder is not there, the two are swapped, or both are exports or both checkpoints."""
    require_folder(model, "the checkpoint that EXPORT was made from")
    require_folder(export, "a folder written by `kimi-deploy export` or `kimi-deploy build-engine`")
    model_is_export, export_is_export = ((f / MANIFEST_NAME).is_file() for f in (model, export))
    if model_is_export and not export_is_export:
        raise UsageError(
            "MODEL is an export and EXPORT is not: the arguments are swapped",
            seen=f"{MANIFEST_NAME} in {model}, none in {export}",
            fix=f"give {export} first, then {model}",
        )
    if model_is_export:
        kind = {"engine": "an engine", "plan": "a plan"}.get(kind_of(model), "an export")
        raise UsageError(
            f"MODEL is {kind}, not a checkpoint",
            seen=f"{MANIFEST_NAME} in {model}",
            expected="the checkpoint that EXPORT was made from",
            fix="give the checkpoint's folder first, then the export or engine",
        )
    if not export_is_export and (export / "config.json").is_file():
        raise UsageError(
            "EXPORT is a checkpoint, not an export",
            seen=f"config.json and no {MANIFEST_NAME} in {export}",
            expected="a folder written by `kimi-deploy export`",
            fix=f"run `kimi-deploy export {export} -o DIR` and give DIR",
        )


def check_source(manifest: Manifest, export: Path, model: Path, fingerprint: str) -> None:
    """Raise UsageError, which names both models, unless the artefact in `export` was made from the checkpoint `model`
    of that `fingerprint`.
    """
    made_from = manifest.source["checkpoint"]
    if made_from != fingerprint:
        raise UsageError(
            "EXPORT was made from another checkpoint than MODEL",
            seen=f"{export} was made from {manifest.source['name']!r}, {made_from}",
            expected=f"{model}, {fingerprint}",
            fix="give the checkpoint it was made from, or export again",
        )
