"""One IOBinding, kept from step to step: only what changes is bound again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from kimi_deploy.contract import (
    CAPACITY,
    INPUT_IDS,
    LOGITS,
    LOGITS_INDICES,
    PAST_LENGTHS,
    SEQUENCE_LENGTHS,
    GraphContract,
    StateTensor,
)
from kimi_deploy.errors import BackendError
from kimi_deploy.runtime.base import Call

_ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}

_SPARE_LOGITS = 8


class _Prefix:
    """The part of a latent cache that one step uses, bound by each.

    `IOBinding.bind_input` and `bind_output` look up the device by its name in every call, which takes longer than the
    binding itself inside a decode step, with cold caches. So this calls what they call.
    """

    def __init__(
        self, binding: ort.IOBinding, state: StateTensor, device: str, device_id: int, past: int, present: int
    ) -> None:
        self._bind_input, self._bind_output = binding._iobinding.bind_input, binding._iobinding.bind_output
        self._past_name, self._present_name = state.past_name, state.present_name
        self._device = _c_device(device, device_id)
        self._element = _ELEMENT_TYPES[state.dtype]
        self._past, self._present = past, present
        self._shape, self._axis = list(state.shape(1, 0)), state.dims.index(CAPACITY)

    def bind(self, used: int) -> None:
        """Bind the first `used` tokens."""
        self._shape[self._axis] = used
        self._bind_input(self._past_name, self._device, self._element, self._shape, self._past)
        self._bind_output(self._present_name, self._device, self._element, self._shape, self._present)


class Step:
    """Reads the states at one set of addresses and writes them at another.

    With batch 1 a latent cache is bound as the part that is in use after the step, a prefix of the buffer: the
    graph sees a cache without unused capacity, and its work grows with the context alone. Rows of a larger batch lie
    `capacity` tokens apart, so there the whole cache is bound.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        contract: GraphContract,
        device: str,
        device_id: int,
        batch: int,
        capacity: int,
        past: Mapping[str, int],
        present: Mapping[str, int],
    ) -> None:
        self._session, self._contract = session, contract
        self._device = device
        self._binding: ort.IOBinding = session.io_binding()
        self._inputs: dict[str, np.ndarray] = {}
        self._bind_output, self._host = self._binding._iobinding.bind_output, _c_device("cpu", 0)
        self._constants: dict[str, np.ndarray] = {}
        self._spare: list[tuple[np.ndarray, int]] = []
        self._has_past_lengths = contract.has_latent
        self._prefixes: list[_Prefix] = []
        for state in contract.states:
            element = _ELEMENT_TYPES[state.dtype]
            addresses = past[state.past_name], present[state.past_name]
            shape = state.shape(batch, capacity)
            self._binding.bind_input(state.past_name, device, device_id, element, shape, addresses[0])
            self._binding.bind_output(state.present_name, device, device_id, element, shape, addresses[1])
            if state.kind == "latent" and batch == 1:
                self._prefixes.append(_Prefix(self._binding, state, device, device_id, *addresses))

    def run(self, call: Call) -> np.ndarray:
        """Logits float32 [batch, num_logits, vocab] of a checked call, in an array of their own.

        Raises BackendError when ONNX Runtime fails.
        """
        self._set_input(INPUT_IDS, call.input_ids)
        self._set_input(SEQUENCE_LENGTHS, call.sequence_lengths)
        self._set_input(LOGITS_INDICES, call.logits_indices)
        if self._has_past_lengths:
            self._set_input(PAST_LENGTHS, call.past_lengths)
        if self._prefixes:
            used = call.past_lengths.item() + call.input_ids.shape[1]
            for prefix in self._prefixes:
                prefix.bind(used)
        logits, address = self._new_logits((*call.logits_indices.shape, self._contract.vocab_size))
        self._bind_output(LOGITS, self._host, TensorProto.FLOAT, logits.shape, address)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(
                "ONNX Runtime failed in a step; the state is as it was before it",
                seen=str(error).splitlines()[0][:400],
                fix="check free memory; a long prompt takes less in smaller chunks",
            ) from error
        return logits

    def _new_logits(self, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
        """An array for the logits of one call, which then belongs to the caller, and its address.

        To bind a new one takes less than to copy the logits out of an old one. Of a decode step's the next few are made
        at once: the code that makes them is read from memory for the first, in the cache for the others.
        """
        if not self._spare or self._spare[-1][0].shape != shape:
            arrays = [np.empty(shape, np.float32) for _ in range(_SPARE_LOGITS if shape[:2] == (1, 1) else 1)]
            self._spare = [(array, array.__array_interface__["data"][0]) for array in arrays]
        return self._spare.pop()

    def _set_input(self, name: str, value: np.ndarray) -> None:
        if self._constants.get(name) is value:
            return
        bound = self._inputs.get(name)
        # a device with its own memory copies an input when it is bound, so there it is bound anew each time
        if bound is not None and bound.shape == value.shape and self._device == "cpu":
            bound[...] = value
        else:
            self._inputs[name] = value.copy()
            self._binding.bind_cpu_input(name, self._inputs[name])
        if value.flags.writeable:
            self._constants.pop(name, None)
        else:
            self._constants[name] = value


def _c_device(device: str, device_id: int) -> object:
    return ort.OrtDevice.make(device, device_id)._get_c_device()
