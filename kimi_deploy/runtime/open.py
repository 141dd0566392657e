"""Which runner runs a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kimi_deploy.errors import UsageError
from kimi_deploy.folder_kind import CONFIG_NAME, MANIFEST_NAME, no_model
from kimi_deploy.manifest import Manifest
from kimi_deploy.model_folder import require_folder
from kimi_deploy.runtime.base import Runner

Backend = Literal["ort", "torch", "trt"]
BACKENDS: tuple[Backend, ...] = ("ort", "torch", "trt")


def find_backend(folder: Path, wanted: str | None = None) -> Backend:
    """The backend that runs `folder`: "ort" an export, "torch" a checkpoint, "trt" an engine.

    Raises WrongArtefactError when it holds none of them, UsageError when it is another than the `wanted` one, with the
    command that makes what that needs.
    """
    require_folder(folder, "an export, a checkpoint or an engine")
    backend: Backend
    if (folder / MANIFEST_NAME).is_file():
        manifest = Manifest.read(folder)
        if manifest.kind != "engine":
            manifest.check_kind("onnx")
        backend, what = ("trt", "an engine") if manifest.kind == "engine" else ("ort", "an export")
    elif (folder / CONFIG_NAME).is_file():
        backend, what = "torch", "a checkpoint"
    else:
        raise no_model(folder)
    if wanted not in (None, backend):
        fixes = {
            "ort": f"kimi-deploy export {folder} -o DIR, then give DIR"
            if backend == "torch"
            else "give the export's folder, or leave --backend out",
            "torch": "give the checkpoint's folder, or leave --backend out",
            "trt": f"kimi-deploy build-engine {folder if backend == 'ort' else 'EXPORT'} -o DIR, then give DIR",
        }
        needs = {"ort": "an export", "torch": "a checkpoint", "trt": "an engine"}
        raise UsageError(
            f"backend {wanted} cannot run this folder",
            seen=f"{folder} is {what}",
            expected=needs.get(str(wanted), f"a backend of {', '.join(BACKENDS)}"),
            fix=fixes.get(str(wanted), "leave --backend out"),
        )
    return backend


def check_folder(folder: Path, wanted: str | None = None) -> Backend:
    """`find_backend`, and for an artefact the size of each of its files: what can be known before a runner is opened.

    Raises as `find_backend` does, and ManifestError when a file is missing or of another size.
    """
    backend = find_backend(folder, wanted)
    if backend != "torch":
        Manifest.read(folder).verify(folder, hashes=False)
    return backend


def open_runner(
    folder: Path,
    backend: str | None = None,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    kernels: str | Path = "auto",
) -> Runner:
    """The runner for `folder` on `provider` ("cpu" or "cuda") with so many CPU threads, None for the default; an
    engine has its own device. `kernels` is OrtRunner's.

    Raises UsageError for the path of a library of kernels where nothing would run them, and as `find_backend` and the
    runner's constructor do.
    """
    found = find_backend(folder, backend)
    if found != "ort" and kernels not in ("auto", "none"):
        raise UsageError(
            "kernels of a library run on ONNX Runtime alone",
            seen=f"--kernels {kernels}; {folder} runs on {found}",
            expected="an export",
            fix="leave --kernels out",
        )
    if found == "trt":
        from kimi_deploy.runtime.trt_runner import open_trt_runner

        return open_trt_runner(folder)
    if found == "ort":
        from kimi_deploy.runtime.ort_runner import OrtRunner

        return OrtRunner(folder, provider=provider, threads=threads, kernels=kernels)
    from kimi_deploy.runtime.torch_runner import TorchRunner

    return TorchRunner(folder, device=provider, threads=threads)
