"""The report beside an artefact: attached to its manifest by hash, and read back to say whether it still holds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kimi_deploy.manifest import MANIFEST_NAME, Manifest, sha256, write_text
from kimi_deploy.runtime.base import ops_run_as
from kimi_deploy.validate.report import REPORT_VERSION, plain

Standing = Literal["pass", "fail", "stale"]


@dataclass(frozen=True)
class Accuracy:
    """What one attached report says: of which backend, and whether it passed, failed, or is of other files.

    `measured_with` names the runtime and, of ONNX Runtime, what ran this package's ops. `detail` says why a report is
    stale, and is empty otherwise.
    """

    name: str
    backend: str
    standing: Standing
    measured_with: str = ""
    detail: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def report_name(backend: str) -> str:
    """The file that holds the report of `backend`, such as "ONNX Runtime (cpu)": one per backend."""
    words = "".join(c if c.isalnum() else " " for c in backend.lower()).split()
    return f"report-{'-'.join(words)}.json"


def attach(folder: Path, report: dict[str, Any]) -> Path:
    """Write a report of `Report.to_dict` into the artefact's folder and its hash into the manifest; returns its path.

    Raises OSError where the folder cannot be written; the report is then not attached.
    """
    path = folder / report_name(report["backend"])
    manifest = Manifest.read(folder)
    write_text(path, json.dumps(plain(report), separators=(",", ":")) + "\n")
    complete = replace(manifest, reports={**manifest.reports, path.name: sha256(path)})
    write_text(folder / MANIFEST_NAME, json.dumps(complete.to_dict(), indent=2) + "\n")
    return path


def read_accuracy(folder: Path, manifest: Manifest, *, whole: bool) -> list[Accuracy]:
    """Every report that the manifest names. `whole`: the folder's files are those of the manifest."""
    return [_read(folder / name, digest, manifest, whole) for name, digest in sorted(manifest.reports.items())]


def _read(path: Path, digest: str, manifest: Manifest, whole: bool) -> Accuracy:
    if not path.is_file():
        return Accuracy(path.name, "", "stale", detail="the report is missing")
    if sha256(path) != digest:
        return Accuracy(path.name, "", "stale", detail="the report is not the one that was attached")
    report = json.loads(path.read_text(encoding="utf-8"))
    backend, version = report["backend"], report["report_version"]
    if version != REPORT_VERSION:
        detail = f"the report is of version {version}, not {REPORT_VERSION}"
        return Accuracy(path.name, backend, "stale", detail=detail)
    with_ops = f", {ops_run_as(report['kernels'])}" if manifest.kind == "onnx" else ""
    measured_with = f"{report['runtime']}{with_ops}"
    if not whole or report["artefact"] != manifest.artefact_hash():
        return Accuracy(path.name, backend, "stale", measured_with, "the artefact has changed since")
    return Accuracy(path.name, backend, "pass" if report["passed"] else "fail", measured_with)
