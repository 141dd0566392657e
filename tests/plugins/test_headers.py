"""Where CMake gets TensorRT's headers from, and what it says when it gets none. Nothing is compiled or downloaded."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from tests.capabilities import needs_packaged_tensorrt_headers
from tests.kernels.build import PLUGINS

from .conftest import headers


def configure(folder: Path, *options: str) -> tuple[int, str]:
    command = ["cmake", "-S", str(PLUGINS), "-B", str(folder / "build"), "-DKIMI_CUDA=OFF", *options]
    # neither a TENSORRT_ROOT nor headers of this machine are to be found
    command += ["-DCMAKE_FIND_ROOT_PATH=/nowhere", "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY"]
    environment = {k: v for k, v in os.environ.items() if k != "TENSORRT_ROOT"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_without_headers_the_kernels_are_built_and_the_rest_is_said(tmp_path: Path) -> None:
    code, said = configure(tmp_path)
    assert code == 0, said
    assert "TensorRT plugins are not built, the kernels are" in said
    assert all(way in said for way in ("TENSORRT_ROOT", "TENSORRT_INCLUDE_DIR", "KIMI_TENSORRT=ON"))


def test_a_download_that_fails_is_an_error_with_the_ways_out(tmp_path: Path) -> None:
    code, said = configure(tmp_path, "-DKIMI_TENSORRT=ON", f"-DKIMI_TENSORRT_HEADERS_URL=file://{tmp_path}/none")
    assert code != 0
    assert "cannot be downloaded" in said
    assert "TENSORRT_ROOT" in said


def test_a_download_of_other_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "NvInferImpl.h").write_text("// something else")
    code, said = configure(tmp_path, "-DKIMI_TENSORRT=ON", f"-DKIMI_TENSORRT_HEADERS_URL=file://{tmp_path}")
    assert code != 0
    assert "is not the pinned file" in said


def test_a_root_without_headers_is_refused(tmp_path: Path) -> None:
    """Whatever other headers the machine has."""
    code, said = configure(tmp_path, f"-DTENSORRT_ROOT={tmp_path}/none")
    assert code != 0
    assert f"TENSORRT_ROOT has no headers; seen: {tmp_path}/none;" in said


def test_headers_that_are_too_old_are_refused(tmp_path: Path) -> None:
    (tmp_path / "NvInferRuntime.h").write_text("")
    version = "#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 3\n"
    (tmp_path / "NvInferVersion.h").write_text(version)
    code, said = configure(tmp_path, f"-DTENSORRT_INCLUDE_DIR={tmp_path}")
    assert code != 0
    assert "TensorRT 10.3; expected: 10.13 or newer" in said


@needs_packaged_tensorrt_headers
def test_the_packaged_headers_are_the_pinned_ones() -> None:
    """A third party's package carries them: its bytes are NVIDIA's of TensorRT 10.14.1, which are Apache-2.0."""
    (option,) = headers()
    folder = Path(option.partition("=")[2])
    for line in Path(__file__).with_name("packaged_headers.sha256").read_text().splitlines():
        wanted, name = line.split()
        content = (folder / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == wanted, name
        assert b"SPDX-License-Identifier: Apache-2.0" in content, name


@needs_packaged_tensorrt_headers
def test_given_headers_are_used(tmp_path: Path) -> None:
    code, said = configure(tmp_path, *headers(), f"-DKIMI_CUDA_INCLUDE_DIR={tmp_path}")
    assert code == 0, said
    assert "TensorRT 10.14 headers" in said
    assert "not built" not in said
