#!/usr/bin/env python3
"""Measure how long the graph of the released model takes to build, and the memory it takes; needs no checkpoint.

    python scripts/measure_graph.py [--quantize int4]

Seconds count from the start of Python to the graph with its bodies, loading torch included. A JSON line; the exit code
is 1 when it took more than 60 seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

ALLOWED_SECONDS = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", metavar="SPEC")
    arguments = parser.parse_args()
    start = time.monotonic() - time.process_time()

    from kimi_deploy.checkpoint import Checkpoint, released_tensors
    from kimi_deploy.checkpoint.presets import preset_config
    from kimi_deploy.checkpoint.safetensors_file import layout_header
    from kimi_deploy.contract import Dtype, GraphContract
    from kimi_deploy.onnx.bodies import set_bodies
    from kimi_deploy.onnx.export import build_graph
    from kimi_deploy.onnx.passes import mark_plugin_nodes
    from kimi_deploy.onnx.quantize import quantize_graph
    from kimi_deploy.quantization.scheme import parse_scheme
    from kimi_deploy.quantization.selection import settled

    config = preset_config("kimi-linear-48b")
    tensors = [(t.name, t.dtype, t.shape) for t in released_tensors(config, "bfloat16")]
    # names and shapes alone: there is no file, so that nothing could read a weight
    infos = layout_header(tensors, "model.safetensors")[1]
    checkpoint = Checkpoint(Path("no such folder"), config, {info.name: info for info in infos})
    dtype: Dtype = "float32" if arguments.quantize else "bfloat16"
    model = build_graph(checkpoint, GraphContract.of(config, dtype), ())
    if arguments.quantize:
        quantize_graph(model, checkpoint, settled(parse_scheme(arguments.quantize), config, dtype))
    mark_plugin_nodes(model)
    set_bodies(model, "ort", dtype)
    seconds = time.monotonic() - start
    report = {
        "layers": config.num_hidden_layers,
        "tensors": len(tensors),
        "nodes": len(model.graph),
        "seconds": round(seconds, 1),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(report))
    return int(seconds > ALLOWED_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
