"""One runtime, measured in its own process: prefill and decode times as JSON on stdout.

Two runtimes in one process fight over threads (spinning pools against OpenMP), so `bench.run` starts one
worker each. Run as `python -m kimi_deploy.bench.worker SPEC`, SPEC being the JSON of `Task`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kimi_deploy.errors import KimiDeployError

if TYPE_CHECKING:
    from kimi_deploy.runtime.base import Runner


@dataclass(frozen=True)
class Task:
    """What to measure: `prompt` tokens of prefill and `steps` of decode after it, `repeats` times, batch 1."""

    backend: str
    folder: str
    prompt: int
    steps: int
    repeats: int
    threads: int


@dataclass(frozen=True)
class Measurement:
    """Seconds: one prefill time per repeat, one time per decode step, load time; peak resident bytes."""

    prefill: list[float]
    decode: list[float]
    load: float
    peak_bytes: int

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


Step = Callable[[np.ndarray], None]
Start = Callable[[], Step]
"""Begins a new sequence; the Step it returns consumes ids [1, T] and computes the last token's logits."""


def _runner_start(task: Task) -> tuple[Start, int]:
    if task.backend == "ort":
        from kimi_deploy.runtime.ort_runner import OrtRunner

        runner: Runner = OrtRunner(Path(task.folder), threads=task.threads)
    elif task.backend == "trt":
        from kimi_deploy.runtime.trt_runner import open_trt_runner

        runner = open_trt_runner(Path(task.folder))
    else:
        import torch

        from kimi_deploy.runtime.torch_runner import TorchRunner

        torch.set_num_threads(task.threads)
        runner = TorchRunner(Path(task.folder))

    def start() -> Step:
        state = runner.new_state(batch=1, capacity=task.prompt + task.steps + 1)
        return lambda ids: void(runner.forward(ids, state))

    return start, runner.contract.vocab_size


def _transformers_start(task: Task) -> tuple[Start, int]:
    import torch
    from transformers import DynamicCache, KimiLinearForCausalLM

    torch.set_num_threads(task.threads)
    model = KimiLinearForCausalLM.from_pretrained(task.folder, dtype=torch.float32).eval()

    def start() -> Step:
        cache = DynamicCache(config=model.config)

        def step(ids: np.ndarray) -> None:
            with torch.no_grad():
                model(torch.from_numpy(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)

        return step

    return start, int(model.config.vocab_size)


def _llama_cpp_start(task: Task) -> tuple[Start, int]:
    from kimi_deploy.bench.llama_cpp import open_model

    model = open_model(Path(task.folder), task.threads, task.prompt + task.steps + 1)

    def start() -> Step:
        model.reset()
        model._ctx.kv_cache_clear()
        return lambda ids: void(model.eval(ids[0].tolist()))

    return start, int(model.n_vocab())


_STARTS = {"transformers": _transformers_start, "llama.cpp": _llama_cpp_start}


def void(_: object) -> None:
    """Drop a result."""


def measure(task: Task) -> Measurement:
    """Run the task here. The first repeat warms up and is not counted."""
    began = time.perf_counter()
    start, vocab = _STARTS.get(task.backend, _runner_start)(task)
    load = time.perf_counter() - began
    ids = np.random.default_rng(0).integers(0, vocab, (1, task.prompt + task.steps), dtype=np.int64)
    prefill: list[float] = []
    decode: list[float] = []
    for repeat in range(task.repeats + 1):
        step = start()
        times = [_timed(step, ids[:, : task.prompt])]
        times += [_timed(step, ids[:, i : i + 1]) for i in range(task.prompt, task.prompt + task.steps)]
        if repeat:
            prefill.append(times[0])
            decode += times[1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Measurement(prefill, decode, load, peak)


def _timed(step: Step, ids: np.ndarray) -> float:
    began = time.perf_counter()
    step(ids)
    return time.perf_counter() - began


def main() -> None:
    """Print the measurement, or the typed error that prevented it, as one line of JSON."""
    try:
        result: dict[str, object] = measure(Task(**json.loads(sys.argv[1]))).to_dict()
    except KimiDeployError as error:
        result = {"error": error.to_dict()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
