"""Every case through every implementation, in one process on one device."""

from __future__ import annotations

import datetime
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kimi_deploy import __version__
from kimi_deploy.bench.kernels import peers, providers
from kimi_deploy.bench.kernels.ahead import compile_ahead
from kimi_deploy.bench.kernels.cases import TARGETS, Case
from kimi_deploy.bench.kernels.device import Ceilings, describe_device, measure_ceilings, require_device
from kimi_deploy.bench.kernels.errors import errors_of
from kimi_deploy.bench.kernels.inputs import Distribution, make_inputs
from kimi_deploy.bench.kernels.providers import Provider
from kimi_deploy.bench.kernels.timing import Flush, eager_seconds, graph_seconds, input_sets
from kimi_deploy.errors import BackendError

SCHEMA_VERSION = 1
FACTORIES: dict[str, Callable[[], Provider]] = {
    "cuda": providers.cuda_provider,
    "triton": providers.triton_provider,
    "reference": providers.reference_provider,
    "fla": peers.fla_op_provider,
    "fla core": peers.fla_core_provider,
    "FlashKDA": peers.flash_kda_provider,
    "FlashInfer": peers.flashinfer_provider,
}


def run_kernel_bench(
    cases: Sequence[Case],
    budget: float | None = None,
    save: Callable[[dict[str, Any]], None] = lambda report: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The report, as described in `report.py`. What is measured first: see `order`.

    `save` gets the report so far after each measurement, so that a run that is killed still leaves one; `note` gets a
    line on each. After `budget` seconds of measuring nothing further starts, and KeyboardInterrupt ends it too. What
    was left out stands in the report.
    Raises BackendError without a CUDA device or when none of this project's kernels can run.
    """
    require_device()
    available, missing = open_providers()
    if not {"cuda", "triton"} & {p.name for p in available}:
        raise BackendError("none of this project's kernels can run", seen=str(missing), fix="make kernels")
    device = describe_device()
    ceilings = measure_ceilings()
    flush = Flush(device["l2_bytes"])
    entries = {case: _entry(case, ceilings) for case in cases}
    todo = order(cases, available)
    compile_ahead(todo, note)
    began = time.monotonic()
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kimi_deploy": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["kimi-deploy", *sys.argv[1:]]),
        "device": device,
        "ceilings": ceilings.to_dict(),
        "providers": {p.name: {"scope": p.scope, "peer": p.peer} for p in available},
        "missing": missing,
        "interrupted": False,
        "seconds": 0.0,
        "cases": [],
        "left_out": [{"case": c.name, "kernel": p.name} for c, p in todo],
    }
    for done, (case, provider) in enumerate(todo):
        if budget is not None and time.monotonic() - began > budget:
            break
        try:
            result = measure(provider, case, entries[case]["floors"], flush)
        except KeyboardInterrupt:
            report["interrupted"] = True
            save(report)
            break
        entries[case]["results"][provider.name] = result
        torch.cuda.empty_cache()
        seconds = time.monotonic() - began
        note(f"{seconds:5.0f} s  {case.name}, {provider.name}: {_brief(result)}")
        report["seconds"] = seconds
        report["cases"] = [entry for entry in entries.values() if entry["results"]]
        report["left_out"] = [{"case": c.name, "kernel": p.name} for c, p in todo[done + 1 :]]
        save(report)
    return report


def order(cases: Sequence[Case], available: Sequence[Provider]) -> list[tuple[Case, Provider]]:
    """What is measured, in turn: everything on the TARGETS, this project's kernels on all else, then the others."""
    return [
        (case, p)
        for of_targets in (True, False)
        for peer in (False, True)
        for case in cases
        for p in available
        if (case in TARGETS) == of_targets and p.peer == peer and (case.peers or not peer)
    ]


def _brief(result: dict[str, Any]) -> str:
    if "best" not in result:
        return "; ".join(f"{key}: {value}" for key, value in result.items())
    return ", ".join(f"{mode} {result[mode]['median'] * 1e6:.1f} us" for mode in ("eager", "graph") if mode in result)


def failures(report: dict[str, Any]) -> list[str]:
    """What failed of this project's own kernels."""
    own = {name for name, p in report["providers"].items() if not p["peer"]}
    return [
        f"{case['name']}, {name}: {result['failed']}"
        for case in report["cases"]
        for name, result in case["results"].items()
        if name in own and "failed" in result
    ]


def open_providers() -> tuple[list[Provider], dict[str, str]]:
    """Those that can be imported or loaded here, and why each other cannot."""
    available, missing = [], {}
    for name, factory in FACTORIES.items():
        try:
            available.append(factory())
        except ImportError as error:
            missing[name] = f"not importable: {error}"
        except BackendError as error:
            missing[name] = " ".join(str(error).split())
    return available, missing


def _entry(case: Case, ceilings: Ceilings) -> dict[str, Any]:
    floors = {"bytes": ceilings.byte_floor(case.bytes), "matrix": ceilings.matrix_floor(case.matrix_operations)}
    return {**case.to_dict(), "name": case.name, "floors": floors, "results": {}}


def measure(provider: Provider, case: Case, floors: dict[str, float], flush: Flush) -> dict[str, Any]:
    """Times, ratios to the floors and errors of one implementation, or why it has none."""
    reason = provider.refuses(case)
    if reason:
        return {"refused": reason}
    try:
        result = _measure(provider, case, flush)
    # kernels may raise anything, and a failure is a result: the other cases still count
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    result["over_floor"] = over_floors(result["best"], floors)
    return result


def over_floors(seconds: float, floors: dict[str, float]) -> dict[str, float | None]:
    """`seconds` as a multiple of each floor; None where there is no such work."""
    return {name: seconds / floor if floor else None for name, floor in floors.items()}


def _measure(provider: Provider, case: Case, flush: Flush) -> dict[str, Any]:
    distributions: tuple[Distribution, ...] = ("initial", "slow")
    result: dict[str, Any] = {"errors": {d: errors_of(provider, case, d) for d in distributions}}
    sets = [make_inputs(case, "initial")]
    result["eager"] = eager_seconds(provider.prepare(case, sets[0]), flush)
    if provider.graphed:
        count = input_sets(case.bytes, flush.l2_bytes)
        sets += [{name: x.clone() for name, x in sets[0].items()} for _ in range(count - 1)]
        runs = [provider.prepare(case, x) for x in sets]
        try:
            result["graph"] = graph_seconds(runs)
        except RuntimeError as error:
            torch.cuda.synchronize()
            result["not_graphed"] = str(error).splitlines()[0][:300]
    result["best"] = min(result[mode]["median"] for mode in ("eager", "graph") if mode in result)
    return result
