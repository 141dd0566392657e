"""A decode step as raw files for trtexec: `python -m kimi_deploy.engine.trtexec_case EXPORT -o CASE --plan PLAN`.

trtexec makes up every input that it is not given, negative lengths and token ids among them. So a prompt of random
tokens and a step are run by ONNX Runtime; what went into the step and what came out of it are the files.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Case:
    """Inputs and expected outputs of one step by the graph's names, and the model's dtype."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    dtype: str


def make_case(export: Path, batch: int, prompt: int, capacity: int) -> Case:
    """A step of `batch` rows after prompts of up to `prompt` tokens, each row's shorter than the last one's.

    Raises as OrtRunner and its `new_state` and `forward` do.
    """
    import numpy as np

    from kimi_deploy.contract import INPUT_IDS, LOGITS, LOGITS_INDICES, PAST_LENGTHS, SEQUENCE_LENGTHS
    from kimi_deploy.runtime.ort_runner import OrtRunner

    runner = OrtRunner(export)
    state = runner.new_state(batch, capacity)
    ids = np.random.default_rng(0).integers(0, runner.contract.vocab_size, (batch, prompt))
    lengths = np.array([max(prompt * (row + 1) // batch, 1) for row in range(batch)], np.int32)
    token = runner.forward(ids, state, lengths)[:, 0].argmax(-1)[:, None]
    given = {
        INPUT_IDS: token.astype(np.int64),
        SEQUENCE_LENGTHS: np.ones(batch, np.int32),
        PAST_LENGTHS: state.lengths.astype(np.int32),
        LOGITS_INDICES: np.zeros((batch, 1), np.int64),
    } | {name: np.array(tensor) for name, tensor in state.tensors().items()}
    logits = runner.forward(token, state)
    after = state.tensors()
    outputs = {LOGITS: logits} | {s.present_name: np.array(after[s.past_name]) for s in runner.contract.states}
    return Case({s.name: given[s.name] for s in runner.contract.inputs}, outputs, runner.contract.dtype)


def write_case(case: Case, folder: Path, *, overwrite: bool) -> None:
    """A file NAME.bin per tensor, whole or not at all. Raises UsageError when the folder is in use."""
    from kimi_deploy.output_folder import output_folder

    arrays = {f"{name}.bin": array for name, array in {**case.inputs, **case.outputs}.items()}
    with output_folder(folder, overwrite=overwrite, known=lambda _: set(arrays)) as target:
        for name, array in arrays.items():
            (target / name).write_bytes(array.tobytes())


def trtexec_words(case: Case, folder: Path, plan: Path, library: Path | None, profile: int) -> list[str]:
    """The command that runs `plan` on the files of `folder` and compares, as `validate` bounds the cosine."""
    from kimi_deploy.validate.tolerances import tolerance

    def files(names: Mapping[str, object]) -> str:
        return ",".join(f"{name}:{folder / name}.bin" for name in names)

    shapes = ",".join(f"{name}:{'x'.join(map(str, array.shape))}" for name, array in case.inputs.items())
    words = ["trtexec", f"--loadEngine={plan}", f"--useProfile={profile}", f"--shapes={shapes}"]
    words += [f"--staticPlugins={library}"] if library else []
    words += [f"--loadInputs={files(case.inputs)}", f"--loadRefOutputs={files(case.outputs)}"]
    bound = tolerance(f"graph_{case.dtype}").cosine
    return [*words, "--accuracyAlgorithm=cos", f"--accuracyThreshold={bound:.9f}"]


def main() -> int:
    """Write the files and print the command; its exit code."""
    from kimi_deploy.errors import KimiDeployError

    parser = argparse.ArgumentParser(prog="python -m kimi_deploy.engine.trtexec_case", description=__doc__)
    parser.add_argument("export", type=Path, help="the export that the plan was built from")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the files")
    parser.add_argument("--plan", type=Path, required=True, help="the plan that trtexec runs")
    parser.add_argument("--library", type=Path, help="libkimi_plugins.so, where the plan has plugins")
    parser.add_argument("--profile", type=int, default=1, help="number of the decode profile in the plan (1)")
    parser.add_argument("--batch", type=int, default=1, help="rows (1)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the longest row's prompt (64)")
    parser.add_argument("--capacity", type=int, default=256, help="tokens that the states hold (256)")
    parser.add_argument("--force", action="store_true", help="replace files of an earlier run")
    given = parser.parse_args()
    try:
        case = make_case(given.export, given.batch, given.prompt, given.capacity)
        write_case(case, given.output, overwrite=given.force)
    except KimiDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(shlex.join(trtexec_words(case, given.output, given.plan, given.library, given.profile)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
