"""Every kernel on a small batch, ragged for KDA, every allocation its own, for compute-sanitizer to watch."""

import os

# a caching allocator would hide what lies past the end of an array
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from kimi_deploy.kernels.kda import KdaKernels
from kimi_deploy.kernels.library import KernelLibrary
from kimi_deploy.kernels.standard import StandardKernels

HEADS, DIM, WIDTH = 2, 128, 4


def main() -> None:
    torch.manual_seed(0)
    library = KernelLibrary.open()
    run_kda(KdaKernels(library))
    run_standard(StandardKernels(library))


def run_kda(kernels: KdaKernels) -> None:
    lengths = torch.tensor([37, 0, 16], dtype=torch.int32)
    for gate, bound in (("softplus", 0.0), ("bounded", -5.0)):
        attributes = {
            "num_heads": HEADS,
            "head_dim": DIM,
            "norm_eps": 1e-5,
            "scale": DIM**-0.5,
            "gate": gate,
            "gate_lower_bound": bound,
        }
        for run, steps in ((kernels.decode, 1), (kernels.prefill, 37)):
            arrays = make_arrays(len(lengths), steps)
            arrays["sequence_lengths"] = lengths.clamp(max=steps).cuda()
            run(arrays, attributes)
            check_finite(arrays, f"{run.__name__}, {gate}")


def run_standard(kernels: StandardKernels) -> None:
    """Sizes that fill no vector, no warp and no block; states in place."""
    for steps in (1, 37):
        attention = {
            "query": (2, steps, 4 * 100),
            "key": (2, steps, 2 * 100),
            "value": (2, steps, 2 * 30),
            "past_state": (2, 2, 100, 30),
            "decay": (2, steps, 2),
            "beta": (2, steps, 2),
            "output": (2, steps, 4 * 30),
        }
        conv = {"input": (3, 50, steps), "weight": (50, 1, 4), "past_state": (3, 50, 3), "output": (3, 50, steps)}
        for run, shapes, attributes in (
            (kernels.linear_attention, attention, {"q_num_heads": 4, "kv_num_heads": 2}),
            (kernels.causal_conv, conv, {"activation": "silu"}),
        ):
            arrays = {name: (torch.rand(shape) - 1).mul(0.1).half().cuda() for name, shape in shapes.items()}
            arrays["present_state"] = arrays["past_state"]
            run(arrays, attributes)
            check_finite(arrays, f"{run.__name__}, {steps} steps")


def check_finite(arrays: dict[str, torch.Tensor], what: str) -> None:
    torch.cuda.synchronize()
    for name, array in arrays.items():
        if (name == "output" or name.startswith("present_")) and not array.isfinite().all():
            raise SystemExit(f"{what}: {name} is not finite everywhere")


def make_arrays(batch: int, steps: int) -> dict[str, torch.Tensor]:
    channels = HEADS * DIM
    shapes = {
        "qkv": (batch, steps, 3 * channels),
        "decay": (batch, steps, channels),
        "beta": (batch, steps, HEADS),
        "output_gate": (batch, steps, channels),
        "conv_weight": (3 * channels, WIDTH),
        "norm_weight": (DIM,),
        "past_conv_state": (batch, 3 * channels, WIDTH - 1),
    }
    # drawn on the host, so that the kernels are all that the tool has to follow
    arrays = {name: torch.randn(shape).to(torch.bfloat16).cuda() for name, shape in shapes.items()}
    floats = {"A_log": (HEADS,), "dt_bias": (channels,), "past_recurrent_state": (batch, HEADS, DIM, DIM)}
    arrays |= {name: torch.randn(shape).cuda() for name, shape in floats.items()}
    arrays["output"] = torch.empty_like(arrays["decay"])
    for state in ("conv_state", "recurrent_state"):
        arrays[f"present_{state}"] = torch.empty_like(arrays[f"past_{state}"])
    return arrays


if __name__ == "__main__":
    main()
