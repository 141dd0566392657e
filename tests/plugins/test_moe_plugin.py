"""The C++ MixtureOfExperts plugin through IPluginV3: results in every dtype, changing shapes, contexts, refusals."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kimi_deploy.ops.plugins import ABI_FIELD, PLUGINS
from kimi_deploy.ops.spec import AttributeValue
from tests.capabilities import needs_tensorrt_headers
from tests.kernels.moe_cases import check_moe, moe_case

from .drive import built, captured, output_tensors
from .host import FIELD_TYPES, Host, Tensor
from .memory import CudaMemory, Memory

pytestmark = needs_tensorrt_headers

SPEC = PLUGINS["MixtureOfExperts"]
Driven = tuple[Host, Memory]


def case(**sizes: object) -> tuple[dict[str, np.ndarray], dict[str, AttributeValue]]:
    """Inputs by port, and the fields of a node."""
    arrays, attributes = moe_case(**sizes)  # type: ignore[arg-type]
    return arrays, {**attributes, ABI_FIELD: SPEC.op.abi}


def attributes_of(fields: dict[str, AttributeValue]) -> dict[str, AttributeValue]:
    return {a.name: fields[a.name] for a in SPEC.op.attributes}


def profile(arrays: dict[str, np.ndarray], *, batch: int, sequence: int) -> list[Tensor]:
    """Descriptors of a profile from one token to these sizes."""
    x, *rest = arrays.values()
    hidden = x.shape[2]
    return [Tensor(x.shape, str(x.dtype), (1, 1, hidden), (batch, sequence, hidden)), *map(Tensor.of, rest)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (2, 3), (2, 20)])
def test_enqueue_computes_the_op(driven: Driven, dtype: str, batch: int, steps: int) -> None:
    arrays, fields = case(batch=batch, steps=steps, dtype=dtype, groups=4, kept_groups=2)
    with built(*driven, SPEC, fields, profile(arrays, batch=2, sequence=24)) as (context,):
        results = context.run(list(arrays.values()))
    check_moe(results["output"], arrays, attributes_of(fields))


def test_one_context_changes_shapes_between_prefill_and_decode(driven: Driven) -> None:
    arrays, fields = case(batch=2, steps=24, dtype="bfloat16")
    with built(*driven, SPEC, fields, profile(arrays, batch=2, sequence=24)) as (context,):
        for start, stop in ((0, 20), (20, 21), (21, 24)):
            part = arrays | {"hidden_states": np.ascontiguousarray(arrays["hidden_states"][:, start:stop])}
            check_moe(context.run(list(part.values()))["output"], part, attributes_of(fields))


def test_contexts_that_run_at_once_do_not_share_anything(driven: Driven) -> None:
    one, fields = case(batch=2, steps=20, dtype="float16", seed=1)
    other, _ = case(batch=1, steps=24, dtype="float16", seed=2)
    two = one | {"hidden_states": other["hidden_states"]}
    with built(*driven, SPEC, fields, profile(one, batch=2, sequence=24), contexts=2) as (first, second):
        second.memory = type(first.memory)()  # a stream of its own
        alone = [first.run(list(one.values())), second.run(list(two.values()))]
        with ThreadPoolExecutor(2) as threads:
            for _ in range(4):
                calls = [threads.submit(second.run, list(one.values())), threads.submit(first.run, list(two.values()))]
                for call, wanted in zip(calls, alone, strict=True):
                    assert call.result()["output"].tobytes() == wanted["output"].tobytes()


def test_the_creator_is_what_the_parser_looks_for(host: Host) -> None:
    assert host.creator_identity("MixtureOfExperts") == ("1", "kimi")
    assert host.field_names("MixtureOfExperts") == {f.name: FIELD_TYPES[f.type] for f in SPEC.fields}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_experts": 4}, "router_weight has the wrong size on axis 0"),
        ({"intermediate": 16}, "gate_up_weight has the wrong size on axis 1"),
        ({"top_k": 9}, "--plugin none"),
        ({ABI_FIELD: "0123456789abcdef"}, "0123456789abcdef"),
    ],
)
def test_what_does_not_fit_is_refused(host: Host, change: dict[str, AttributeValue], says: str) -> None:
    arrays, fields = case()
    tensors = [Tensor.of(a) for a in arrays.values()]
    with host.plugin("MixtureOfExperts", list((fields | change).items())) as plugin:
        assert plugin is None or not plugin.configure(tensors, output_tensors(SPEC, tensors, attributes_of(fields)))
    message = host.messages()
    assert says in message
    assert "kimi::MixtureOfExperts, layer node 7" in message


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 40])
def test_enqueue_is_captured_in_a_cuda_graph(host_library: Path, steps: int) -> None:
    from kimi_deploy.engine.plugin_library import default_path

    arrays, fields = case(batch=2, steps=steps, dtype="bfloat16")
    other = arrays | {"hidden_states": arrays["hidden_states"][::-1].copy()}
    host = Host(host_library, default_path("cuda"))
    with built(host, CudaMemory(), SPEC, fields, profile(arrays, batch=2, sequence=40)) as (context,):
        calls = [list(arrays.values()), list(other.values())]
        expected = [{k: v.tobytes() for k, v in context.run(inputs).items()} for inputs in calls]
        assert list(captured(context, calls)) == expected
    host.close()
