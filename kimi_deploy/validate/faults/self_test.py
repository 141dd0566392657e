"""Does validation find what it must? Known faults are planted in a right export, one at a time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime

from kimi_deploy.checkpoint.synth import synthesize
from kimi_deploy.errors import UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx.export import export_model
from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.runtime.torch_runner import TorchRunner
from kimi_deploy.validate.faults.catalogue import FAULTS, Fault, Planted
from kimi_deploy.validate.faults.graph import Graph
from kimi_deploy.validate.parity import Parity
from kimi_deploy.validate.prompts import Prompt, shipped_prompts
from kimi_deploy.validate.report import Report
from kimi_deploy.validate.run import Progress
from kimi_deploy.validate.selection import Selection
from kimi_deploy.validate.tolerances import tolerance

CHECKS = ("prefill", "split-prefill", "decode-steps", "ragged-batch", "padding", "resume", "full-cache")
_ERROR = 3
PROMPTS = ("corpus 3", "one token", "random tokens")
TOKENS = 40


@dataclass(frozen=True)
class Outcome:
    """What became of one fault: where it was `planted`, the `check` that caught it, the tensor it `named`, and why.

    `passed`: it was caught, by the check and at the tensor where it is. The control, which has no fault, passed when
    nothing was caught.
    """

    fault: str
    planted: str
    check: str
    named: str
    note: str
    passed: bool

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def run_self_test(
    model: Path | None, export: Path | None, threads: int | None, progress: Progress
) -> tuple[Outcome, ...]:
    """The control and every fault in `FAULTS`, on `export` of `model` or, without them, on a small random model.

    In a 16-bit export faults finer than its rounding are not planted. Raises UsageError where the export is not one of
    the model, and ValidationError where a fault cannot be planted in it.
    """
    with (
        tempfile.TemporaryDirectory(prefix="kimi-deploy-") as scratch,
        _subject(model, export, Path(scratch), progress) as pair,
    ):
        folder, exported = pair
        manifest = Manifest.read(exported)
        manifest.check_kind("onnx")
        dtype = manifest.details["dtype"]
        reference = TorchRunner(folder)
        control = OrtRunner(exported, threads=threads)
        if control.fingerprint != reference.fingerprint:
            raise UsageError("EXPORT was not made from MODEL", seen=control.fingerprint, expected=reference.fingerprint)
        bound = tolerance(f"graph_{dtype}")
        parity = Parity(reference, control, bound, greedy_tokens=1, exact_greedy=dtype == "float32")
        shipped = shipped_prompts(None, reference.contract.vocab_size, TOKENS, TOKENS)
        prompts = [p for p in shipped if p.name in PROMPTS]
        faults = [f for f in FAULTS if dtype == "float32" or not f.fine]
        # a changed graph may lose the in-place cache, and ONNX Runtime warns of each copy
        onnxruntime.set_default_logger_severity(_ERROR)
        with progress("planting faults", len(faults) + 1, unit="faults") as advance:
            report = _first_failing(parity, prompts)
            named = "fails" if report else "passes"
            outcomes = [Outcome("none", "", report.rows[0].check if report else "", named, "", report is None)]
            for number, fault in enumerate(faults):
                advance(1)
                outcomes.append(_try(fault, exported, Path(scratch) / f"fault-{number}", parity, prompts, threads))
            advance(1)
        return tuple(outcomes)


@contextmanager
def _subject(model: Path | None, export: Path | None, scratch: Path, progress: Progress) -> Iterator[tuple[Path, Path]]:
    """The checkpoint and export to plant faults in."""
    if model is not None and export is not None:
        yield model, export
        return
    synthesize("tiny", scratch / "model")
    export_model(
        scratch / "model", scratch / "export", dtype="float32", flavour="ort", overwrite=False, progress=progress
    )
    yield scratch / "model", scratch / "export"


def _try(
    fault: Fault, export: Path, target: Path, parity: Parity, prompts: list[Prompt], threads: int | None
) -> Outcome:
    graph = Graph(export)
    planted = fault.plant(graph)
    graph.save(target)
    parity.candidate = OrtRunner(target, threads=threads)
    report = _first_failing(parity, prompts)
    shutil.rmtree(target)
    if report is None:
        return Outcome(fault.name, planted.where, "", "", "escaped", False)
    return _judge(fault, planted, report)


def _judge(fault: Fault, planted: Planted, report: Report) -> Outcome:
    row = report.first_failure
    assert row is not None
    right = row.check == planted.check and row.tensor in planted.tensors
    note = row.note if right else f"expected {planted.check}, {' or '.join(planted.tensors)}"
    return Outcome(fault.name, planted.where, row.check, row.tensor, note, right)


def _first_failing(parity: Parity, prompts: list[Prompt]) -> Report | None:
    """The report of the first check that fails; None when every one passes."""
    for check in CHECKS:
        report = parity.run(prompts, "self-test", selection=Selection((check,)))
        if not report.passed:
            return report
    return None
