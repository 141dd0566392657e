"""kimi-deploy bench."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from kimi_deploy.cli.common import folder_argument, json_option, print_json, print_table, progress, say
from kimi_deploy.errors import UsageError

CURVE_LENGTHS = (128, 1024, 2048, 4096, 8192)


class DefaultGroup(click.Group):
    """A group whose first command also runs without its name: `bench MODEL EXPORT` is `bench model MODEL EXPORT`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)


@click.group("bench", cls=DefaultGroup)
def bench_command() -> None:
    """Measure a model's runtimes (`bench MODEL EXPORT`) or the kernels of a GPU (`bench kernels`).

    A folder called `model` or `kernels` is written ./model or ./kernels.
    """


@bench_command.command("model")
@folder_argument("model")
@folder_argument("export")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(("ort", "torch", "transformers", "trt")),
    help="Runtimes to measure, the first is what the others are compared with; trt needs --engine.  [ort, torch]",
)
@click.option("--engine", type=click.Path(path_type=Path), metavar="DIR", help="The engine that trt runs, of EXPORT.")
@click.option("--prompt-tokens", default=512, show_default=True, type=click.IntRange(1), help="Tokens of prefill.")
@click.option(
    "--decode-steps", default=64, show_default=True, type=click.IntRange(1), help="Single-token steps after it."
)
@click.option(
    "--repeats",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="Sequences per process, after one of warm-up.",
)
@click.option(
    "--rounds", default=2, show_default=True, type=click.IntRange(1), help="Processes per runtime, alternating."
)
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="CPU threads of every runtime.")
@click.option("--curve", is_flag=True, help="Instead: ONNX Runtime's decode step from 128 to 8,192 cached tokens.")
@json_option
def model_command(
    model: Path,
    export: Path,
    backends: tuple[str, ...],
    engine: Path | None,
    prompt_tokens: int,
    decode_steps: int,
    repeats: int,
    rounds: int,
    threads: int,
    curve: bool,
    as_json: bool,
) -> None:
    """Measure prefill and decode of the checkpoint MODEL and its EXPORT, batch 1, float32.

    Every runtime runs in processes of its own, in turn; times are medians, ratios are within this run.
    """
    if curve:
        _curve(export, decode_steps, threads, as_json)
        return
    from kimi_deploy.bench.run import run_bench
    from kimi_deploy.bench.worker import Task
    from kimi_deploy.manifest import Manifest

    chosen = backends or ("ort", "torch")
    if "ort" in chosen:
        Manifest.read(export).check_kind("onnx")
    folders = {"ort": export, "trt": _engine(engine, "trt" in chosen)}
    tasks = [
        Task(name, str(folders.get(name, model)), prompt_tokens, decode_steps, repeats, threads) for name in chosen
    ]
    with progress("measuring", len(tasks) * rounds, unit="runs") as advance:
        report = run_bench(tasks, rounds, advance)
    if as_json:
        print_json(report)
    else:
        _print_report(report, chosen[0], prompt_tokens)


def _engine(folder: Path | None, wanted: bool) -> Path | None:
    """The folder of --engine, checked: a worker would find out only after the others have run."""
    if wanted != (folder is not None):
        raise UsageError("--backend trt and --engine go together", fix="give both, or neither")
    if folder is not None:
        from kimi_deploy.engine.load import check_engine, check_gpu

        check_gpu(*check_engine(folder))
    return folder


def _curve(export: Path, steps: int, threads: int, as_json: bool) -> None:
    from kimi_deploy.bench.curve import decode_curve

    with progress("measuring", 2 * len(CURVE_LENGTHS), unit="points") as advance:
        points = decode_curve(export, CURVE_LENGTHS, steps, threads, advance)
    if as_json:
        print_json([p.to_dict() for p in points])
        return
    rows = [(f"{p.cached:,}", f"{p.capacity:,}", f"{p.median * 1e3:.2f}", f"{p.fastest * 1e3:.2f}") for p in points]
    print_table(("cached tokens", "capacity", "median (ms)", "fastest (ms)"), rows)


def _print_report(report: dict[str, Any], first: str, prompt: int) -> None:
    rows = []
    for name, r in report["results"].items():
        times = report["times_of_first"][name]
        rows.append(
            (
                name,
                _spread(r["prefill"], 1),
                _spread(r["decode"], 2),
                f"{times['prefill']:.2f}",
                f"{times['decode']:.2f}",
                f"{r['load']:.1f}",
                f"{r['peak_bytes'] / 1e6:.0f}",
            )
        )
    headers = (
        "runtime",
        f"prefill {prompt} (ms)",
        "decode (ms/token)",
        f"prefill / {first}",
        f"decode / {first}",
        "load (s)",
        "peak (MB)",
    )
    print_table(headers, rows)
    click.echo("median (10th, 90th percentile); batch 1, float32; ratios within this run")


def _spread(seconds: dict[str, float], digits: int) -> str:
    """Median and percentiles in milliseconds."""
    median, low, high = (f"{seconds[k] * 1e3:.{digits}f}" for k in ("median", "p10", "p90"))
    return f"{median} ({low}, {high})"


@bench_command.command("kernels")
@click.option("--full", is_flag=True, help="Every shape instead of those that decide; some 500, half an hour or more.")
@click.option("--budget", type=click.FloatRange(0), help="Seconds after which no further shape starts.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for kernels.json and, with the plot extra, kernels.png.",
)
@json_option
def kernels_command(full: bool, budget: float | None, output: Path | None, as_json: bool) -> None:
    """Measure KimiDeltaAttention on this machine's GPU: time, share of the floors, error.

    This project's CUDA and Triton kernels, and of fla-core, FlashKDA and FlashInfer those that are installed, on the
    same inputs in one process. Cold caches, medians, errors against a float64 recurrence.
    """
    from kimi_deploy.bench.kernels.cases import full_cases, quick_cases
    from kimi_deploy.bench.kernels.device import require_device

    require_device()
    from kimi_deploy.bench.kernels.report import write_json, write_plot
    from kimi_deploy.bench.kernels.run import failures, run_kernel_bench

    cases = full_cases() if full else quick_cases()
    save = (lambda report: None) if output is None else partial(write_json, folder=output)
    report = run_kernel_bench(cases, budget, save, say)
    if output is not None:
        write_plot(report, output)
    if as_json:
        print_json(report)
    else:
        _print_kernels(report)
    for failure in failures(report):
        say(f"failed: {failure}")
    if failures(report):
        click.get_current_context().exit(1)


def _print_kernels(report: dict[str, Any]) -> None:
    from kimi_deploy.bench.kernels.report import HEADERS, table_rows

    print_table(HEADERS, table_rows(report))
    ceilings = report["ceilings"]
    click.echo(
        f"{report['device']['name']}: copy {ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s, bf16 product "
        f"{ceilings['matrix_operations_per_second'] / 1e12:.0f} TFLOP/s, both measured in this run"
    )
    for name, reason in report["missing"].items():
        click.echo(f"without {name}: {reason}")
    for entry in report["left_out"]:
        click.echo(f"not started in time: {entry['case']}, {entry['kernel']}")
