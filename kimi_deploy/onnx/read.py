"""The graph of an export, read for what it says; who runs it gives the file to a runtime."""

from __future__ import annotations

from pathlib import Path

import onnx

from kimi_deploy.errors import ContractError


def read_graph(export: Path) -> onnx.ModelProto:
    """model.onnx of the folder `export`, its weights left in their files. Raises ContractError when unreadable."""
    try:
        return onnx.load(export / "model.onnx", load_external_data=False)
    except Exception as error:  # protobuf and OS errors alike
        raise ContractError(
            "the graph cannot be read",
            seen=f"{export / 'model.onnx'}: {str(error)[:300]}",
            fix="copy the export again, or export again",
        ) from error
