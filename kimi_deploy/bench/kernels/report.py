"""A report of `run_kernel_bench` as a table and as a figure. Times in the report are seconds, errors relative rms.

cases: each with its sizes, `floors` (seconds at the measured ceilings) and `results` by implementation: `eager` and
`graph` (median, p10, p90, count), `best` (the smaller median), `over_floor` (multiples), `errors` of output and state
on two distributions; or `refused`, or `failed`. `left_out`: what did not run in time, `missing`: implementations.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kimi_deploy.output_file import whole_file

HEADERS = ("case", "kernel", "eager (us)", "graph (us)", "x bytes", "x matrix", "error", "slow", "slow state")


def table_rows(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows for HEADERS, a case's implementations in turn."""
    for case in report["cases"]:
        for name, result in case["results"].items():
            if "refused" in result:
                continue
            if "failed" in result:
                yield case["name"], name, "failed:", result["failed"][:60], "", "", "", "", ""
                continue
            over, errors = result["over_floor"], result["errors"]
            yield (
                case["name"],
                name,
                f"{result['eager']['median'] * 1e6:.1f}",
                f"{result['graph']['median'] * 1e6:.1f}" if "graph" in result else "-",
                f"{over['bytes']:.2f}",
                f"{over['matrix']:.2f}" if over["matrix"] else "-",
                f"{errors['initial']['output']:.1e}",
                f"{errors['slow']['output']:.1e}",
                f"{errors['slow']['state']:.1e}",
            )


def series(
    report: dict[str, Any], axis: str, **fixed: object
) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[tuple[int, float]]]]:
    """(x, microseconds) of the best time by implementation, and of each floor, over the cases that are as `fixed`."""
    times: dict[str, list[tuple[int, float]]] = {}
    floors: dict[str, list[tuple[int, float]]] = {}
    cases = [c for c in report["cases"] if all(c[key] == value for key, value in fixed.items())]
    for case in sorted(cases, key=lambda c: c[axis]):
        for name, seconds in case["floors"].items():
            if seconds:
                floors.setdefault(name, []).append((case[axis], seconds * 1e6))
        for name, result in case["results"].items():
            if "best" in result:
                times.setdefault(name, []).append((case[axis], result["best"] * 1e6))
    return times, floors


def plot(report: dict[str, Any], path: Path) -> None:
    """Prefill over steps and decode over batch at 32 heads, softplus gate. ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels: tuple[tuple[str, str, dict[str, object]], ...] = (
        ("prefill, one row", "steps", {"kind": "prefill", "batch": 1}),
        ("decode, one step", "batch", {"kind": "decode"}),
    )
    for axes, (title, axis, fixed) in zip(figure.subplots(1, 2), panels, strict=True):
        times, floors = series(report, axis, heads=32, gate="softplus", ragged=False, **fixed)
        for name, points in times.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        for name, points in floors.items():
            axes.plot(*zip(*points, strict=True), linestyle=":", color="gray", label=f"floor: {name}")
        axes.set(title=f"{title}, 32 heads, softplus gate", xlabel=axis, ylabel="microseconds")
        if times:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(f"KimiDeltaAttention on {report['device']['name']}, bfloat16")
    figure.savefig(path, dpi=130)


def write_json(report: dict[str, Any], folder: Path) -> None:
    """kernels.json in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "kernels.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def write_plot(report: dict[str, Any], folder: Path) -> None:
    """kernels.png in `folder`, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is not None:
        plot(report, folder / "kernels.png")
