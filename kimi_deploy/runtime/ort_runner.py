"""ONNX Runtime: the exported graph with its states bound by address, so that a step copies none of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kimi_deploy.errors import BackendError, UsageError
from kimi_deploy.manifest import Manifest, sha256
from kimi_deploy.ops.quantized_mixture_of_experts.spec import SPEC as QUANTIZED_EXPERTS
from kimi_deploy.runtime.base import Call, Runner
from kimi_deploy.runtime.ort_kernels import OrtKernels
from kimi_deploy.runtime.ort_session import open_session, read_contract
from kimi_deploy.runtime.ort_storage import OrtStorage
from kimi_deploy.runtime.state import State

MODEL_NAME = "model.onnx"


class OrtRunner(Runner):
    """Runs an export on ONNX Runtime's CPU or CUDA provider; on CUDA the states stay in device memory."""

    def __init__(
        self,
        path: Path | str,
        provider: str = "cpu",
        threads: int | None = None,
        device_id: int = 0,
        profile: Path | None = None,
        graph: bytes | None = None,
        kernels: str | Path = "auto",
    ) -> None:
        """Open an export folder, checked against its manifest, or a model file, taken as it is.

        With `profile` ONNX Runtime records its kernels, for a file whose name begins so: see `end_profiling`. `graph`
        is a serialised model to run on that export's weights in the place of its own. `kernels` is the library whose
        kernels run our ops on the CPU: "auto" the one that `make cpu-kernels` built, if it did, "none", or a path; what
        it does not cover is run by function bodies. `self.kernels` says what it runs.
        Raises UsageError for a library's path with another provider than the CPU, ManifestError or ContractError when
        the folder is not a whole export of this version, and BackendError when ONNX Runtime cannot run it or the
        library cannot be used.
        """
        if provider != "cpu" and kernels not in ("auto", "none"):
            raise UsageError(
                "kernels of a library run on the CPU alone",
                seen=f"--provider {provider} --kernels {kernels}",
                fix="use --provider cpu, or leave --kernels out",
            )
        path = Path(path)
        if path.is_file():
            model, self.fingerprint = path, f"model:{sha256(path)}"
        else:
            manifest = Manifest.read(path)
            manifest.check_kind("onnx")
            # the hashes would take longer than loading does; `inspect` checks them
            manifest.verify(path, hashes=False)
            manifest.check_op_abi()
            if provider == "cuda":
                _check_runs_on_cuda(manifest)
            model, self.fingerprint = path / MODEL_NAME, str(manifest.source["checkpoint"])
        library = OrtKernels.find(kernels) if provider == "cpu" else None
        self.kernels = None if library is None else library.covers(model.read_bytes() if graph is None else graph)
        library = library if self.kernels else None
        self._session = open_session(model, provider, threads, device_id, profile, graph, library)
        self.contract = read_contract(self._session)
        self._device, self._device_id = provider, device_id

    def end_profiling(self) -> str:
        """Write what was recorded since the runner was opened with `profile`; returns the file's path."""
        return str(self._session.end_profiling())

    def _new_storage(self, batch: int, capacity: int) -> OrtStorage:
        return OrtStorage(self._session, self.contract, self._device, self._device_id, batch, capacity)

    def _run(self, call: Call, state: State) -> np.ndarray:
        storage = state.storage
        assert isinstance(storage, OrtStorage)
        return storage.step(call)


def _check_runs_on_cuda(manifest: Manifest) -> None:
    """Refuse what the CUDA provider is known to compute wrongly or to lack: some kernels exist for the CPU only."""
    if manifest.details["body"] == "ort":
        raise BackendError(
            "an export with `ort` bodies is wrong on ONNX Runtime's CUDA provider",
            seen="onnxruntime-gpu 1.31.1 on an H100: logits after 140 tokens off by a tenth of their peak",
            expected="`onnx` or `primitive` bodies, which pass `kimi-deploy validate` there",
            fix="export again with --body onnx",
        )
    if QUANTIZED_EXPERTS.name in manifest.op_abi:
        raise BackendError(
            "experts in 4 or 8 bits do not run on ONNX Runtime's CUDA provider",
            seen="onnxruntime-gpu 1.31.1: DequantizeLinear has no kernel for scales per block with levels of this type",
            expected="weights in float32, float16 or bfloat16",
            fix="export again without --quantize, or use --provider cpu",
        )
