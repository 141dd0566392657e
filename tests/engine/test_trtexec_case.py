"""The files of a decode step for trtexec, and the command that runs a plan on them."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from kimi_deploy.contract import PAST_LENGTHS
from kimi_deploy.engine import trtexec_case
from kimi_deploy.validate.tolerances import tolerance


def listed(words: list[str], option: str) -> dict[str, str]:
    (text,) = [word.removeprefix(option + "=") for word in words if word.startswith(option + "=")]
    return dict(part.split(":", 1) for part in text.split(","))


def test_the_files_are_a_step_of_the_graph(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given to the graph as trtexec gives them to a plan, the inputs make the outputs."""
    arguments = [str(export), "-o", str(tmp_path / "case"), "--plan", "engine.plan", "--library", "lib.so"]
    monkeypatch.setattr("sys.argv", ["x", *arguments, "--batch", "2", "--prompt", "9", "--capacity", "32"])
    assert trtexec_case.main() == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:3] == ["trtexec", "--loadEngine=engine.plan", "--useProfile=1"]
    assert "--staticPlugins=lib.so" in words
    session = ort.InferenceSession(export / "model.onnx", providers=["CPUExecutionProvider"])
    numpy = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
    shapes, inputs = listed(words, "--shapes"), listed(words, "--loadInputs")
    feeds = {
        spec.name: np.fromfile(inputs[spec.name], numpy[spec.type]).reshape(
            [int(size) for size in shapes[spec.name].split("x")]
        )
        for spec in session.get_inputs()
    }
    assert inputs.keys() == shapes.keys() == feeds.keys()
    assert feeds[PAST_LENGTHS].tolist() == [4, 9]
    wanted = listed(words, "--loadRefOutputs")
    names = [spec.name for spec in session.get_outputs()]
    assert wanted.keys() == set(names)
    for name, seen in zip(names, session.run(None, feeds), strict=True):
        expected = np.fromfile(wanted[name], np.float32).reshape(seen.shape)
        np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    assert f"--accuracyThreshold={tolerance('graph_float32').cosine:.9f}" in words
    assert trtexec_case.main() == 2, "the folder is in use"
    monkeypatch.setattr("sys.argv", ["x", *arguments, "--force"])
    assert trtexec_case.main() == 0
