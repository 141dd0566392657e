"""The PyTorch source model behind the runner's interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kimi_deploy.checkpoint import Checkpoint
from kimi_deploy.contract import Dtype, GraphContract
from kimi_deploy.errors import BackendError, UsageError
from kimi_deploy.model import KimiLinearForCausalLM, load_model
from kimi_deploy.runtime.base import Call, Runner
from kimi_deploy.runtime.state import State
from kimi_deploy.runtime.storage import NUMPY_DTYPES


class TorchRunner(Runner):
    """Runs a checkpoint with the source model; every step makes new state tensors."""

    def __init__(
        self, folder: Path | str, dtype: Dtype = "float32", device: str = "cpu", threads: int | None = None
    ) -> None:
        """Load the checkpoint in `folder`. `threads` sets PyTorch's CPU threads for the whole process.

        Raises ConfigError or CheckpointError for a bad checkpoint, UsageError for a device that is not "cpu" or "cuda",
        and BackendError for CUDA where there is none.
        """
        if device not in ("cpu", "cuda"):
            raise UsageError("unknown device", seen=device, expected="cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError(
                "PyTorch has no CUDA device",
                seen=f"torch {torch.__version__}",
                fix="install PyTorch for CUDA on a machine with an NVIDIA GPU, or use --provider cpu",
            )
        if threads is not None:
            torch.set_num_threads(threads)
        checkpoint = Checkpoint.open(folder)
        self.fingerprint = checkpoint.fingerprint()
        self.contract = GraphContract.of(checkpoint.config, dtype)
        self.model = load_model(folder, dtype=dtype, device=device).eval()
        self._device = device

    def _new_storage(self, batch: int, capacity: int) -> TorchStorage:
        return TorchStorage(self.model, self.contract, batch, capacity)

    def _run(self, call: Call, state: State) -> np.ndarray:
        storage = state.storage
        assert isinstance(storage, TorchStorage)

        def tensor(value: np.ndarray) -> torch.Tensor:
            # a copy: the arrays of a call belong to the caller
            return torch.tensor(value, device=self._device)

        with torch.inference_mode():
            logits, tensors = self.model(
                tensor(call.input_ids),
                storage.tensors | {"lengths": tensor(call.past_lengths)},
                tensor(call.sequence_lengths),
                logits_indices=tensor(call.logits_indices),
            )
        storage.tensors = {name: tensors[name] for name in storage.tensors}
        result: np.ndarray = logits.cpu().numpy()
        return result


class TorchStorage:
    """State tensors of the source model, keyed "layer.kind"; on the CPU they are read without a copy."""

    def __init__(self, model: KimiLinearForCausalLM, contract: GraphContract, batch: int, capacity: int) -> None:
        self._model, self._contract, self._capacity = model, contract, capacity
        self._keys = {s.past_name: f"{s.layer}.{s.kind}" for s in contract.states}
        self._dtypes = {s.past_name: NUMPY_DTYPES[s.dtype] for s in contract.states}
        fresh = model.new_state(batch, capacity)
        self.tensors: dict[str, torch.Tensor] = {key: fresh[key] for key in self._keys.values()}

    def read(self, name: str) -> np.ndarray:
        # NumPy knows no bfloat16: the bits go through integers
        bits = self.tensors[self._keys[name]].detach().contiguous().view(torch.uint8).cpu().numpy()
        return bits.view(self._dtypes[name])

    def write(self, name: str, value: np.ndarray) -> None:
        bits = torch.from_numpy(np.array(value, self._dtypes[name], order="C").view(np.uint8))
        target = self.tensors[self._keys[name]]
        self.tensors[self._keys[name]] = bits.to(target.device).view(target.dtype)

    def empty_like(self, batch: int) -> TorchStorage:
        return TorchStorage(self._model, self._contract, batch, self._capacity)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())
