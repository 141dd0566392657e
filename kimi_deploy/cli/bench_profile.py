"""kimi-deploy bench --profile: where one runtime's time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kimi_deploy.cli.common import print_json, print_table, progress
from kimi_deploy.errors import BackendError, UsageError

PROFILED = ("ort", "torch", "trt")


def run_profile(
    model: Path,
    export: Path,
    engine: Path | None,
    backends: tuple[str, ...],
    folder: Path,
    prompt: int,
    steps: int,
    threads: int,
    kernels: str,
    as_json: bool,
) -> None:
    """Profile one of `PROFILED`, ort by default, and print what it wrote into `folder`."""
    if len(set(backends)) > 1 or not set(backends) <= set(PROFILED):
        raise UsageError(
            "--profile takes one runtime that can be profiled",
            seen=", ".join(backends),
            expected=f"one of {', '.join(f'--backend {b}' for b in PROFILED)}",
            fix="give one of them",
        )
    backend = backends[0] if backends else "ort"
    if backend != "ort" and kernels not in ("auto", "none"):
        raise UsageError(
            "kernels of a library run on ONNX Runtime alone",
            seen=f"--kernels {kernels}, --backend {backend}",
            fix="leave --kernels out",
        )
    if (backend == "trt") != (engine is not None):
        raise UsageError("--backend trt and --engine go together", fix="give both, or neither")
    if engine is not None:
        _check_engine(model, export, engine)
    with progress("profiling"):
        if backend == "torch":
            from kimi_deploy.bench.torch_profile import profile_checkpoint

            report = profile_checkpoint(model, folder, prompt, steps, threads)
        elif engine is not None:
            from kimi_deploy.bench.trt_profile import profile_engine
            from kimi_deploy.runtime.trt_runner import open_trt_session

            session, device = open_trt_session(engine)
            report = profile_engine(engine, export, session, device, folder, prompt, steps)
        else:
            from kimi_deploy.bench.profile import profile_export

            report = profile_export(export, folder, prompt, steps, threads, kernels)
    if as_json:
        print_json(report)
    else:
        _print(report)


def _check_engine(model: Path, export: Path, engine: Path) -> None:
    """Refuse an engine that cannot be opened here, or is not of `export`, whose nodes its layers are named after."""
    from kimi_deploy.cuda_driver import gpu_devices
    from kimi_deploy.engine.load import check_built_from, check_engine, check_gpu

    check_built_from(engine, export)
    manifest, backend = check_engine(engine)
    if not gpu_devices():
        # without a driver TensorRT does not open a plan, so that its inspector cannot be asked either
        raise BackendError(
            "an engine's layers can be listed and timed only on a machine with an NVIDIA GPU, where TensorRT opens its "
            f"plan; here profile the export: kimi-deploy bench {model} {export} --profile DIR"
        )
    check_gpu(manifest, backend)


def _print(report: dict[str, Any]) -> None:
    from kimi_deploy.runtime.base import ops_run_as

    for phase, result in report["phases"].items():
        total = result["kernel_seconds"]
        click.echo(f"{phase}: {result['seconds'] * 1e3:.2f} ms a call, of which {total * 1e3:.2f} ms in kernels")
        rows = [
            (name, f"{entry['seconds'] * 1e3:.3f}", f"{entry['seconds'] / total:.1%}", f"{entry['calls']:.0f}")
            for kind in ("operators", "layers")
            for name, entry in list(result[kind].items())[: 12 if kind == "operators" else None]
        ]
        print_table(("operator or layer", "ms", "share", "kernels"), rows)
    if "kernels" in report:
        click.echo(f"ort: {ops_run_as(report['kernels'])}")
    if "host_glue_seconds" in report:
        glue = {name: seconds * 1e6 for name, seconds in report["host_glue_seconds"].items()}
        click.echo("host glue of a decode step: {median:.0f} us ({p10:.0f}, {p90:.0f})".format(**glue))
    memory = report["memory"]
    click.echo(", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in memory.items()))
    click.echo(f"traces for https://ui.perfetto.dev: {', '.join(report['traces'])}")
