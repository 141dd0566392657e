"""What ptxas said of every kernel: registers, stack, spills. `python ptxas_report.py BUILD_FOLDER` prints it.

Exits with 1 if any kernel has a stack frame (a local array or a spill), or if there is no report. Standard library
only, so that it runs on a machine that has nothing but a compiler.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>sm_\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_TYPES = {"f": "float32", "NS_4HalfE": "float16", "NS_8BFloat16E": "bfloat16"}
_NAME = re.compile(
    r"_ZN4kimi\d+(?P<kernel>kda_[a-z]+|moe_[a-z_]+(?:\d\d)?|causal_conv|linear_attention)I(?P<type>f|NS_4HalfE|NS_8BFloat16E)(?P<constants>(?:L[ib]\d+E)*)E"
)


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture. `stack`, `stores` and `loads` are bytes of local memory a thread."""

    name: str
    architecture: str
    stack: int
    stores: int
    loads: int
    registers: int


def read_report(folder: Path) -> list[Kernel]:
    """Every kernel in the reports (*.ptxas.txt) that the build left in `folder`."""
    kernels = []
    for path in sorted(folder.glob("*.ptxas.txt")):
        entry, stack = None, (0, 0, 0)
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := _ENTRY.search(line):
                entry = match
            elif match := _STACK.search(line):
                stack = tuple(map(int, match.groups()))
            elif entry and (match := _REGISTERS.search(line)):
                kernels.append(Kernel(readable(entry["name"]), entry["architecture"], *stack, int(match[1])))
                entry = None
    return kernels


def readable(mangled: str) -> str:
    """kda_chain<bfloat16, 128> from its mangled name; any other name as it is."""
    match = _NAME.match(mangled)
    if match is None:
        return mangled
    constants = re.findall(r"L[ib](\d+)E", match["constants"])
    return f"{match['kernel']}<{', '.join([_TYPES[match['type']], *constants])}>"


def main(folder: Path) -> int:
    kernels = read_report(folder)
    for k in kernels:
        print(f"{k.architecture:8} {k.name:34} {k.registers:4} registers {k.stack:5} bytes of stack")
    bad = [k for k in kernels if k.stack or k.stores or k.loads]
    if not kernels:
        print(f"no ptxas report in {folder}", file=sys.stderr)
    for k in bad:
        print(f"{k.name} for {k.architecture} uses local memory", file=sys.stderr)
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
