"""Times LinearAttention and CausalConvWithState on a GPU: `python -m kimi_deploy.bench.kernels.standard [--json]`.

Sizes of Qwen3-Next's gated delta net: 16 key heads, 32 value heads of 128, a convolution of width 4 over 8,192
channels; bfloat16, the recurrent state float32 and in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kimi_deploy.bench.kernels.command import run_measurement
from kimi_deploy.bench.kernels.device import describe_device, measure_ceilings, require_device
from kimi_deploy.kernels.library import KernelLibrary
from kimi_deploy.kernels.standard import StandardKernels

if TYPE_CHECKING:
    import torch

KEY_HEADS, VALUE_HEADS, HEAD_DIM, WIDTH = 16, 32, 128, 4
CHANNELS = (2 * KEY_HEADS + VALUE_HEADS) * HEAD_DIM
HEADS = {"q_num_heads": KEY_HEADS, "kv_num_heads": VALUE_HEADS}


@dataclass(frozen=True)
class StandardCase:
    """One call with `batch` rows of `steps` steps."""

    op: Literal["LinearAttention", "CausalConvWithState"]
    batch: int
    steps: int

    def arrays(self, device: str) -> dict[str, torch.Tensor]:
        """Random inputs, and outputs, the present state in the past one's memory."""
        import torch

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device).to(torch.bfloat16)

        rows, steps = self.batch, self.steps
        if self.op == "CausalConvWithState":
            arrays = {
                "input": random(rows, CHANNELS, steps),
                "weight": random(CHANNELS, 1, WIDTH),
                "past_state": random(rows, CHANNELS, WIDTH - 1),
                "output": random(rows, CHANNELS, steps),
            }
        else:
            key = torch.nn.functional.normalize(random(rows, steps, KEY_HEADS, HEAD_DIM), dim=-1)
            arrays = {
                "query": random(rows, steps, KEY_HEADS * HEAD_DIM),
                "key": key.reshape(rows, steps, KEY_HEADS * HEAD_DIM),
                "value": random(rows, steps, VALUE_HEADS * HEAD_DIM),
                "decay": -random(rows, steps, VALUE_HEADS).abs(),
                "beta": random(rows, steps, VALUE_HEADS).sigmoid(),
                "past_state": random(rows, VALUE_HEADS, HEAD_DIM, HEAD_DIM).float(),
                "output": random(rows, steps, VALUE_HEADS * HEAD_DIM),
            }
        return arrays | {"present_state": arrays["past_state"]}

    def call(self, kernels: StandardKernels, arrays: dict[str, torch.Tensor], stream: int = 0) -> None:
        if self.op == "CausalConvWithState":
            kernels.causal_conv(arrays, {"activation": "silu"}, stream=stream)
        else:
            kernels.linear_attention(arrays, HEADS, stream=stream)


def cases() -> list[StandardCase]:
    """Decode at four batch sizes, prefill at two lengths, of both operators."""
    shapes = [(batch, 1) for batch in (1, 8, 32, 128)] + [(1, 1024), (1, 8192)]
    return [StandardCase(op, *shape) for op in ("LinearAttention", "CausalConvWithState") for shape in shapes]


def num_bytes(arrays: dict[str, torch.Tensor]) -> int:
    """What a call moves at least: each input read once and each output written once, states in place twice."""
    return sum(a.numel() * a.element_size() for a in arrays.values())


def measure() -> dict[str, Any]:
    """Seconds of every case, inputs not in the cache, without the host's share, and the least that its bytes take.

    Raises BackendError without a CUDA device or the library.
    """
    require_device()
    import torch

    from kimi_deploy.bench.kernels.timing import graph_seconds, input_sets

    kernels = StandardKernels(KernelLibrary.open())
    ceilings, device = measure_ceilings(), describe_device()

    def caller(case: StandardCase, arrays: dict[str, torch.Tensor]) -> Callable[[], None]:
        return lambda: case.call(kernels, arrays, torch.cuda.current_stream().cuda_stream)

    results = []
    for case in cases():
        arrays = case.arrays("cuda")
        moved = num_bytes(arrays)
        sets = [arrays] + [case.arrays("cuda") for _ in range(input_sets(moved, device["l2_bytes"]) - 1)]
        seconds = graph_seconds([caller(case, a) for a in sets])
        floor = ceilings.byte_floor(moved)
        results.append(
            {"op": case.op, "batch": case.batch, "steps": case.steps, "bytes": moved, "floor": floor, **seconds}
        )
    return {"device": device, "ceilings": ceilings.to_dict(), "results": results}


def print_tables(measured: dict[str, Any]) -> None:
    print(f"{'operator':20} {'batch':>5} {'steps':>6} {'us':>10} {'p10':>10} {'p90':>10} {'byte floor':>10}")
    for r in measured["results"]:
        times = " ".join(f"{r[name] * 1e6:10.1f}" for name in ("median", "p10", "p90", "floor"))
        print(f"{r['op']:20} {r['batch']:5} {r['steps']:6} {times}")


if __name__ == "__main__":
    run_measurement(__doc__, measure, print_tables)
