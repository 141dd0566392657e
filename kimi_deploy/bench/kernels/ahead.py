"""Compiling what is compiled at its first call, on all cores and before anything is timed.

A Triton kernel takes seconds to tens of seconds, and one process compiles one after the other. Here every form of every
implementation is called once in a process of its own; the compiled code waits in Triton's cache for the measurement.
`python -m kimi_deploy.bench.kernels.ahead PROVIDER CASE`, CASE a JSON object of Case's fields, is such a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from kimi_deploy.bench.kernels.cases import Case
from kimi_deploy.bench.kernels.errors import CHECKED_ROWS, CHECKED_STEPS
from kimi_deploy.bench.kernels.inputs import make_inputs
from kimi_deploy.bench.kernels.providers import Provider

SECONDS = 90
"""After which a process is stopped; the measurement then compiles by itself."""


def forms(work: Sequence[tuple[Case, Provider]]) -> list[tuple[Case, Provider]]:
    """One pair for all that share machine code, in the order of `work`; none for what is compiled already."""
    found: dict[tuple[object, ...], tuple[Case, Provider]] = {}
    for case, provider in work:
        if provider.compiles_per and not provider.refuses(case):
            key = (provider.name, *(getattr(case, field) for field in provider.compiles_per))
            found.setdefault(key, (case, provider))
    return list(found.values())


def compile_ahead(work: Sequence[tuple[Case, Provider]], note: Callable[[str], None] = lambda line: None) -> None:
    """Calls each of `forms` once, as many at a time as there are cores. Failures are noted; timing meets them again."""
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        for line in pool.map(_call_in_process, forms(work)):
            if line:
                note(line)


def _call_in_process(pair: tuple[Case, Provider]) -> str:
    case, provider = pair
    # what fla finds fastest while all cores and the GPU are shared must not be remembered as its choice
    environment = os.environ | {"FLA_CACHE_RESULTS": "0"}
    command = [sys.executable, "-m", __name__, provider.name, json.dumps(asdict(case))]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"compiling {provider.name} for {case.name} took more than {SECONDS} s and was stopped"
    if done.returncode == 0:
        return ""
    return f"{provider.name} failed at {case.name}: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}"


def main(provider_name: str, case_fields: str) -> None:
    from kimi_deploy.bench.kernels.run import FACTORIES

    small = Case(**json.loads(case_fields)).shortened(CHECKED_STEPS, CHECKED_ROWS)
    FACTORIES[provider_name]().prepare(small, make_inputs(small, "initial"))()


if __name__ == "__main__":
    main(*sys.argv[1:])
