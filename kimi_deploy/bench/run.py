"""Several runtimes on one model in one run: a process each, in turn, medians and ratios."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from kimi_deploy import __version__
from kimi_deploy.bench.floors import Work
from kimi_deploy.bench.worker import Task
from kimi_deploy.errors import BackendError

SCHEMA_VERSION = 2
PHASES = ("prefill", "decode")


def run_bench(
    tasks: list[Task], rounds: int, progress: Callable[[int], None] | None = None, work: Work | None = None
) -> dict[str, object]:
    """Run every task `rounds` times, alternating, each in a fresh process; times in seconds.

    Alternating spreads the machine's drift over all runtimes. Each result has the median and the 10th and 90th
    percentile of prefill and decode; `times_of_first` is its median over the first runtime's. With `work` the
    machine's rates are measured in every round too, and `times_of_floor` is the median over the time that the work
    takes at the median rates. Raises BackendError when a worker fails, with the end of its stderr.
    """
    samples: dict[str, list[dict[str, Any]]] = {t.backend: [] for t in tasks}
    rates: list[dict[str, float]] = []
    for _ in range(rounds):
        if work is not None:
            rates.append(_run_process("kimi_deploy.bench.floors", str(tasks[0].threads), tasks[0].threads, "floors"))
        for task in tasks:
            samples[task.backend].append(_run_worker(task))
            if progress is not None:
                progress(1)
    results = {task.backend: _summary(samples[task.backend]) for task in tasks}
    first = results[tasks[0].backend]
    times_of_first = {
        name: {
            phase: result[phase]["median"] / first[phase]["median"]  # type: ignore[index]
            for phase in PHASES
        }
        for name, result in results.items()
    }
    report: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "kimi_deploy": __version__,
        "machine": {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "task": asdict(tasks[0]),
        "rounds": rounds,
        "results": results,
        "times_of_first": times_of_first,
    }
    if work is not None:
        read, multiplied = (statistics.median(r[key] for r in rates) for key in ("read_bytes", "multiply_adds"))
        floors = {
            "decode": work.decode_bytes / read,
            "prefill": work.prefill_multiply_adds * tasks[0].prompt / multiplied,
        }
        report["floors"] = {
            "read_bytes_per_second": read,
            "multiply_adds_per_second": multiplied,
            "work": asdict(work),
            "seconds": floors,
        }
        report["times_of_floor"] = {
            name: {phase: result[phase]["median"] / seconds for phase, seconds in floors.items()}  # type: ignore[index]
            for name, result in results.items()
        }
    return report


def _run_worker(task: Task) -> dict[str, object]:
    return _run_process("kimi_deploy.bench.worker", json.dumps(asdict(task)), task.threads, task.backend)


def _run_process(module: str, argument: str, threads: int, name: str) -> dict[str, Any]:
    """The JSON that `python -m module argument` prints last."""
    command = [sys.executable, "-m", module, argument]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise BackendError(
            f"the {name} worker failed",
            # the last line names the exception; what stands above it is our own call stack
            seen=done.stderr.strip().rsplit("\n", 1)[-1][:1000],
            fix=f"install what it names, or leave {name} out of --backend",
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in result:
        error = result["error"]
        seen = "; ".join(text for text in (error["what"], error["seen"]) if text)
        raise BackendError(f"the {name} worker failed", seen=seen, fix=error["fix"])
    return result


def _summary(samples: list[dict[str, object]]) -> dict[str, object]:
    def spread(key: str) -> dict[str, float]:
        values = sorted(v for s in samples for v in s[key])  # type: ignore[attr-defined]
        return {
            "median": statistics.median(values),
            "p10": values[len(values) // 10],
            "p90": values[(len(values) * 9) // 10],
            "count": len(values),
        }

    return {
        "prefill": spread("prefill"),
        "decode": spread("decode"),
        "load": statistics.median(s["load"] for s in samples),  # type: ignore[type-var]
        "peak_bytes": max(s["peak_bytes"] for s in samples),  # type: ignore[type-var]
    }
