"""What a decode step on ONNX Runtime takes on the host besides the graph: checks, bindings, copies of small arrays."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from kimi_deploy.runtime.ort_runner import OrtRunner

_WARM_UP = 8


def host_glue(export: Path, prompt: int, steps: int, threads: int, kernels: str = "auto") -> dict[str, float]:
    """Seconds of `Runner.forward` less those in ONNX Runtime's run call, of `steps` decode steps, batch 1.

    The steps follow a prefill of `prompt` tokens and leave the processor's caches full of weights; a hot loop over the
    same lines would show a fraction of it. Returns the median and the 10th and 90th percentile. Raises the errors of
    OrtRunner.
    """
    runner = OrtRunner(export, threads=threads, kernels=kernels)
    session = runner._session
    run, in_graph = session.run_with_iobinding, 0.0

    def timed_run(binding: ort.IOBinding) -> None:
        nonlocal in_graph
        began = time.perf_counter()
        run(binding)
        in_graph = time.perf_counter() - began

    session.run_with_iobinding = timed_run
    state = runner.new_state(1, prompt + _WARM_UP + steps)
    ids = np.random.default_rng(0).integers(0, runner.contract.vocab_size, (1, state.capacity))
    runner.forward(ids[:, :prompt], state)
    glue = []
    for i in range(prompt, state.capacity):
        token = ids[:, i : i + 1]
        began = time.perf_counter()
        runner.forward(token, state)
        glue.append(time.perf_counter() - began - in_graph)
    median, p10, p90 = np.percentile(glue[_WARM_UP:], (50, 10, 90)).tolist()
    return {"median": median, "p10": p10, "p90": p90}
