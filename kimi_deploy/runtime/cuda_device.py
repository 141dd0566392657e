"""A CUDA device through cuda-python's driver bindings: no torch, no CUDA toolkit; NVRTC compiles the one kernel."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kimi_deploy.cuda_driver import gpu_devices
from kimi_deploy.errors import BackendError, install_line

_ARGMAX = Path(__file__).with_name("argmax.cu")
_ARGMAX_THREADS = 512
_DLPACK_CUDA = 2
_INSTALL = install_line("run-engine")


def _bindings() -> tuple[Any, Any]:
    """cuda-python's driver and nvrtc modules."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise BackendError("cuda-python is not installed", seen=str(error), fix=_INSTALL) from error
    return driver, nvrtc


class CudaDevice:
    """GPU number `ordinal` with the primary context of this process, which PyTorch and others share, and a stream."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises BackendError, in one line where there is no GPU, when the device cannot be used."""
        devices = gpu_devices()
        if not devices:
            raise BackendError("there is no NVIDIA GPU here: run the export with `kimi-deploy generate` instead")
        if ordinal >= len(devices):
            raise BackendError(f"there is no GPU {ordinal}", seen=f"{len(devices)} GPUs", expected="a smaller number")
        self._driver, self._nvrtc = _bindings()
        cu = self._driver
        self.dlpack_device = (_DLPACK_CUDA, ordinal)
        self._call("starting CUDA", cu.cuInit(0))
        device = self._call("opening the GPU", cu.cuDeviceGet(ordinal))
        self._context = self._call("opening the GPU", cu.cuDevicePrimaryCtxRetain(device))
        self._enter()
        flags = cu.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = self._call("making a stream", cu.cuStreamCreate(flags))
        self.stream = int(self._stream)
        self._argmax = self._compile(devices[ordinal].capability)
        weakref.finalize(self, cu.cuDevicePrimaryCtxRelease, device)

    def _call(self, what: str, result: tuple[Any, ...]) -> Any:
        """The value of a driver call. Raises MemoryError when memory is short, BackendError for any other failure."""
        status, *values = result
        if getattr(status, "name", "") == "CUDA_ERROR_OUT_OF_MEMORY":
            raise MemoryError(f"the GPU has not enough memory for {what}")
        if int(status):
            raise BackendError(f"CUDA failed in {what}", seen=getattr(status, "name", str(status)))
        return values[0] if len(values) == 1 else tuple(values)

    def _enter(self) -> None:
        """The context is current per thread."""
        self._call("entering the context", self._driver.cuCtxSetCurrent(self._context))

    def _compile(self, capability: str) -> Any:
        """The argmax kernel for this GPU."""
        nvrtc = self._nvrtc
        try:
            program = self._call("NVRTC", nvrtc.nvrtcCreateProgram(_ARGMAX.read_bytes(), b"argmax.cu", 0, [], []))
        except (RuntimeError, ImportError) as error:
            # cuda-python looks for the library when it is first called
            raise BackendError("NVRTC is not installed", seen=str(error).splitlines()[0], fix=_INSTALL) from error
        option = f"--gpu-architecture=sm_{capability.replace('.', '')}".encode()
        status = nvrtc.nvrtcCompileProgram(program, 1, [option])
        if int(status[0]):
            log = b" " * self._call("NVRTC", nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise BackendError("NVRTC cannot compile argmax.cu", seen=log.decode(errors="replace").strip("\0 "))
        image = b" " * self._call("NVRTC", nvrtc.nvrtcGetCUBINSize(program))
        self._call("NVRTC", nvrtc.nvrtcGetCUBIN(program, image))
        nvrtc.nvrtcDestroyProgram(program)
        code = np.frombuffer(image, np.uint8)
        self._module = self._call("loading argmax.cu", self._driver.cuModuleLoadData(code.ctypes.data))
        return self._call("loading argmax.cu", self._driver.cuModuleGetFunction(self._module, b"kimi_argmax"))

    def allocate(self, nbytes: int) -> int:
        self._enter()
        return int(self._call(f"{nbytes} bytes", self._driver.cuMemAlloc(nbytes)))

    def free(self, address: int) -> None:
        # also called while the interpreter ends, when the driver may be gone: then there is nothing to free
        if not int(self._driver.cuCtxSetCurrent(self._context)[0]):
            self._driver.cuStreamSynchronize(self._stream)
            self._driver.cuMemFree(address)

    def zero(self, address: int, nbytes: int) -> None:
        self._enter()
        self._call("clearing memory", self._driver.cuMemsetD8Async(address, 0, nbytes, self._stream))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._enter()
        self._call("copying on the GPU", self._driver.cuMemcpyDtoDAsync(target, source, nbytes, self._stream))

    def upload(self, address: int, value: np.ndarray) -> None:
        self._enter()
        assert value.flags.c_contiguous
        # from pageable memory: CUDA has read it all when the call returns
        result = self._driver.cuMemcpyHtoDAsync(address, value.ctypes.data, value.nbytes, self._stream)
        self._call("copying to the GPU", result)

    def download(self, address: int, value: np.ndarray) -> None:
        self._enter()
        assert value.flags.c_contiguous
        result = self._driver.cuMemcpyDtoHAsync(value.ctypes.data, address, value.nbytes, self._stream)
        self._call("copying from the GPU", result)
        self._call("waiting for the GPU", self._driver.cuStreamSynchronize(self._stream))

    def argmax(self, logits: int, rows: int, columns: int, index: int, value: int) -> None:
        self._enter()
        pointer, number = ctypes.c_void_p, ctypes.c_longlong
        arguments = ((logits, columns, index, value), (pointer, number, pointer, pointer))
        grid = (rows, 1, 1, _ARGMAX_THREADS, 1, 1, 0)
        self._call("argmax", self._driver.cuLaunchKernel(self._argmax, *grid, self._stream, arguments, 0))

    def capture(self, work: Callable[[], None]) -> Any:
        self._enter()
        cu = self._driver
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("starting a graph", cu.cuStreamBeginCapture(self._stream, mode))
        try:
            work()
        except BaseException:
            # leaves the capture; whatever was recorded is dropped, nothing was done
            ended = cu.cuStreamEndCapture(self._stream)
            if not int(ended[0]):
                cu.cuGraphDestroy(ended[1])
            raise
        graph = self._call("recording a graph", cu.cuStreamEndCapture(self._stream))
        try:
            return CudaGraph(cu, self._call("making a graph", cu.cuGraphInstantiate(graph, 0)))
        finally:
            cu.cuGraphDestroy(graph)

    def launch(self, graph: CudaGraph) -> None:
        self._enter()
        self._call("a graph", self._driver.cuGraphLaunch(graph.handle, self._stream))


class CudaGraph:
    """An executable graph."""

    def __init__(self, driver: Any, handle: Any) -> None:
        self.handle = handle
        weakref.finalize(self, driver.cuGraphExecDestroy, handle)
