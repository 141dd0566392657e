"""kimi-deploy bench --curve and --long-context: an export on ONNX Runtime against the length of its context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kimi_deploy.cli.common import print_json, print_table, progress

CURVE_LENGTHS = (128, 1024, 2048, 4096, 8192)


def run_curve(export: Path, steps: int, threads: int, kernels: str, as_json: bool) -> None:
    """Measure and print a decode step at each of CURVE_LENGTHS."""
    from kimi_deploy.bench.curve import decode_curve
    from kimi_deploy.runtime.base import kernels_to_dict, ops_run_as
    from kimi_deploy.runtime.ort_runner import OrtRunner

    runner = OrtRunner(export, threads=threads, kernels=kernels)
    with progress("measuring", 2 * len(CURVE_LENGTHS), unit="points") as advance:
        points = decode_curve(runner, CURVE_LENGTHS, steps, advance)
    if as_json:
        print_json({"kernels": kernels_to_dict(runner.kernels), "points": [p.to_dict() for p in points]})
        return
    rows = [(f"{p.cached:,}", f"{p.capacity:,}", f"{p.median * 1e3:.2f}", f"{p.fastest * 1e3:.2f}") for p in points]
    print_table(("cached tokens", "capacity", "median (ms)", "fastest (ms)"), rows)
    click.echo(f"ort: {ops_run_as(runner.kernels)}")


def run_long_context(
    export: Path,
    tokens: int,
    steps: int,
    threads: int,
    kernels: str,
    chunk: int,
    checkpoint: Path | None,
    plot: Path | None,
    output: Path | None,
    as_json: bool,
) -> bool:
    """Stream, print and save; returns whether prefill in chunks was prefill in one call, within the
    tolerance, and the KDA state as large at every point."""
    from kimi_deploy.bench import long_context
    from kimi_deploy.manifest import write_text
    from kimi_deploy.runtime.base import ops_run_as
    from kimi_deploy.validate.report import plain

    with progress("streaming", tokens, unit="tokens") as advance:
        report = long_context.stream(export, tokens, steps, threads, advance, chunk, checkpoint, kernels)
    if plot is not None:
        long_context.plot(report, plot)
    if output is not None:
        write_text(output, json.dumps(plain(report), indent=2) + "\n")
    seen = report["chunked_against_whole"]
    passed = bool(seen["passed"] and report["kda_constant"])
    if as_json:
        print_json(plain(report))
        return passed
    print_table(
        ("cached tokens", "prefill (ms/token)", "decode (ms)", "KDA state (B)", "latent cache (B)", "peak (MB)"),
        map(_row, report["points"]),
    )
    click.echo(f"ort: {ops_run_as(report['kernels'])}")
    click.echo(
        f"prefill of {seen['tokens']:,} tokens in chunks against one call: logits {seen['logits_peak']:.1e}, states "
        f"{seen['state_peak']:.1e} ({seen['worst_state']}) of the largest magnitude; bound {seen['bound']:g}: "
        f"{'pass' if seen['passed'] else 'FAIL'}{': ' * bool(seen['wrong'])}{', '.join(seen['wrong'])}"
    )
    if not report["kda_constant"]:
        click.echo("the KDA state grew: FAIL")
    return passed


def _row(point: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{point['context']:,}",
        f"{point['prefill_seconds'] * 1e3:.3f}",
        f"{point['decode_seconds'] * 1e3:.2f}",
        f"{point['kda_bytes']:,}",
        f"{point['latent_bytes']:,}",
        f"{point['peak_process_bytes'] / 1e6:.0f}",
    )
