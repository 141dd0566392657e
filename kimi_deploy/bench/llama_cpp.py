"""llama.cpp on the same checkpoint: made into GGUF by its own converter, run through llama-cpp-python."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kimi_deploy.errors import BackendError, UsageError
from kimi_deploy.optional_packages import INSTALL

CONVERTER = "convert_hf_to_gguf.py"

# The converter wants a vocabulary that its tokenizer types can express; token ids are all that is measured.
_CONVERT = """
import runpy, sys
folder, *arguments = sys.argv[1:]
sys.path[:0] = [folder, f"{folder}/gguf-py"]
from conversion.base import TextModel
from conversion.kimi_linear import KimiLinearModel
KimiLinearModel.set_vocab = TextModel._set_vocab_none
sys.argv = ["convert_hf_to_gguf.py", *arguments]
runpy.run_path(f"{folder}/convert_hf_to_gguf.py", run_name="__main__")
"""


def check_source(source: Path) -> None:
    """Raise UsageError unless `source` is a source folder of llama.cpp."""
    if not (source / CONVERTER).is_file():
        raise UsageError(
            "this is not llama.cpp's source folder",
            seen=f"{source} without {CONVERTER}",
            fix="git clone https://github.com/ggml-org/llama.cpp, or vendor/llama.cpp of llama-cpp-python's sdist",
        )


def convert(model: Path, source: Path, output: Path, kind: str = "f32") -> None:
    """Write the checkpoint `model` as GGUF to `output` with the converter of `source`, llama.cpp's source folder.

    `kind` is what the converter calls --outtype: f32, f16, bf16 or q8_0; or q4_0, which llama.cpp's own quantisation
    makes of f32. The code in `source` is executed. Raises UsageError when there is no converter, BackendError with its
    last line when it fails.
    """
    if kind == "q4_0":
        plain = output.with_name(f"{output.name}.f32")
        convert(model, source, plain)
        _quantize(plain, output)
        plain.unlink()
        return
    check_source(source)
    command = [sys.executable, "-c", _CONVERT, str(source.resolve()), str(model), "--outfile", str(output)]
    done = subprocess.run([*command, "--outtype", kind], capture_output=True, text=True, check=False)
    if done.returncode or not output.is_file():
        raise BackendError(
            "llama.cpp's converter failed",
            seen=done.stderr.strip().rsplit("\n", 1)[-1][:1000],
            fix="pip install what it names; `kimi-deploy synth` and the released checkpoints have the names it knows",
        )


def _quantize(plain: Path, output: Path) -> None:
    """llama.cpp's Q4_0 of a float32 file, which decides by itself which tensors stay wider."""
    llama_cpp = _package()
    with _stdout_to_stderr():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        failed = llama_cpp.llama_model_quantize(str(plain).encode(), str(output).encode(), ctypes.byref(parameters))
    if failed:
        raise BackendError("llama.cpp did not quantise the model to q4_0", seen=f"status {failed}")


def _package() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise BackendError("llama-cpp-python cannot be imported", seen=str(error), fix=INSTALL["llama_cpp"]) from error
    return llama_cpp


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """llama.cpp writes to the descriptors themselves, past sys.stdout, where results go."""
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def open_model(path: Path, threads: int, context: int):  # type: ignore[no-untyped-def]
    """llama-cpp-python's Llama with `context` tokens of memory, the whole prompt in one batch.

    Raises BackendError when the package is not installed.
    """
    with _stdout_to_stderr():
        return _package().Llama(
            str(path),
            n_ctx=context,
            n_batch=context,
            n_ubatch=context,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
