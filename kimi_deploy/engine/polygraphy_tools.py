"""Polygraphy's command line with our plugins in TensorRT: `python -m kimi_deploy.engine.polygraphy_tools convert ...`.

Polygraphy loads `--plugins` before it imports TensorRT, so that a library which is not linked with one TensorRT finds
none to register with; TensorRT-RTX's wheel needs a name served before it parses a plugin node (`soname_stub.py`); and
Polygraphy 0.53's `inspect model` imports "tensorrt" whichever it was told to use. So TensorRT is loaded first here.
POLYGRAPHY_USE_TENSORRT_RTX=1 means TensorRT-RTX, as in Polygraphy.
"""

from __future__ import annotations

import os
import sys

from kimi_deploy.engine.backend import load


def main() -> int:
    """Run Polygraphy's tool with this process's arguments; its exit code."""
    rtx = os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX", "0") != "0"
    backend = load("tensorrt-rtx" if rtx else "tensorrt")
    sys.modules.setdefault("tensorrt", backend.module)
    from polygraphy.tools import main as polygraphy

    return int(polygraphy() or 0)


if __name__ == "__main__":
    sys.exit(main())
