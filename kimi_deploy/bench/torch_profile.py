"""Where PyTorch's time goes: by operator and by decoder layer, with the trace it came from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from kimi_deploy.bench.profile import REST, make_folder, memory_by_component, ordered, write_report
from kimi_deploy.runtime.torch_runner import TorchRunner

_RUN = "model_run"
_PREFILLS = 3


def profile_checkpoint(model: Path, folder: Path, prompt: int, steps: int, threads: int) -> dict[str, Any]:
    """As `profile_export`, of the checkpoint `model` on PyTorch's CPU operators in float32.

    An operator's seconds are its own, without those of the operators it calls. Raises UsageError as that does, and the
    errors of TorchRunner.
    """
    make_folder(folder)
    runner = TorchRunner(model, threads=threads)
    for layer in runner.model.model.layers:
        _mark(layer, f"layer {layer.layer}")
    ids = np.random.default_rng(0).integers(0, runner.contract.vocab_size, (1, prompt + steps + 1))
    state = runner.new_state(1, prompt + steps + 1)
    runner.forward(ids[:, :prompt], state)
    runner.forward(ids[:, prompt : prompt + 1], state)

    def prefills() -> None:
        for _ in range(_PREFILLS):
            with record_function(_RUN):
                runner.forward(ids[:, :prompt], runner.new_state(1, prompt))

    def decode() -> None:
        for i in range(prompt + 1, prompt + 1 + steps):
            with record_function(_RUN):
                runner.forward(ids[:, i : i + 1], state)

    phases, traces = {}, []
    work: tuple[tuple[str, int, Callable[[], None]], ...] = (
        ("prefill", _PREFILLS, prefills),
        ("decode", steps, decode),
    )
    for phase, calls, run in work:
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            run()
        trace = folder / f"{phase}-trace.json"
        recorded.export_chrome_trace(str(trace))
        traces.append(str(trace))
        phases[phase] = _summary(recorded, calls)
    report = {
        "model": str(model),
        "prompt": prompt,
        "steps": steps,
        "threads": threads,
        "phases": phases,
        "memory": memory_by_component(sum(p.nbytes for p in runner.model.parameters()), state),
        "traces": traces,
    }
    write_report(report, folder)
    return report


def _mark(module: torch.nn.Module, name: str) -> None:
    """Have the profiler record a range of this name around every call of `module`."""
    ranges: list[record_function] = []

    def enter(*_: object) -> None:
        ranges.append(record_function(name))
        ranges[-1].__enter__()

    def leave(*_: object) -> None:
        ranges.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _summary(recorded: profile, calls: int) -> dict[str, Any]:
    """The recorded runs, per call."""
    operators: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    layers: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    seconds = 0.0
    for event in recorded.events():
        if event.name == _RUN:
            seconds += event.cpu_time_total / 1e6 / calls
        if not event.name.startswith("aten::"):
            continue
        above = event
        while above is not None and not above.name.startswith("layer "):
            above = above.cpu_parent
        for table, key in ((operators, event.name), (layers, REST if above is None else above.name)):
            table[key][0] += event.self_cpu_time_total / 1e6 / calls
            table[key][1] += 1 / calls
    return {
        "seconds": seconds,
        "kernel_seconds": sum(own for own, _ in operators.values()),
        "operators": ordered(operators),
        "layers": ordered(layers),
    }
