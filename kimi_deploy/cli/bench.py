"""kimi-deploy bench."""

from __future__ import annotations

import json
import signal
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kimi_deploy.cli.common import (
    MOST_THREADS,
    NamedPath,
    folder_argument,
    json_option,
    kernels_option,
    print_json,
    print_table,
    progress,
    refuse_others,
    say,
    was_given,
)
from kimi_deploy.cli.sizes import TokenCount
from kimi_deploy.errors import UsageError
from kimi_deploy.model_folder import require_folder
from kimi_deploy.optional_packages import require_packages
from kimi_deploy.output_file import check_writable
from kimi_deploy.quantization.scheme import describe_precision

if TYPE_CHECKING:
    from kimi_deploy.bench.report import Report, Spread

PHASES = ("prefill", "decode")
_OF_EVERY_MODE = ("backends", "threads", "decode_steps", "kernels", "as_json")
TAKEN = {
    "--long-context": ("long_context", "chunk", "checkpoint", "plot", "output", *_OF_EVERY_MODE),
    "--curve": ("curve", *_OF_EVERY_MODE),
    "--profile": ("profile", "engine", "prompt_tokens", *_OF_EVERY_MODE),
}
"""What is measured instead of the runtimes at every point, and the options that each takes."""


class DefaultGroup(click.Group):
    """A group whose first command also runs without its name: `bench MODEL EXPORT` is `bench model MODEL EXPORT`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)


class Counts(click.ParamType):
    """Numbers from 1, as TokenCount reads them, separated by commas; each once, in the order given."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(TokenCount().convert(part, param, ctx) for part in value.split(",")))
        except click.BadParameter:
            self.fail(f"{value!r} is not a list of whole numbers from 1, as in 1,2,4 or 512,2K", param, ctx)


@click.group("bench", cls=DefaultGroup)
def bench_command() -> None:
    """Measure a model's runtimes (`bench MODEL EXPORT`) or the kernels of a GPU (`bench kernels`).

    A folder called as one of the commands is written with ./ before it.
    """


