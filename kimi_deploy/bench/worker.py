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
from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_deploy.errors import KimiDeployError

if TYPE_CHECKING:
    from kimi_deploy.runtime.base import Kernels, Runner


@dataclass(frozen=True)
class Task:
    """What to measure: `batch` sequences of `prompt` tokens of prefill and `steps` of decode, `repeats` times."""

    backend: str
    folder: str
    prompt: int
    steps: int
    repeats: int
    threads: int
    batch: int = 1
    kernels: str = "auto"


@dataclass(frozen=True)
class Measurement:
    """Seconds: prefill and first token per repeat, step and output token per decode step, load; peak resident bytes;
    which of our kernels ran, as Kernels.to_dict says.

    A prefill or a step ends with the logits, a token with its choice from them; the first token's time also has the
    making of the empty state.
    """

    prefill: list[float]
    decode: list[float]
    time_to_first_token: list[float]
    time_per_output_token: list[float]
    load: float
    peak_bytes: int
    kernels: dict[str, Any] | None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


Step = Callable[[np.ndarray], np.ndarray]
Start = Callable[[], Step]
"""Begins new sequences; the Step it returns consumes ids [batch, T] and returns last tokens' logits [..., vocab]."""


def _runner_start(task: Task) -> tuple[Start, int, Kernels | None]:
    if task.backend in ("ort", "ort-bodies"):
        from kimi_deploy.runtime.ort_runner import OrtRunner

        runner: Runner = OrtRunner(
            Path(task.folder), threads=task.threads, kernels="none" if task.backend == "ort-bodies" else task.kernels
        )
    elif task.backend == "trt":
        from kimi_deploy.runtime.trt_runner import open_trt_runner

        runner = open_trt_runner(Path(task.folder))
    else:
        import torch

        from kimi_deploy.runtime.torch_runner import TorchRunner

        torch.set_num_threads(task.threads)
        runner = TorchRunner(Path(task.folder))

    def start() -> Step:
        state = runner.new_state(task.batch, capacity=task.prompt + task.steps + 1)
        return lambda ids: runner.forward(ids, state)

    return start, runner.contract.vocab_size, runner.kernels


def _transformers_start(task: Task) -> tuple[Start, int, Kernels | None]:
    import torch
    from transformers import DynamicCache, KimiLinearForCausalLM

    torch.set_num_threads(task.threads)
    model = KimiLinearForCausalLM.from_pretrained(task.folder, dtype=torch.float32).eval()

    def start() -> Step:
        cache = DynamicCache(config=model.config)

        def step(ids: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                output = model(torch.from_numpy(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
            return output.logits.numpy()

        return step

    return start, int(model.config.vocab_size), None


def _llama_cpp_start(task: Task) -> tuple[Start, int, Kernels | None]:
    from kimi_deploy.bench.llama_cpp import open_model

    model = open_model(Path(task.folder), task.threads, task.prompt + task.steps + 1)

    def step(ids: np.ndarray) -> np.ndarray:
        model.eval(ids[0].tolist())
        return np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), (model.n_vocab(),))

    def start() -> Step:
        model.reset()
        model._ctx.kv_cache_clear()
        return step

    return start, int(model.n_vocab()), None


_STARTS = {"transformers": _transformers_start, "llama.cpp": _llama_cpp_start}


def measure(task: Task) -> Measurement:
    """Run the task here. The first repeat warms up and is not counted."""
    began = time.perf_counter()
    start, vocab, kernels = _STARTS.get(task.backend, _runner_start)(task)
    load = time.perf_counter() - began
    ids = np.random.default_rng(0).integers(0, vocab, (task.batch, task.prompt + task.steps), dtype=np.int64)
    prefill: list[float] = []
    decode: list[float] = []
    first: list[float] = []
    token: list[float] = []
    for repeat in range(task.repeats + 1):
        began = time.perf_counter()
        step = start()
        started = time.perf_counter() - began
        times = [_timed(step, ids[:, : task.prompt])]
        times += [_timed(step, ids[:, i : i + 1]) for i in range(task.prompt, task.prompt + task.steps)]
        if repeat:
            prefill.append(times[0][0])
            first.append(started + times[0][1])
            decode += [logits for logits, _ in times[1:]]
            token += [chosen for _, chosen in times[1:]]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Measurement(prefill, decode, first, token, load, peak, kernels.to_dict() if kernels else None)


def _timed(step: Step, ids: np.ndarray) -> tuple[float, float]:
    """Seconds until the logits are there, and until the likeliest tokens are chosen."""
    began = time.perf_counter()
    logits = step(ids)
    computed = time.perf_counter()
    logits.argmax(-1)
    return computed - began, time.perf_counter() - began


def main() -> None:
    """Print the measurement, or the typed error that prevented it, as one line of JSON."""
    try:
        result: dict[str, object] = measure(Task(**json.loads(sys.argv[1]))).to_dict()
    except KimiDeployError as error:
        result = {"error": error.to_dict()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
