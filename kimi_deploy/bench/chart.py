"""A report as a picture: bars of the runtimes at one point, lines over the points of a sweep. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kimi_deploy.bench.report import Point, Report
from kimi_deploy.output_file import whole_file
from kimi_deploy.quantization.scheme import describe_precision

_FLOOR = {"color": "black", "linestyle": "--", "linewidth": 1}
_MARKERS = "osD^v<>P"


def write_chart(report: Report, path: Path) -> None:
    """Write a PNG: milliseconds of prefill and decode, or tokens per second where there are several points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, phase in zip(panels, ("prefill", "decode"), strict=True):
        if len(report.points) == 1:
            _bars(axes, report.points[0], phase)
        else:
            _lines(axes, report.points, phase)
        axes.legend(frameon=False)
    export = report.export
    figure.suptitle(f"{export['name']}, exported in {describe_precision(export)}, {report.settings.threads} threads")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _bars(axes: Any, point: Point, phase: str) -> None:
    names = list(point.results)
    spreads = [getattr(result, phase) for result in point.results.values()]
    medians = [1e3 * s.median for s in spreads]
    below_above = [[1e3 * (s.median - s.p10) for s in spreads], [1e3 * (s.p90 - s.median) for s in spreads]]
    bars = axes.bar(names, medians, yerr=below_above, capsize=4, color=[f"C{i}" for i in range(len(names))], width=0.6)
    ratios = [getattr(result.times_of_floor, phase) for result in point.results.values()]
    axes.bar_label(
        bars,
        [f"{m:,.{0 if m >= 100 else 1}f} ms\n{r:.2f} x floor" for m, r in zip(medians, ratios, strict=True)],
        padding=3,
    )
    axes.axhline(1e3 * getattr(point.floor.seconds, phase), label="the weights' floor", **_FLOOR)
    tokens = f"{point.batch} x {point.context:,} tokens" if phase == "prefill" else f"a step of batch {point.batch}"
    axes.set(ylabel="ms (bars to 10th and 90th percentile)", title=f"{phase}, {tokens}")
    axes.margins(y=0.2)


def _lines(axes: Any, points: list[Point], phase: str) -> None:
    """Over the batch, a line for each context; over the context where there is one batch."""
    along, other = ("batch", "context") if len({p.batch for p in points}) > 1 else ("context", "batch")
    runtimes = list(points[0].results)
    for row, fixed in enumerate(sorted({getattr(p, other) for p in points})):
        line = sorted((p for p in points if getattr(p, other) == fixed), key=lambda p: int(getattr(p, along)))
        x = [getattr(p, along) for p in line]
        for column, name in enumerate(runtimes):
            y = [getattr(p.results[name].tokens_per_second, phase) for p in line]
            style = {"color": f"C{row * len(runtimes) + column}", "marker": _MARKERS[column % len(_MARKERS)]}
            axes.plot(x, y, label=f"{name}, {other} {fixed:,}", **style)
        tokens = [p.batch * (p.context if phase == "prefill" else 1) for p in line]
        floor = [n / getattr(p.floor.seconds, phase) for n, p in zip(tokens, line, strict=True)]
        # the floor of the weights does not depend on the context
        if row == 0 or other == "batch":
            axes.plot(x, floor, label="at the weights' floor", **_FLOOR)
    axes.set(xscale="log", xlabel=f"{along} ({'sequences' if along == 'batch' else 'tokens'})", ylabel="tokens/s")
    axes.set(title=phase, ylim=(0, None))
    ticks = sorted({getattr(p, along) for p in points})
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.grid(True, alpha=0.3)
