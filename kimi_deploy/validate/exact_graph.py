"""A quantised export without the rounding of its kernels' inputs. Needs no torch."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx.bodies import set_bodies
from kimi_deploy.onnx.quantized_functions import MATMUL
from kimi_deploy.ops.quantized_mixture_of_experts.body import FLOAT32_ACTIVATIONS
from kimi_deploy.ops.quantized_mixture_of_experts.spec import SPEC
from kimi_deploy.runtime.ort_runner import MODEL_NAME, OrtRunner


def exact_runner(
    export: Path, manifest: Manifest, provider: str, threads: int | None, kernels: str | Path = "auto"
) -> OrtRunner:
    """The export's graph and weights, its kernels told to read their inputs as they are.

    Where a value lies halfway between two int8 steps, an error of 1e-7 decides, and a recurrent model carries that on:
    no bound on a whole graph would tell it from a fault. So the graph is proven without that rounding.
    """
    model = ir.load(export / MODEL_NAME)
    for node in model.graph:
        if node.op_type == MATMUL:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", FLOAT32_ACTIVATIONS)
        elif node.op_type == SPEC.name:
            node.attributes["activations"] = ir.AttrString("activations", "float32")
    set_bodies(model, manifest.details["body"], manifest.details["dtype"], (SPEC.name,))
    graph = ir.to_proto(model).SerializeToString()
    return OrtRunner(export, provider=provider, threads=threads, graph=graph, kernels=kernels)
