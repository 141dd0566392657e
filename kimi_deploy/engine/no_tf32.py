"""For `polygraphy convert --trt-config-postprocess-script`: turns TF32 off, which Polygraphy's config for TensorRT-RTX
leaves on, whatever `--tf32` says.
"""

from __future__ import annotations

from typing import Any


def postprocess_config(builder: Any, network: Any, config: Any) -> None:
    """Called by Polygraphy, under this name, with the config it has made."""
    import tensorrt_rtx as trt

    config.clear_flag(trt.BuilderFlag.TF32)
