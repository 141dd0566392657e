"""Times on both sides of the sizes where kernels change: `python -m kimi_deploy.bench.kernels.thresholds [--json]`.

KimiDeltaAttention with 32 heads of 128: decode and prefill on the same few steps (kMostDecodedSteps). MixtureOfExperts
as a layer of the 48B model, 256 experts, 8 a token, hidden 2304, intermediate 1024: the choice follows the tokens
(kMostFewTokens). bfloat16, weights and states never in the cache.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from kimi_deploy.bench.kernels.cases import Case
from kimi_deploy.bench.kernels.command import run_measurement
from kimi_deploy.bench.kernels.device import describe_device, measure_ceilings, require_device
from kimi_deploy.kernels.kda import KdaKernels
from kimi_deploy.kernels.library import KernelLibrary
from kimi_deploy.kernels.moe import MoeKernels
from kimi_deploy.ops.spec import AttributeValue

if TYPE_CHECKING:
    import torch

    from kimi_deploy.bench.kernels.inputs import Tensors

KDA_STEPS = (1, 2, 4, 8, 12, 16, 24, 32, 64)
MOE_TOKENS = (1, 2, 4, 6, 7, 8, 9, 10, 12, 16, 32, 64, 256, 1024, 2048)
HIDDEN, INNER, EXPERTS, TOP_K = 2304, 1024, 256, 8
MOE_ATTRIBUTES: dict[str, AttributeValue] = {
    "num_experts": EXPERTS,
    "intermediate": INNER,
    "top_k": TOP_K,
    "n_group": 1,
    "topk_group": 1,
    "renormalize": 1,
    "routed_scaling_factor": 2.446,
}


def _kda(library: KernelLibrary, steps: int, l2_bytes: int) -> dict[str, Any]:
    """Seconds of decode and of prefill on one row of `steps` steps."""
    import torch

    from kimi_deploy.bench.kernels.inputs import attributes_of, make_inputs
    from kimi_deploy.bench.kernels.timing import graph_seconds, input_sets

    kernels, case = KdaKernels(library), Case("prefill", "softplus", 32, 1, steps)
    sets = []
    for _ in range(input_sets(case.bytes, l2_bytes)):
        arrays = make_inputs(case, "initial")
        arrays |= {f"present_{s}": arrays[f"past_{s}"] for s in ("conv_state", "recurrent_state")}
        sets.append(arrays | {"output": torch.empty_like(arrays["decay"])})
    attributes = attributes_of(case)
    workspace = torch.empty(kernels.workspace_size(sets[0], attributes), dtype=torch.uint8, device="cuda")

    def decode(arrays: Tensors) -> None:
        kernels.decode(arrays, attributes, stream=torch.cuda.current_stream().cuda_stream)

    def prefill(arrays: Tensors) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        kernels.prefill(arrays, attributes, workspace=workspace, stream=stream)

    seconds = {f.__name__: graph_seconds([partial(f, a) for a in sets])["median"] for f in (decode, prefill)}
    return {"steps": steps, **seconds}


def _moe_weights() -> dict[str, torch.Tensor]:
    import torch

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5

    return {
        "router_weight": 2 * random(EXPERTS, HIDDEN),
        "router_bias": 0.05 * torch.randn(EXPERTS, device="cuda"),
        "gate_up_weight": random(EXPERTS, 2 * INNER, HIDDEN),
        "down_weight": random(EXPERTS, HIDDEN, INNER),
    }


def _moe(library: KernelLibrary, weights: dict[str, torch.Tensor], tokens: int) -> dict[str, Any]:
    """Seconds of the op on `tokens` tokens, and the bytes of the experts that they choose."""
    import torch

    from kimi_deploy.bench.kernels.timing import graph_seconds

    kernels = MoeKernels(library)
    # other tokens each time choose other experts: few of a layer's 3.6 GB are in the cache from before
    sets = []
    for _ in range(16):
        x = torch.randn(1, tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        sets.append(weights | {"hidden_states": x, "output": torch.empty_like(x)})
    workspace = torch.empty(kernels.workspace_size(sets[0], MOE_ATTRIBUTES), dtype=torch.uint8, device="cuda")

    def call(arrays: dict[str, torch.Tensor]) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        kernels.run(arrays, MOE_ATTRIBUTES, workspace=workspace, stream=stream)

    seconds = graph_seconds([partial(call, arrays) for arrays in sets])
    logits = sets[0]["hidden_states"][0].float() @ weights["router_weight"].float().T
    chosen = (logits.sigmoid() + weights["router_bias"]).topk(TOP_K).indices.unique().numel()
    return {
        "tokens": tokens,
        "seconds": seconds["median"],
        "expert_bytes": chosen * 3 * HIDDEN * INNER * 2,
        "operations": tokens * TOP_K * 3 * HIDDEN * INNER * 2,
    }


def measure() -> dict[str, Any]:
    """Median seconds by size, replayed from a CUDA graph. Raises BackendError without a device or the library."""
    require_device()
    library, device = KernelLibrary.open(), describe_device()
    ceilings = measure_ceilings()
    kda = [_kda(library, steps, device["l2_bytes"]) for steps in KDA_STEPS]
    weights = _moe_weights()
    moe = [_moe(library, weights, tokens) for tokens in MOE_TOKENS]
    for entry in moe:
        entry["byte_floor"] = ceilings.byte_floor(entry["expert_bytes"])
        entry["matrix_floor"] = ceilings.matrix_floor(entry["operations"])
    return {"device": device, "ceilings": ceilings.to_dict(), "kda": kda, "moe": moe}


def print_tables(measured: dict[str, Any]) -> None:
    print("KimiDeltaAttention, us: steps, decode, prefill")
    for r in measured["kda"]:
        print(f"{r['steps']:6} {r['decode'] * 1e6:10.1f} {r['prefill'] * 1e6:10.1f}")
    print("MixtureOfExperts, us: tokens, call, chosen experts' bytes at copy speed, operations at the matrix units'")
    for r in measured["moe"]:
        print(f"{r['tokens']:6} " + " ".join(f"{r[n] * 1e6:10.1f}" for n in ("seconds", "byte_floor", "matrix_floor")))


if __name__ == "__main__":
    run_measurement(__doc__, measure, print_tables)
