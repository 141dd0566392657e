"""Does validation find what it must? Known faults are planted in a right export, one at a time."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import onnxruntime

from kimi_deploy.checkpoint import Checkpoint
from kimi_deploy.checkpoint.presets import preset_config
from kimi_deploy.checkpoint.synth import synthesize
from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.contract import Dtype, GraphContract
from kimi_deploy.errors import UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx.export import export_model
from kimi_deploy.ops.kimi_delta_attention.delta_rule import CHUNK
from kimi_deploy.runtime.base import Runner
from kimi_deploy.runtime.open import Backend
from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.runtime.torch_runner import TorchRunner
from kimi_deploy.validate.faults.catalogue import FAULTS, Fault, Planted
from kimi_deploy.validate.faults.engine import Engine, EngineFault, engine_faults
from kimi_deploy.validate.faults.graph import Graph
from kimi_deploy.validate.faults.reference import ReferenceFault, reference_faults
from kimi_deploy.validate.folders import check_source
from kimi_deploy.validate.parity import Parity
from kimi_deploy.validate.prompts import Prompt, shipped_prompts
from kimi_deploy.validate.report import Report
from kimi_deploy.validate.run import Progress
from kimi_deploy.validate.selection import PARITY_CHECKS, REFERENCE_CHECKS, Selection
from kimi_deploy.validate.tolerances import tolerance

SELF_TESTED: tuple[Backend, ...] = ("torch", "ort", "trt")
TESTED_CHECKS = (*REFERENCE_CHECKS, *PARITY_CHECKS)
_ERROR = 3
PROMPTS = ("corpus 3", "one token", "random tokens")
# a few more than a chunk, so that a call can end with one
TOKENS = CHUNK + 8
GREEDY = 12


@dataclass(frozen=True)
class Outcome:
    """What became of one fault, run by `backend`: where it was `planted`, the `check` that caught it, the tensor that
    was `named`, and why.

    A fault exists only while it is tested: `command` plants it again.

    `passed`: it was caught, by the check and at the tensor where it is. The control, which has no fault, passed when
    nothing was caught.
    """

    backend: Backend
    fault: str
    planted: str
    check: str
    named: str
    note: str
    passed: bool

    def command(self, model: Path | None, export: Path | None) -> str:
        """The command that plants just this fault again; that of the control plants all of them."""
        words = ["kimi-deploy", "validate", *(str(f) for f in (model, export) if f is not None), "--self-test"]
        return shlex.join([*words, "--backend", self.backend, *(["--fault", self.fault] if self.planted else [])])

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def run_self_test(
    model: Path | None,
    export: Path | None,
    threads: int | None,
    progress: Progress,
    backends: Sequence[Backend] = SELF_TESTED,
    only: Sequence[str] = (),
) -> tuple[Outcome, ...]:
    """A control and every fault, on `export` of `model` or, without them, on a small random model.

    "torch" plants `reference_faults` in the reference, "ort" `FAULTS` in the export. "trt" plants these in the graph
    that `build-engine` makes of it, and `engine_faults` in the engine's runner, with ONNX Runtime in TensorRT's place.

    In a 16-bit export faults finer than its rounding are not planted; `only` names the faults to plant, all without.
    Raises UsageError, before anything runs, where the export is not one of the model, lacks what faults are planted
    in, or has no fault of such a name.
    """
    dtype: Dtype = "float32"
    config = preset_config("tiny")
    if model is not None and export is not None:
        config, dtype = _check_pair(model, export)
    contract = GraphContract.of(config, dtype)
    faults = [f for f in FAULTS if dtype == "float32" or not f.fine]
    of_runner = engine_faults(contract) if "trt" in backends else ()
    of_reference = reference_faults(contract) if "torch" in backends else ()
    graphs = len({"ort", "trt"} & set(backends))
    if only:
        _check_names(only, [f.name for f in (*of_reference, *(faults if graphs else ()), *of_runner)])
        of_reference = tuple(f for f in of_reference if f.name in only)
        faults = [f for f in faults if f.name in only]
        of_runner = tuple(f for f in of_runner if f.name in only)
    with (
        tempfile.TemporaryDirectory(prefix="kimi-deploy-") as scratch,
        _subject(model, export, Path(scratch), progress) as pair,
    ):
        folder, exported = pair
        reference = TorchRunner(folder)
        # faults are planted in function bodies too, which kernels would take the place of
        control = OrtRunner(exported, threads=threads, kernels="none")
        bound = tolerance(f"graph_{dtype}")
        same_dtype = None if dtype == "float32" else TorchRunner(folder, dtype)

        def compared_with() -> Parity:
            return Parity(
                reference,
                control,
                bound,
                greedy_tokens=GREEDY,
                exact_greedy=dtype == "float32",
                same_dtype=same_dtype,
            )

        shipped = shipped_prompts(None, reference.contract.vocab_size, TOKENS, TOKENS)
        prompts = [p for p in shipped if p.name in PROMPTS]
        # a changed graph may lose the in-place cache, and ONNX Runtime warns of each copy
        onnxruntime.set_default_logger_severity(_ERROR)
        engine = Engine(exported, reference.fingerprint) if "trt" in backends else None
        count = graphs * (len(faults) + 1) + len(of_runner) + (len(of_reference) + 1 if "torch" in backends else 0)
        trials = _Trials(compared_with(), prompts, progress, count)
        if "torch" in backends:
            trials.control("torch", control)
        for broken in of_reference:
            with broken.plant():
                # what the right reference gave is kept
                _Trials(compared_with(), prompts, progress, count, trials.outcomes).reference_fault(broken, control)
        if "ort" in backends:
            trials.control("ort", control)
            for fault in faults:
                trials.graph_fault("ort", fault, exported, lambda f: OrtRunner(f, threads=threads, kernels="none"))
        if engine is not None:
            trials.control("trt", engine.run_by())
            graph = Graph(exported)
            graph.set_bodies("primitive")
            graph.save(Path(scratch) / "engine")
            opened = partial(Engine, fingerprint=reference.fingerprint, bodies=False)
            for fault in faults:
                trials.graph_fault("trt", fault, Path(scratch) / "engine", lambda f: opened(f).run_by())
            for wrong in of_runner:
                trials.runner_fault("trt", wrong, engine)
        return tuple(trials.outcomes)


def _check_pair(model: Path, export: Path) -> tuple[KimiLinearConfig, Dtype]:
    """The config and dtype of an export that every fault can be planted in, before anything is opened."""
    manifest = Manifest.read(export)
    manifest.check_kind("onnx")
    check_source(manifest, export, model, Checkpoint.open(model).fingerprint())
    config = KimiLinearConfig.from_folder(export)
    lacking = [
        what
        for what, there in (
            ("no KDA", "linear_attention" in config.layer_types),
            ("no MLA", "full_attention" in config.layer_types),
            ("no experts", "sparse" in config.mlp_types),
            ("quantised weights", "quantization" not in manifest.details),
        )
        if not there
    ]
    if lacking:
        raise UsageError(
            "the faults cannot be planted in this export",
            seen=f"{export}: {', '.join(lacking)}",
            expected="KDA, MLA and experts, exported without --quantize",
            fix="give another export, or none: `kimi-deploy validate --self-test` makes a small one",
        )
    return config, manifest.details["dtype"]


def _check_names(only: Sequence[str], names: Sequence[str]) -> None:
    for name in only:
        if name not in names:
            expected = f"one of: {', '.join(dict.fromkeys(names))}"
            raise UsageError("there is no such fault here", seen=name, expected=expected)


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


class _Trials:
    """Runs the checks on one candidate after the other, saying which, and collects what became of each."""

    def __init__(
        self,
        parity: Parity,
        prompts: list[Prompt],
        progress: Progress,
        count: int,
        outcomes: list[Outcome] | None = None,
    ) -> None:
        self._parity, self._prompts, self._progress, self._count = parity, prompts, progress, count
        self.outcomes: list[Outcome] = [] if outcomes is None else outcomes

    def control(self, backend: Backend, right: Runner) -> None:
        """A candidate without a fault, which must pass."""
        with self._said(backend, "none"):
            report = self._failing(right)
        check = report.rows[0].check if report else ""
        self.outcomes.append(Outcome(backend, "none", "", check, "fails" if report else "passes", "", report is None))

    def graph_fault(self, backend: Backend, fault: Fault, source: Path, opened: Callable[[Path], Runner]) -> None:
        """`fault` in a copy of the export `source`, which is deleted again."""
        with self._said(backend, fault.name), tempfile.TemporaryDirectory(prefix="kimi-deploy-") as scratch:
            graph = Graph(source)
            planted = fault.plant(graph)
            graph.save(Path(scratch) / "fault")
            self._run(backend, fault.name, planted, opened(Path(scratch) / "fault"))

    def reference_fault(self, fault: ReferenceFault, right: Runner) -> None:
        """`fault`, which is planted already, in the reference of a candidate without one."""
        with self._said("torch", fault.name):
            self._run("torch", fault.name, fault.planted, right)

    def runner_fault(self, backend: Backend, fault: EngineFault, engine: Engine) -> None:
        """`fault` in what runs `engine`."""
        with self._said(backend, fault.name):
            self._run(backend, fault.name, fault.planted, fault.plant(engine))

    def _said(self, backend: Backend, fault: str) -> AbstractContextManager[object]:
        return self._progress(f"fault {len(self.outcomes) + 1} of {self._count}: {fault} ({backend})")

    def _run(self, backend: Backend, name: str, planted: Planted, wrong: Runner) -> None:
        """A candidate with a fault, which must be caught where it was planted."""
        report = self._failing(wrong)
        if report is None:
            self.outcomes.append(Outcome(backend, name, planted.where, "", "", "escaped", False))
            return
        row = report.first_failure
        assert row is not None
        right = row.check == planted.check and row.tensor in planted.tensors
        note = row.note if right else f"expected {planted.check}, {' or '.join(planted.tensors)}"
        self.outcomes.append(Outcome(backend, name, planted.where, row.check, row.tensor, note, right))

    def _failing(self, candidate: Runner) -> Report | None:
        """The report of the first check that fails; None when every one passes."""
        self._parity.candidate = candidate
        for check in TESTED_CHECKS:
            # a prefill of 16 bits is judged by the noise that the check before it measures
            checks = (
                tuple(c for c in TESTED_CHECKS if c in ("reference-dtype", check)) if check == "prefill" else (check,)
            )
            report = self._parity.run(self._prompts, "self-test", selection=Selection(checks))
            if report.rows and not report.passed:
                return report
        return None