@bench_command.command("model")
@folder_argument("model")
@folder_argument("export")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(("ort", "ort-bodies", "torch", "transformers", "trt", "llama.cpp")),
    help="Runtimes to measure, the first is what the others are compared with; ort-bodies is ort "
    "with --kernels none; trt needs --engine.  [ort, torch]",
)
@click.option("--engine", type=NamedPath(path_type=Path), metavar="DIR", help="The engine that trt runs, of EXPORT.")
@click.option(
    "--llama-cpp",
    type=NamedPath(path_type=Path),
    metavar="DIR",
    help="llama.cpp's source folder, whose converter makes the GGUF file for --backend llama.cpp.",
)
@click.option(
    "--gguf-type",
    type=click.Choice(("f32", "f16", "bf16", "q8_0", "q4_0")),
    default="f32",
    show_default=True,
    help="Type of the weights in that file.",
)
@click.option("--prompt-tokens", default=512, show_default=True, type=TokenCount(), help="Tokens of prefill.")
@click.option(
    "--context", "contexts", type=Counts(), metavar="N,N,...", help="Several of them, a sweep; not --long-context."
)
@click.option("--batch", "batches", type=Counts(), default="1", show_default=True, metavar="N,N,...", help="Sequences.")
@click.option("--decode-steps", default=64, show_default=True, type=TokenCount(), help="Single-token steps after it.")
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
@click.option(
    "--threads",
    default=2,
    show_default=True,
    type=click.IntRange(1, MOST_THREADS),
    help="CPU threads of every runtime.",
)
@click.option(
    "--profile",
    type=NamedPath(path_type=Path),
    metavar="DIR",
    help="Instead: time by operator and layer of ort, torch or trt, memory by component, Perfetto traces, into DIR.",
)
@click.option(
    "-o", "--output", type=NamedPath(path_type=Path), metavar="FILE", help="Save the report as JSON, for `compare`."
)
@click.option(
    "--long-context",
    type=TokenCount(1024),
    metavar="N",
    help="Instead: stream a prompt of N tokens through the export; time and memory at every doubling.",
)
@click.option(
    "--chunk",
    default=512,
    show_default=True,
    type=TokenCount(16),
    help="Of --long-context: the most tokens of a prefill call.",
)
@click.option(
    "--checkpoint",
    type=NamedPath(path_type=Path),
    metavar="FILE",
    help="Of --long-context: save the state here at every point, and go on from it where it exists.",
)
@click.option("--plot", type=NamedPath(path_type=Path), metavar="FILE", help="Draw the report as a PNG.")
@kernels_option
@click.option("--curve", is_flag=True, help="Instead: ONNX Runtime's decode step from 128 to 8,192 cached tokens.")
@json_option
def model_command(
    model: Path,
    export: Path,
    backends: tuple[str, ...],
    engine: Path | None,
    llama_cpp: Path | None,
    gguf_type: str,
    prompt_tokens: int,
    contexts: tuple[int, ...] | None,
    batches: tuple[int, ...],
    decode_steps: int,
    repeats: int,
    rounds: int,
    threads: int,
    profile: Path | None,
    output: Path | None,
    long_context: int | None,
    chunk: int,
    checkpoint: Path | None,
    plot: Path | None,
    kernels: str,
    curve: bool,
    as_json: bool,
) -> None:
    """Measure prefill and decode of the checkpoint MODEL and its EXPORT, for every --batch and --context.

    Every runtime runs in processes of its own, in turn; times are medians, ratios are within this run. The floor is
    what reading the export's weights once (decode) or multiplying with them (prefill) takes on this machine, at
    the rates of plain matrix products measured in the same run. PyTorch and transformers run in float32, llama.cpp in
    --gguf-type.
    """
    require_folder(model, "a checkpoint folder with config.json and safetensors files")
    instead = {"--long-context": long_context, "--curve": curve or None, "--profile": profile}
    for mode, value in instead.items():
        if value is not None:
            refuse_others(mode, TAKEN[mode])
    for option, file in (("--output", output), ("--plot", plot), ("--checkpoint", checkpoint)):
        if file is not None:
            check_writable(option, file)
    if plot is not None:
        require_packages("matplotlib")
    if (long_context is not None or curve) and set(backends) - {"ort"}:
        raise UsageError(
            "--long-context and --curve run ONNX Runtime alone",
            seen=f"--backend {', '.join(backends)}",
            fix="leave it out",
        )
    if long_context is not None:
        from kimi_deploy.cli.bench_context import run_long_context

        numbers = (long_context, decode_steps, threads, kernels, chunk)
        if not run_long_context(export, *numbers, checkpoint, plot, output, as_json):
            click.get_current_context().exit(1)
        return
    given = {str(p.name) for p in click.get_current_context().command.params if was_given(p)}
    for name in {"checkpoint", "chunk"} & given:
        raise UsageError(f"--{name} is of --long-context", fix="add --long-context N")
    if curve:
        from kimi_deploy.cli.bench_context import run_curve

        run_curve(export, decode_steps, threads, kernels, as_json)
        return
    if profile is not None:
        from kimi_deploy.cli.bench_profile import run_profile

        run_profile(model, export, engine, backends, profile, prompt_tokens, decode_steps, threads, kernels, as_json)
        return
    from kimi_deploy.bench.floors import model_work
    from kimi_deploy.bench.requirements import ORT, check_packages, resolve_kernels
    from kimi_deploy.bench.run import run_bench
    from kimi_deploy.bench.worker import Task
    from kimi_deploy.manifest import Manifest, write_text

    # a runtime given twice is measured once
    chosen = tuple(dict.fromkeys(backends)) or ("ort", "torch")
    manifest = Manifest.read(export)
    manifest.check_kind("onnx")
    manifest.verify(export, hashes=False)
    if set(chosen) - {*ORT, "trt"}:
        from kimi_deploy.checkpoint import Checkpoint
        from kimi_deploy.validate.folders import check_source

        # a worker would find out only after the others have run, and of another model not at all
        check_source(manifest, export, model, Checkpoint.open(model).fingerprint())
    if ("llama.cpp" in chosen) != (llama_cpp is not None):
        raise UsageError("--backend llama.cpp and --llama-cpp go together", fix="give both, or neither")
    if "gguf_type" in given and llama_cpp is None:
        raise UsageError("--gguf-type is of --backend llama.cpp", fix="leave --gguf-type out")
    if {"contexts", "prompt_tokens"} <= given:
        raise UsageError("--context and --prompt-tokens say the same", fix="leave one of them out")
    if llama_cpp is not None and max(batches) > 1:
        raise UsageError("llama.cpp is measured with one sequence", seen=f"--batch {max(batches)}", fix="leave one out")
    if llama_cpp is not None:
        from kimi_deploy.bench.llama_cpp import check_source as check_llama_cpp

        check_llama_cpp(llama_cpp)
    check_packages(chosen)
    kernels = resolve_kernels(kernels, chosen, export)
    contexts = contexts or (prompt_tokens,)
    states = [(batch, context + decode_steps + 1) for batch in batches for context in contexts]
    trt = _engine(engine, export, "trt" in chosen, states)
    with tempfile.TemporaryDirectory() as temporary:
        gguf = Path(temporary) / f"{gguf_type}.gguf"
        if llama_cpp is not None:
            from kimi_deploy.bench.llama_cpp import convert

            with progress("converting to GGUF"):
                convert(model, llama_cpp, gguf, gguf_type)
        folders = {"ort": export, "ort-bodies": export, "trt": trt, "llama.cpp": gguf}
        tasks = [
            Task(name, str(folders.get(name, model)), context, decode_steps, repeats, threads, batch, kernels)
            for batch in batches
            for context in contexts
            for name in chosen
        ]
        with progress("measuring", len(tasks) * rounds, unit="runs") as advance:
            details = {"name": manifest.source["name"], **manifest.details}
            report = run_bench(tasks, rounds, model_work(export), details, advance)
    if output is not None:
        write_text(output, json.dumps(report.to_dict(), indent=2) + "\n")
    if plot is not None:
        from kimi_deploy.bench.chart import write_chart

        write_chart(report, plot)
    if as_json:
        print_json(report.to_dict())
    else:
        _print_report(report)


