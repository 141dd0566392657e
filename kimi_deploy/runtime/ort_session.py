"""Opening an exported graph in ONNX Runtime and reading its interface."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from kimi_deploy.contract import METADATA_KEY, GraphContract
from kimi_deploy.errors import BackendError, ContractError, UsageError
from kimi_deploy.runtime.heap import trim
from kimi_deploy.runtime.huge_pages import collapse_new, private_memory
from kimi_deploy.runtime.ort_kernels import OrtKernels
from kimi_deploy.runtime.ort_tokenwise import NAME as TOKENWISE
from kimi_deploy.runtime.ort_tokenwise import fuse
from kimi_deploy.runtime.ort_weights import kernel_weights

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NO_KERNEL = {
    "cpu": "export with --dtype float32 or float16: on the CPU it has no bfloat16 kernels, whatever the --body",
    "cuda": "export with another --body, or with --dtype float32",
}
_DTYPES = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16", "int64": "int64", "int32": "int32"}


_FIRST_WITH_OPSET_27 = (1, 32)


def _allow_opset_27() -> None:
    """Let ONNX Runtime 1.31 load opset 27, which it executes but refuses unless this variable says otherwise.

    onnxruntime-gpu on PyPI is a release behind onnxruntime; the variable is read when a model is loaded, and the
    warnings that replace the refusal come from the default logger.
    """
    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < _FIRST_WITH_OPSET_27:
        os.environ["ALLOW_RELEASED_ONNX_OPSET_ONLY"] = "0"
        ort.set_default_logger_severity(3)


def open_session(
    model: Path,
    provider: str,
    threads: int | None,
    device_id: int,
    profile: Path | None = None,
    graph: bytes | None = None,
    kernels: OrtKernels | None = None,
) -> ort.InferenceSession:
    """A session on one provider; `threads` for one operator, None for one per physical core.

    `profile` is how the name of a profile begins, None for no profile. `graph` is a serialised model to
    load in the place of `model`, with the weights that lie beside that. `kernels` run the ops that they cover.

    `provider` is a key of PROVIDERS. Raises UsageError for another, BackendError when the provider is not there or
    the graph cannot be loaded.
    """
    name = _available_provider(provider)
    _allow_opset_27()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # a plan is kept per input shape, and a decode step of batch 1 has a new one each time: 7 kB per token, without end
    options.enable_mem_pattern = False
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if threads is not None:
        options.intra_op_num_threads = threads
    weights: _Weights = {}
    if kernels is not None:
        kernels.register(options)
        graph, weights = _for_kernels(model, graph, kernels)
        for weight, (_, value) in weights.items():
            options.add_initializer(weight, value)
    if graph is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
    providers: list[object] = [name]
    if provider == "cuda":
        ort.preload_dlls()
        # it rounds the inputs of float32 products to TF32's 10 bits unless told not to
        providers = [(name, {"device_id": device_id, "use_tf32": "0"}), PROVIDERS["cpu"]]
    before = private_memory()
    try:
        session = _Session(weights, str(model) if graph is None else graph, options, providers=providers)
    except Exception as error:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} cannot load the graph",
            seen=f"{model}: {str(error).splitlines()[0][:400]}",
            fix=_NO_KERNEL[provider]
            if isinstance(error, NoKernel)
            else "copy the export again, or export again with this version",
        ) from error
    if session.get_providers()[0] != name:
        # a provider whose libraries do not load is left out with no more than a warning
        raise BackendError(
            f"ONNX Runtime could not start {name}",
            seen=f"running on {session.get_providers()}",
            expected="the CUDA and cuDNN libraries that this onnxruntime-gpu was built for",
            fix="pip install 'onnxruntime-gpu[cuda,cudnn]', or use --provider cpu",
        )
    trim()
    if provider == "cpu":
        collapse_new(before)
    return session


_Weights = dict[str, tuple[np.ndarray, ort.OrtValue]]
"""Memory, and ONNX Runtime's view of it, which keeps none."""


class _Session(ort.InferenceSession):
    """A session that keeps the weights it was given: ONNX Runtime reads them where they are."""

    def __init__(self, weights: _Weights, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self._weights = weights


def _for_kernels(model: Path, graph: bytes | None, kernels: OrtKernels) -> tuple[bytes | None, _Weights]:
    """The graph as the kernels run it, and the weights that they read."""
    serialised = model.read_bytes() if graph is None else graph
    proto = onnx.load_from_string(serialised)
    sources = {}
    for i in proto.graph.initializer:
        sources[i.name] = onnx.TensorProto()
        sources[i.name].CopyFrom(i)
    transposed = fuse(proto) if TOKENWISE in kernels.abis else {}
    if not transposed:
        return graph, {}
    arrays = kernel_weights(proto, transposed, sources, model.parent, kernels.abis)
    weights = {name: (array, ort.OrtValue.ortvalue_from_numpy(array)) for name, array in arrays.items()}
    return proto.SerializeToString(), weights


def _available_provider(provider: str) -> str:
    if provider not in PROVIDERS:
        raise UsageError("unknown provider", seen=provider, expected=" or ".join(PROVIDERS))
    name = PROVIDERS[provider]
    available = ort.get_available_providers()
    if name not in available:
        raise BackendError(
            f"this ONNX Runtime has no {name}",
            seen=f"onnxruntime {ort.__version__} with {available}",
            fix="pip uninstall onnxruntime && pip install onnxruntime-gpu, or use --provider cpu",
        )
    return name


def read_contract(session: ort.InferenceSession) -> GraphContract:
    """The contract in the model's metadata, checked against the graph's inputs and outputs.

    Raises ContractError when there is none or the graph is not what it says.
    """
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise ContractError(
            "the graph has no contract in its metadata",
            expected=f"metadata {METADATA_KEY!r}",
            fix="run a graph written by `kimi-deploy export`",
        )
    contract = GraphContract.from_json(text)
    for kind, specs, values in (
        ("inputs", contract.inputs, session.get_inputs()),
        ("outputs", contract.outputs, session.get_outputs()),
    ):
        wanted = {s.name: (s.dtype, len(s.dims)) for s in specs}
        seen = {v.name: (_DTYPES.get(v.type[7:-1], v.type), len(v.shape)) for v in values}
        if seen != wanted:
            wrong = sorted(n for n in wanted.keys() | seen.keys() if wanted.get(n) != seen.get(n))[0]
            raise ContractError(
                f"the graph's {kind} are not those of its contract",
                seen=f"{wrong}: {seen.get(wrong, 'missing')}",
                expected=f"{wanted.get(wrong, 'no such name')}",
                fix="export the model again with this version",
            )
    return contract
