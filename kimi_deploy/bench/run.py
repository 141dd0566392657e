"""Several runtimes on one model in one run: a process each, in turn, medians and ratios."""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from kimi_deploy import __version__
from kimi_deploy.bench.floors import Rates, Work
from kimi_deploy.bench.report import (
    Floor,
    Kernels,
    Machine,
    MeasuredRates,
    Phases,
    Point,
    Report,
    Result,
    Settings,
    Spread,
)
from kimi_deploy.bench.worker import Measurement, Task
from kimi_deploy.errors import BackendError

FLOORS = "floors"
"""The worker that measures the machine."""


def run_bench(
    tasks: Sequence[Task],
    rounds: int,
    work: Work,
    export: dict[str, Any],
    progress: Callable[[int], None] = lambda n: None,
) -> Report:
    """Run every task `rounds` times, alternating, each in a fresh process; times in seconds.

    Tasks of one batch and prompt are one point, whose first task the others are compared with. Alternating spreads the
    machine's drift over all of them; its rates are measured in every round too. Raises BackendError when a worker
    fails, with the end of its stderr.
    """
    samples: dict[Task, list[Measurement]] = {task: [] for task in tasks}
    measured: list[Rates] = []
    threads = tasks[0].threads
    for _ in range(rounds):
        for task in tasks:
            samples[task].append(Measurement(**_run_worker(task)))
            progress(1)
        measured.append(_rates(threads))
    rates = Rates(
        statistics.median(r.read_bytes for r in measured), statistics.median(r.multiply_adds for r in measured)
    )
    shapes = dict.fromkeys((task.batch, task.prompt) for task in tasks)
    return Report(
        kimi_deploy=__version__,
        machine=Machine(processor=platform.processor() or platform.machine(), cpus=os.cpu_count() or 1),
        settings=Settings(steps=tasks[0].steps, repeats=tasks[0].repeats, rounds=rounds, threads=threads),
        rates=MeasuredRates(read_bytes_per_second=rates.read_bytes, multiply_adds_per_second=rates.multiply_adds),
        export=export,
        points=[
            _point(batch, context, {t: s for t, s in samples.items() if (t.batch, t.prompt) == (batch, context)}, floor)
            for batch, context in shapes
            for floor in (_floor(work, rates, batch, context),)
        ],
    )


def _floor(work: Work, rates: Rates, batch: int, context: int) -> Floor:
    read, multiplied = work.decode_bytes(batch), work.prefill_multiply_adds * batch * context
    decode = max(read / rates.read_bytes, work.decode_multiply_adds * batch / rates.multiply_adds)
    seconds = Phases(prefill=multiplied / rates.multiply_adds, decode=decode)
    return Floor(decode_bytes=read, prefill_multiply_adds=multiplied, seconds=seconds)


def _point(batch: int, context: int, samples: dict[Task, list[Measurement]], floor: Floor) -> Point:
    spreads = {task.backend: _spreads(measurements) for task, measurements in samples.items()}
    first = next(iter(spreads.values()))
    results = {}
    for task, measurements in samples.items():
        spread = spreads[task.backend]
        prefill, decode = spread["prefill"].median, spread["decode"].median
        results[task.backend] = Result(
            **spread,
            tokens_per_second=Phases(prefill=batch * context / prefill, decode=batch / decode),
            times_of_first=Phases(prefill=prefill / first["prefill"].median, decode=decode / first["decode"].median),
            times_of_floor=Phases(prefill=prefill / floor.seconds.prefill, decode=decode / floor.seconds.decode),
            load=statistics.median(m.load for m in measurements),
            peak_bytes=max(m.peak_bytes for m in measurements),
            kernels=Kernels(**k) if (k := measurements[0].kernels) else None,
        )
    return Point(batch=batch, context=context, floor=floor, results=results)


def _spreads(measurements: list[Measurement]) -> dict[str, Spread]:
    def spread(values: list[float]) -> Spread:
        values = sorted(values)
        low, high = values[len(values) // 10], values[len(values) * 9 // 10]
        return Spread(median=statistics.median(values), p10=low, p90=high, count=len(values))

    names = ("prefill", "decode", "time_to_first_token", "time_per_output_token")
    return {name: spread([v for m in measurements for v in getattr(m, name)]) for name in names}


def _rates(threads: int) -> Rates:
    return Rates(**_run_process("kimi_deploy.bench.floors", str(threads), threads, FLOORS))


def _run_worker(task: Task) -> dict[str, Any]:
    return _run_process("kimi_deploy.bench.worker", json.dumps(asdict(task)), task.threads, task.backend)


def _failed(name: str, done: subprocess.CompletedProcess[str]) -> BackendError:
    """The error of a process that ended without a typed one."""
    # the last line names the exception; what stands above it is our own call stack
    seen = done.stderr.strip().rsplit("\n", 1)[-1][:1000]
    without = "" if name == FLOORS else f", or leave {name} out of --backend"
    fix = f"report this as a bug{without}"
    if done.returncode < 0:
        ended = f"ended by signal {-done.returncode}, {signal.strsignal(-done.returncode)}"
        seen = f"{ended}: {seen}" if seen else ended
        fix = "look whether there was enough memory, and measure fewer or shorter sequences"
    elif seen.startswith(("ModuleNotFoundError", "ImportError")):
        fix = f"install what it names{without}"
    elif "MemoryError" in seen or "out of memory" in seen:
        fix = "measure fewer or shorter sequences (--batch, --context)"
    return BackendError(f"the {name} worker failed", seen=seen, fix=fix)


def _run_process(module: str, argument: str, threads: int, name: str) -> dict[str, Any]:
    """The JSON that `python -m module argument` prints last."""
    command = [sys.executable, "-m", module, argument]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise _failed(name, done)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in result:
        error = result["error"]
        seen = "; ".join(text for text in (error["what"], error["seen"]) if text)
        raise BackendError(f"the {name} worker failed", seen=seen, fix=error["fix"])
    return result