def _engine(folder: Path | None, export: Path, wanted: bool, states: list[tuple[int, int]]) -> Path | None:
    """The folder of --engine, checked, also for states of these batches and capacities: a worker would find out only
    after the others have run.
    """
    if wanted != (folder is not None):
        raise UsageError("--backend trt and --engine go together", fix="give both, or neither")
    if folder is not None:
        from kimi_deploy.engine.load import check_built_from, check_engine, check_gpu, recorded_profiles
        from kimi_deploy.runtime.trt_session import check_state

        check_built_from(folder, export)
        manifest, backend = check_engine(folder)
        for batch, capacity in states:
            check_state(recorded_profiles(manifest), batch, capacity)
        check_gpu(manifest, backend)
        manifest.verify(folder)
    return folder


def _print_report(report: Report) -> None:
    from kimi_deploy.bench.requirements import ORT
    from kimi_deploy.runtime.base import ops_run_as

    rows = [
        (
            f"{point.batch} x {point.context:,}",
            name,
            _spread(r.prefill, 1),
            f"{r.time_to_first_token.median * 1e3:.1f}",
            _spread(r.decode, 2),
            f"{r.time_per_output_token.median * 1e3:.2f}",
            *(f"{getattr(r.tokens_per_second, phase):,.0f}" for phase in PHASES),
            *(f"{getattr(r.times_of_first, phase):.2f}" for phase in PHASES),
            *(f"{getattr(r.times_of_floor, phase):.2f}" for phase in PHASES),
            f"{r.load:.1f}",
            f"{r.peak_bytes / 1e6:.0f}",
        )
        for point in report.points
        for name, r in point.results.items()
    ]
    first = next(iter(report.points[0].results))
    headers = (
        "batch",
        "runtime",
        "prefill (ms)",
        "TTFT (ms)",
        "decode (ms/step)",
        "TPOT (ms)",
        *(f"{phase} tok/s" for phase in PHASES),
        *(f"{phase}/{first}" for phase in PHASES),
        *(f"{phase}/floor" for phase in PHASES),
        "load (s)",
        "peak (MB)",
    )
    print_table(headers, rows)
    export, rates, point = report.export, report.rates, report.points[0]
    for name, result in point.results.items():
        if name in ORT:
            click.echo(f"{name}: {ops_run_as(result.kernels.model_dump() if result.kernels else None)}")
    click.echo(
        "batch: sequences x prompt tokens; TTFT, TPOT: time to first token, per output token; median (10th, 90th "
        f"percentile); {export['name']}, exported in "
        f"{describe_precision(export)}; one run"
    )
    click.echo(
        f"this machine reads weights at {rates.read_bytes_per_second / 1e9:.1f} GB/s, a decode step of batch "
        f"{point.batch} needs {point.floor.decode_bytes / 1e6:.1f} MB; it multiplies at "
        f"{2 * rates.multiply_adds_per_second / 1e9:.0f} GFLOP/s, a prompt token needs "
        f"{2 * point.floor.prefill_multiply_adds / (point.batch * point.context) / 1e6:.1f} MFLOP"
    )


def _spread(seconds: Spread, digits: int) -> str:
    """Median and percentiles in milliseconds."""
    median, low, high = (f"{s * 1e3:.{digits}f}" for s in (seconds.median, seconds.p10, seconds.p90))
    return f"{median} ({low}, {high})"


