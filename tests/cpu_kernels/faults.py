"""Libraries of CPU kernels with one planted fault each: a kernel's source with one expression changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.kernels.build import PLUGINS, run

LEVEL, LEVEL_NAME = "x86_64_v2", "x86-64-v2"
"""The one instruction set that has the fault: the rest of the library is the objects of the right one."""


@dataclass(frozen=True)
class KernelFault:
    """`right` stands once in the `source` of plugins/cpu and is changed into `wrong`; `check` must find it first, and
    name `tensor` of a model of two KDA layers and an MLA layer.
    """

    name: str
    source: str
    right: str
    wrong: str
    check: str
    tensor: str


FAULTS = (
    KernelFault(
        "no correction by what the state holds",
        "kda",
        "begin + j * lanes) - from_key[j]);",
        "begin + j * lanes));",
        "prefill",
        "0.recurrent_state",
    ),
    KernelFault(
        "newest column of the window lost",
        "kda",
        "third = column(steps_ - 1, part)",
        "third = column(steps_ - 2, part)",
        "prefill",
        "0.conv_state",
    ),
    KernelFault(
        "newest token not attended to",
        "latent_attention",
        "begin + i % count + 1 - tile",
        "begin + i % count - (begin > 0) + 1 - tile",
        "split-prefill",
        "logits",
    ),
    KernelFault(
        "last expert alone",
        "moe",
        "+= m_.sorted_weights[choice] * sum;",
        "= m_.sorted_weights[choice] * sum;",
        "prefill",
        "2.latent",
    ),
)


def build_fault(fault: KernelFault, library: Path, folder: Path) -> Path:
    """The library with `fault`, made in `folder` of the objects that `library` was linked of."""
    text = (PLUGINS / "cpu" / f"{fault.source}.cpp").read_text(encoding="utf-8")
    assert text.count(fault.right) == 1, f"{fault.source}.cpp has changed: plant {fault.name!r} in it again"
    wrong = folder / f"{fault.source}.cpp"
    wrong.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
    objects = [
        str(path)
        for path in sorted((library.parent / "CMakeFiles").glob("*.dir/**/*.o"))
        if path.parts[-3:] != (f"cpu_{LEVEL}.dir", "cpu", f"{fault.source}.cpp.o")
    ]
    made = folder / "libkimi_ort.so"
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-march=x86-64-v2", "-fopenmp-simd", "-Wno-psabi"]
    includes = [f"-I{PLUGINS / 'cpu'}", f"-DKIMI_CPU_LEVEL={LEVEL}"]
    run("c++", *options, *includes, str(wrong), *objects, "-o", str(made))
    return made
