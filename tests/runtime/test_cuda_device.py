"""The CUDA device that the TensorRT runner uses: memory, graphs and the greedy choice, without any TensorRT."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kimi_deploy.contract import INPUT_IDS, LOGITS, GraphContract
from kimi_deploy.errors import BackendError
from kimi_deploy.runtime import cuda_device
from kimi_deploy.runtime.cuda_device import CudaDevice
from kimi_deploy.runtime.dlpack import DeviceTensor
from kimi_deploy.runtime.trt_device import DeviceBuffer
from kimi_deploy.runtime.trt_runner import TrtRunner
from kimi_deploy.runtime.trt_session import OnLayer, ProfileLimits
from kimi_deploy.validate.faults.fake_tensorrt import FakeDevice, profile
from tests.capabilities import needs_no_cuda
from tests.runtime.conftest import greedy, random_ids, state_bytes
from tests.runtime.hand_made_graph import hand_made_contract


def test_every_function_and_constant_it_uses_is_in_cuda_python() -> None:
    """No GPU can be asked for in every test run; a misspelt name can be found without one."""
    from cuda.bindings import driver, nvrtc

    tree = ast.parse(inspect.getsource(cuda_device))
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    used = {n for n in names if n.startswith(("cu", "CU", "nvrtc")) and len(n) > 3} - {"c_contiguous"}
    members = set(driver.CUresult.__members__) | set(driver.CUstream_flags.__members__)
    members |= set(driver.CUstreamCaptureMode.__members__)
    assert len(used) > 25
    assert used - set(dir(driver)) - set(dir(nvrtc)) - members == set()


@needs_no_cuda
def test_a_machine_without_a_gpu_is_told_so_in_one_line() -> None:
    with pytest.raises(BackendError, match="no NVIDIA GPU") as error:
        CudaDevice()
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


def argmax(device: CudaDevice | FakeDevice, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = logits.shape
    source, index, value = (DeviceBuffer(device, n) for n in (logits.nbytes, 8 * rows, 4 * rows))
    device.upload(source.address, logits)
    device.argmax(source.address, rows, columns, index.address, value.address)
    result = np.empty(rows, np.int64), np.empty(rows, np.float32)
    device.download(index.address, result[0])
    device.download(value.address, result[1])
    return result


def hostile_logits(rows: int, columns: int) -> np.ndarray:
    """Random, with a tie, all -inf, a NaN after the maximum, and +inf, one per row as far as there are rows."""
    logits = np.random.default_rng(columns).standard_normal((rows, columns)).astype(np.float32)
    logits[0, [columns // 3, columns - 1]] = 9
    if rows > 1:
        logits[1] = -np.inf
        logits[2, columns // 2] = np.nan
        logits[3, columns - 1] = np.inf
    return logits


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 272), (4, 511), (4, 513), (4, 163_840)])
def test_the_greedy_choice_is_numpys(device: CudaDevice, rows: int, columns: int) -> None:
    logits = hostile_logits(rows, columns)
    seen, expected = argmax(device, logits), argmax(FakeDevice(), logits)
    np.testing.assert_array_equal(seen[0], expected[0])
    np.testing.assert_array_equal(seen[1], expected[1])


@pytest.mark.gpu
def test_what_is_copied_in_comes_out(device: CudaDevice) -> None:
    value = np.random.default_rng(0).integers(0, 255, 100_003).astype(np.uint8)
    buffer = DeviceBuffer(device, value.nbytes)
    device.upload(buffer.address, value)
    expected, seen = value.copy(), np.empty_like(value)
    value[...] = 0  # the caller may change it at once
    device.download(buffer.address, seen)
    np.testing.assert_array_equal(seen, expected)
    buffer.zero()
    device.download(buffer.address, seen)
    assert not seen.any()


@pytest.mark.gpu
def test_more_memory_than_there_is_is_a_memory_error(device: CudaDevice) -> None:
    with pytest.raises(MemoryError):
        device.allocate(2**50)


@pytest.mark.gpu
def test_recording_does_nothing_and_a_failed_one_leaves_the_stream_usable(device: CudaDevice) -> None:
    ones = np.ones(4, np.uint8)
    buffer = DeviceBuffer(device, 4)
    device.upload(buffer.address, ones)
    graph = device.capture(buffer.zero)
    seen = np.empty(4, np.uint8)
    device.download(buffer.address, seen)
    assert seen.all(), "recorded work was done"
    device.launch(graph)
    device.download(buffer.address, seen)
    assert not seen.any()

    def fails() -> None:
        buffer.zero()
        raise BackendError("no")

    device.upload(buffer.address, ones)
    with pytest.raises(BackendError, match="no"):
        device.capture(fails)
    device.download(buffer.address, seen)
    assert seen.all()
    device.launch(graph)
    device.download(buffer.address, seen)
    assert not seen.any()


class TorchSession:
    """A recurrence written with PyTorch on the runner's memory and stream, in place of an engine.

    Every state becomes half of itself plus the newest token; the logits are a running mixture of both.
    """

    fingerprint = "f"

    def __init__(self, device: CudaDevice, aliased: bool) -> None:
        self.contract: GraphContract = hand_made_contract()
        self.profiles: tuple[ProfileLimits, ...] = (profile("decode", 0, 4, 1, 300, 1),)
        self.aliased = frozenset(s.past_name for s in self.contract.states) if aliased else frozenset()
        self.device = device

    scratch_bytes = 0

    def new_context(self, profile: ProfileLimits, on_layer: OnLayer | None = None) -> TorchContext:
        return TorchContext(self)

    def layers(self, profile: ProfileLimits) -> list[dict[str, Any]]:
        return []


class TorchContext:
    def __init__(self, session: TorchSession) -> None:
        self._session = session
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._token = torch.zeros(4, device="cuda")
        self._mixture = torch.zeros(4, session.contract.vocab_size, device="cuda")
        self._columns = torch.linspace(-1, 1, session.contract.vocab_size, device="cuda")
        # the runner's stream does not wait for PyTorch's
        torch.cuda.synchronize()

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._shapes[name] = shape

    def bind(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        device = self._session.device.dlpack_device
        return torch.from_dlpack(DeviceTensor(self, self._addresses[name], shape, dtype, device))

    def enqueue(self) -> None:
        contract = self._session.contract
        batch = self._shapes[INPUT_IDS][0]
        # nothing is allocated: a graph could not record that
        tensors = {
            name: self._tensor(name, self._shapes[s.past_name], "float32")
            for s in contract.states
            for name in (s.past_name, s.present_name)
        }
        ids = self._tensor(INPUT_IDS, (batch, 1), "int64")
        logits = self._tensor(LOGITS, (batch, 1, contract.vocab_size), "float32")
        token, mixture = self._token[:batch], self._mixture[:batch]
        with torch.cuda.stream(torch.cuda.ExternalStream(self._session.device.stream)):
            token.copy_(ids[:, 0])
            for state in contract.states:
                past, present = tensors[state.past_name], tensors[state.present_name]
                torch.mul(past, 0.5, out=present)
                present.add_(token.view(batch, *[1] * (present.dim() - 1)))
            memory = tensors[contract.states[1].present_name][:, 0, 0, 0]
            torch.mul(memory[:, None], self._columns, out=mixture)
            torch.sin(mixture, out=logits[:, 0])


@pytest.mark.gpu
def test_memory_is_copied_on_the_gpu_in_the_order_of_the_stream(device: CudaDevice) -> None:
    value, seen = np.arange(64, dtype=np.uint8), np.empty(64, np.uint8)
    first, second = DeviceBuffer(device, 64), DeviceBuffer(device, 64)
    second.zero()
    device.upload(first.address, value)
    device.copy(second.address + 8, first.address + 16, 40)
    first.zero()
    device.download(second.address, seen)
    np.testing.assert_array_equal(seen, np.concatenate([np.zeros(8), value[16:56], np.zeros(16)]))


@pytest.mark.gpu
@pytest.mark.parametrize("aliased", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_200_replayed_steps_equal_200_eager_ones_on_the_gpu(device: CudaDevice, batch: int, aliased: bool) -> None:
    runners = [TrtRunner(TorchSession(device, aliased), device, graphs=graphs) for graphs in (True, False)]
    states = [runner.new_state(batch, 256) for runner in runners]
    results = [greedy(r, s, np.arange(batch) + 5, 200) for r, s in zip(runners, states, strict=True)]
    np.testing.assert_array_equal(*results)
    assert state_bytes(states[0]) == state_bytes(states[1])
    storage = states[0].storage
    assert set(storage.buffers.graphs) == {(0, 256), (1, 256)}, "the steps were not replayed"  # type: ignore[attr-defined]
    assert runners[0]._graphs


@pytest.mark.gpu
def test_a_state_is_seen_by_pytorch_without_a_copy(device: CudaDevice) -> None:
    runner = TrtRunner(TorchSession(device, False), device)
    state = runner.new_state(2, 64)
    runner.forward(random_ids(2, 1), state)
    for name, expected in state.tensors().items():
        tensor = runner.device_tensor(state, name)
        view = torch.from_dlpack(tensor)
        assert view.is_cuda
        assert view.data_ptr() == tensor.address
        np.testing.assert_array_equal(view.cpu().numpy(), expected)


def test_the_kernel_is_beside_the_code_that_compiles_it() -> None:
    source = Path(cuda_device.__file__).with_name("argmax.cu").read_text()
    assert f"kThreads = {cuda_device._ARGMAX_THREADS};" in source