@bench_command.command("compare")
@click.argument("before", type=NamedPath(path_type=Path), metavar="BEFORE.json")
@click.argument("after", type=NamedPath(path_type=Path), metavar="AFTER.json")
@click.option(
    "--threshold", default=0.1, show_default=True, type=click.FloatRange(0), help="Share by which a time may grow."
)
@json_option
def compare_command(before: Path, after: Path, threshold: float, as_json: bool) -> None:
    """Compare two reports of `bench MODEL EXPORT -o`; exit code 1 when something became slower.

    What is compared are times over the floor that was measured in the same run, so that a slower machine is not taken
    for slower code. The spread is that of the times within a run, 10th to 90th percentile over the median, of the wider
    run: above the threshold it is said that the verdict may be chance.
    """
    from kimi_deploy.bench.compare import changed_kernels, compare_reports
    from kimi_deploy.bench.report import read_report

    old, new = read_report(before), read_report(after)
    rows = compare_reports(old, new, threshold)
    if as_json:
        print_json([row.to_dict() for row in rows])
    else:
        print_table(
            ("runtime", "batch", "phase", "before / floor", "after / floor", "change", "spread", "verdict"),
            [
                (
                    r.runtime,
                    f"{r.batch} x {r.context:,}",
                    r.phase,
                    f"{r.before:.2f}",
                    f"{r.after:.2f}",
                    f"{r.change:+.1%}",
                    f"{r.spread:.1%}",
                    r.verdict,
                )
                for r in rows
            ],
        )
    for runtime, then, now in changed_kernels(old, new):
        say(f"{runtime} ran {then} before, {now} after")
    wide = sum(row.spread > threshold for row in rows)
    if wide:
        say(
            f"{wide} of {len(rows)} rows: times within one run spread by more than the threshold, {threshold:.0%}, "
            "and the verdict may be chance; measure both again on an idle machine, with more --rounds and --repeats"
        )
    if any(row.verdict == "slower" for row in rows):
        click.get_current_context().exit(1)


@bench_command.command("kernels")
@click.option("--full", is_flag=True, help="Every shape instead of those that decide; some 500, half an hour or more.")
@click.option("--budget", type=click.FloatRange(0), help="Seconds of measuring after which no further shape starts.")
@click.option(
    "-o",
    "--output",
    type=NamedPath(path_type=Path),
    metavar="DIR",
    help="Folder for kernels.json and, with the plot extra, kernels.png.",
)
@click.option(
    "--cpu", is_flag=True, help="Instead: the experts of mini-62m on ONNX Runtime's CPU, our kernel and its own."
)
@click.option(
    "--threads",
    default=2,
    show_default=True,
    type=click.IntRange(1, MOST_THREADS),
    help="Of --cpu: threads of every process.",
)
@json_option
def kernels_command(
    full: bool, budget: float | None, output: Path | None, cpu: bool, threads: int, as_json: bool
) -> None:
    """Measure KimiDeltaAttention on this machine's GPU: time, share of the floors, error.

    This project's CUDA and Triton kernels, and of fla-core, FlashKDA and FlashInfer those that are installed, on the
    same inputs in one process. Cold caches, medians, errors against a float64 recurrence.
    """
    if cpu:
        _experts(threads, as_json)
        return
    from kimi_deploy.bench.kernels.cases import full_cases, quick_cases
    from kimi_deploy.bench.kernels.device import require_device

    require_device()
    from kimi_deploy.bench.kernels.report import write_json, write_plot
    from kimi_deploy.bench.kernels.run import failures, run_kernel_bench

    # a time limit's signal ends the measuring as Ctrl-C does: what is done is reported
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    if failures(report) or report["interrupted"]:
        click.get_current_context().exit(1)


def _experts(threads: int, as_json: bool) -> None:
    from kimi_deploy.bench.experts import FORMATS, run_experts_bench
    from kimi_deploy.runtime.ort_kernels import OrtKernels

    rounds, repeats = 2, 10
    path = OrtKernels.open().path
    with progress("measuring", 2 * rounds * len(FORMATS), unit="runs") as advance:
        report = run_experts_bench(threads, rounds, repeats, path, advance)
    if as_json:
        print_json(report)
        return
    print_table(
        ("weights", "tokens", "kernel (us)", "ONNX Runtime (us)", "ONNX Runtime / kernel", "kernel / floor"),
        [
            (
                row["format"],
                str(row["tokens"]),
                f"{row['kernel'] * 1e6:.0f}",
                f"{row['body'] * 1e6:.0f}",
                f"{row['body'] / row['kernel']:.2f}",
                f"{row['kernel'] / row['floor']:.2f}",
            )
            for row in report["rows"]
        ],
    )
    rates = report["rates"]
    click.echo(
        f"a layer of experts on {threads} threads; floors of products that read {rates['read_bytes'] / 1e9:.1f} GB/s "
        f"with one row and do {rates['multiply_adds'] / 1e9:.0f} G multiply-adds/s with many"
    )


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
    if report["interrupted"]:
        click.echo("interrupted; what was measured until then stands above")
    for entry in report["left_out"]:
        click.echo(f"not started in time: {entry['case']}, {entry['kernel']}")
