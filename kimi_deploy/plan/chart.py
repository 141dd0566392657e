"""Memory against context as a picture: the hybrid beside the same model with full MLA and with full MHA."""

from __future__ import annotations

from pathlib import Path

from kimi_deploy.output_file import whole_file
from kimi_deploy.plan.report import Plan

_SHORTEST = 256
_GB = 1e9


def write_chart(plan: Plan, longest: int, path: Path) -> None:
    """Write a PNG of cache and state memory against context up to `longest` tokens, for the plan's batch."""
    from matplotlib.figure import Figure

    contexts = [_SHORTEST]
    while contexts[-1] < longest:
        contexts.append(min(contexts[-1] * 2, longest))
    constant = plan.batch * plan.kda_state_per_sequence / _GB

    def line(per_token: int, start: float = 0.0) -> list[float]:
        return [start + plan.batch * per_token * n / _GB for n in contexts]

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(contexts, line(plan.full_mha_per_token), "--", color="tab:gray", label="full MHA")
    axes.plot(contexts, line(plan.full_mla_per_token), "-.", color="tab:orange", label="full MLA")
    axes.plot(contexts, line(plan.latent_per_token, constant), color="tab:blue", label=f"{plan.model}: KDA and MLA")
    if plan.device_memory is not None:
        free = (plan.device_memory - plan.memory.weights - plan.memory.activations - plan.memory.reserve) / _GB
        if free > 0:
            axes.axhline(free, color="tab:red", linewidth=1, label=f"{plan.device or 'device'}: free beside weights")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="context (tokens per sequence)",
        ylabel="states and cache (GB)",
        title=f"{plan.model}, {plan.dtype}, batch {plan.batch}",
    )
    axes.set_xscale("log", base=2)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
