"""A long prompt streamed through an export on the CPU: time per token, memory and state at growing contexts."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.errors import UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.ops.latent_attention.operands import Sizes
from kimi_deploy.output_file import whole_file
from kimi_deploy.quantization.scheme import recorded_scheme
from kimi_deploy.runtime.base import Runner, kernels_to_dict, ops_run_as
from kimi_deploy.runtime.state import State
from kimi_deploy.runtime.state_file import load_snapshot
from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.exact_graph import exact_runner
from kimi_deploy.validate.observation import observe, run_in_pieces
from kimi_deploy.validate.tolerances import tolerance

SCHEMA_VERSION = 2
FIRST_MARK = 1024
CHUNK, SHORTEST_CHUNK = 512, 16
SCORE_BYTES = 128 << 20
"""Where attention keeps its scores, they take heads x chunk x cached tokens x 4 bytes: a chunk is as long as this
allows."""
COMPARED = 2048
"""Tokens up to which the whole prompt is also taken in one call, to compare."""


@dataclass(frozen=True)
class Point:
    """What it took to come to `context` cached tokens from the point before, and to decode there; batch 1.

    Seconds per token of prefill (the mean since the last point) and of decode (the median of single steps). Bytes: of
    the KDA states, of the latent cache's rows in use, and the process's peak so far.
    """

    context: int
    prefill_seconds: float
    decode_seconds: float
    kda_bytes: int
    latent_bytes: int
    peak_process_bytes: int


def stream(
    export: Path,
    tokens: int,
    steps: int,
    threads: int,
    advance: Callable[[int], None] = lambda n: None,
    chunk: int = CHUNK,
    checkpoint: Path | None = None,
    kernels: str = "auto",
) -> dict[str, Any]:
    """Consume a seeded random prompt of `tokens` tokens; every doubling from 1,024 on is a point of the result.

    At a point, `steps` tokens of the prompt are consumed one by one, as decoding does. `advance` is called with the
    tokens consumed since the last call. Prefill calls take up to `chunk` tokens. With `checkpoint` the state and the
    points are saved there after every point, and a call that finds the file goes on from it. The result also says how
    far a prefill in chunks is from one in a single call, for up to 2,048 tokens.
    Raises UsageError when the prompt is shorter than 1,024 tokens, the steps are more than 512, or the checkpoint is
    of a run with other numbers, StateError when it is no state of this model, and what OrtRunner raises.
    """
    from kimi_deploy.runtime.ort_runner import OrtRunner

    if tokens < FIRST_MARK:
        raise UsageError("the context is too short to show much", seen=str(tokens), expected=f"{FIRST_MARK} or more")
    if not 1 <= steps <= FIRST_MARK // 2:
        raise UsageError("the decode steps do not fit between two points", seen=str(steps), expected="1 to 512")
    config = KimiLinearConfig.from_folder(export)
    runner = OrtRunner(export, threads=threads, kernels=kernels)
    state, points = _begin(runner, tokens, steps, chunk, checkpoint)
    done = int(state.lengths[0])
    advance(done)
    marks = _marks(tokens, steps)
    began, since = time.perf_counter(), done
    for start, stop in _chunks(tokens, steps, config.num_attention_heads, chunk, _tiled_from(export, config)):
        if start < done:
            continue
        runner.forward(_prompt(runner, start, stop), state)
        advance(stop - start)
        if stop in marks:
            prefill = (time.perf_counter() - began) / (stop - since)
            points.append(_point(runner, state, prefill, _decode(runner, state, steps)))
            advance(steps)
            if checkpoint is not None:
                notes = _numbers(steps, chunk, runner) | {"points": json.dumps([asdict(p) for p in points])}
                state.save(checkpoint, notes)
            began, since = time.perf_counter(), stop + steps
    state.check_finite()
    compared = _compared(runner, export, threads, kernels)
    return {
        "schema_version": SCHEMA_VERSION,
        "tokens": tokens,
        "decode_steps": steps,
        "threads": threads,
        "kernels": kernels_to_dict(runner.kernels),
        "chunk": chunk,
        "points": [asdict(p) for p in points],
        "kda_constant": len({p.kda_bytes for p in points}) == 1,
        # last: one call over a whole prompt may take more memory than all the points
        "chunked_against_whole": _chunked_against_whole(compared, min(tokens, COMPARED)),
    }


def _begin(runner: Runner, tokens: int, steps: int, chunk: int, checkpoint: Path | None) -> tuple[State, list[Point]]:
    """An empty state, or that of the checkpoint with the points before it."""
    capacity = tokens + steps
    if checkpoint is None or not checkpoint.exists():
        return runner.new_state(batch=1, capacity=capacity), []
    snapshot = load_snapshot(checkpoint, runner.contract, runner.fingerprint)
    wanted = _numbers(steps, chunk, runner)
    seen = {key: snapshot.notes.get(key, "none") for key in wanted}
    consumed = int(snapshot.lengths[0])
    if seen != wanted or consumed > capacity or consumed - steps not in _marks(tokens, steps):
        raise UsageError(
            "the checkpoint is of a run with other numbers",
            seen=f"{checkpoint}: {seen}, {consumed} tokens",
            expected=f"{wanted}, a point of a prompt of {tokens} tokens",
            fix="give the same numbers, or another --checkpoint",
        )
    return runner.resume(snapshot, capacity), [Point(**p) for p in json.loads(snapshot.notes["points"])]


def _numbers(steps: int, chunk: int, runner: Runner) -> dict[str, str]:
    """What two calls must have in common to add up to one run."""
    return {"decode_steps": str(steps), "chunk": str(chunk), "ops": ops_run_as(runner.kernels)}


def _tiled_from(export: Path, config: KimiLinearConfig) -> int | None:
    """Tokens of a call from which attention keeps no scores of what was cached before; None where it always does."""
    if Manifest.read(export).details.get("body") != "ort":
        return None
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return Sizes(config.num_attention_heads, nope, rope, value, config.kv_lora_rank).expand_from


def _prompt(runner: Runner, start: int, stop: int) -> np.ndarray:
    """Tokens `start` to `stop` of the prompt [1, tokens]: the same whether a run goes on or not."""
    return np.random.default_rng([0, start]).integers(0, runner.contract.vocab_size, (1, stop - start))


def _marks(tokens: int, steps: int) -> list[int]:
    """FIRST_MARK doubled as often as it fits with its decode steps, and the end."""
    doubled = [FIRST_MARK << n for n in range(tokens.bit_length())]
    return [*(m for m in doubled if m + steps < tokens), tokens]


def _chunks(tokens: int, steps: int, heads: int, longest: int, tiled_from: int | None) -> Iterator[tuple[int, int]]:
    """Starts and ends of the prefill calls; a mark ends one, and the next begins after the mark's decode steps.

    Calls of `tiled_from` tokens or more keep no scores; shorter ones get no more tokens than SCORE_BYTES allow.
    """
    start, marks = 0, _marks(tokens, steps)
    while start < tokens:
        mark = next(m for m in marks if m > start)
        stop = min(start + longest, mark)
        if tiled_from is None or not tiled_from <= stop - start <= start:
            fits = SCORE_BYTES // (4 * heads * max(start, CHUNK))
            stop = min(stop, start + max(SHORTEST_CHUNK, 1 << max(0, fits.bit_length() - 1)))
        yield start, stop
        start = stop + steps if stop == mark else stop


def _decode(runner: Runner, state: State, steps: int) -> float:
    times = []
    for _ in range(steps):
        past = int(state.lengths[0])
        ids = _prompt(runner, past, past + 1)
        began = time.perf_counter()
        runner.forward(ids, state)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _point(runner: Runner, state: State, prefill: float, decode: float) -> Point:
    context = int(state.lengths[0])
    tensors = state.tensors()
    kda = sum(tensors[s.past_name].nbytes for s in runner.contract.states if s.kind != "latent")
    per_token = sum(m.bytes_per_token for m in state.memory())
    # kilobytes on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Point(context, prefill, decode, kda, per_token * context, peak)


def _compared(runner: Runner, export: Path, threads: int, kernels: str) -> Runner:
    """What takes a prompt twice: where inputs are rounded to 8 bits, an error of 1e-7 would decide a value between two
    steps, so that they are then read as they are.
    """
    manifest = Manifest.read(export)
    scheme = recorded_scheme(manifest.details)
    if scheme is None or scheme.activations == "float32":
        return runner
    return exact_runner(export, manifest, "cpu", threads, kernels)


def _chunked_against_whole(runner: Runner, tokens: int) -> dict[str, Any]:
    """Largest error over the peak, of logits and of any state, between `tokens` tokens in chunks and in one call.

    `wrong` names, in the model's order, what is beyond the bound of the graph's dtype, or is no number on either side.
    """
    ids = np.random.default_rng(1).integers(0, runner.contract.vocab_size, tokens)
    chunked = run_in_pieces(runner, ids, range(CHUNK, tokens, CHUNK))
    state = runner.new_state(batch=1, capacity=tokens)
    whole = observe(runner.forward(ids[None], state, logits_indices="all")[0], state)
    bound = tolerance(f"graph_{runner.contract.dtype}")
    errors = {name: compare(chunked.states[name], value) for name, value in whole.states.items()}
    worst = max(errors, key=lambda name: errors[name].peak)
    found = errors | {"logits": compare(chunked.logits, whole.logits)}
    wrong = [name for name, error in found.items() if not error.within(bound)]
    return {
        "tokens": tokens,
        "bound": bound.peak,
        "passed": not wrong,
        "wrong": wrong,
        "logits_peak": found["logits"].peak,
        "state_peak": errors[worst].peak,
        "worst_state": worst,
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """Time per token and memory over the context, as a PNG. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = report["points"]
    context = [p["context"] for p in points]
    figure, (times, memory) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for key, name in (("prefill_seconds", "prefill"), ("decode_seconds", "decode")):
        times.plot(context, [1e3 * p[key] for p in points], marker="o", label=name)
    times.set(xscale="log", yscale="log", xlabel="cached tokens", ylabel="ms per token", title="time")
    for key, name in (
        ("kda_bytes", "KDA states"),
        ("latent_bytes", "MLA latent cache"),
        ("peak_process_bytes", "process, peak"),
    ):
        memory.plot(context, [p[key] / 1e6 for p in points], marker="o", label=name)
    memory.set(xscale="log", yscale="log", xlabel="cached tokens", ylabel="MB", title="memory")
    for axes in (times, memory):
        axes.set_xscale("log", base=2)
        axes.grid(True, alpha=0.3)
        axes.legend(frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
