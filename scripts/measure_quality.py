#!/usr/bin/env python3
"""Measure what quantising a model costs on held-out text, scheme by scheme, on the exports themselves.

    python scripts/measure_quality.py models/demo --work DIR int4,group=32,rtn int4,group=32,hqq

For each scheme MODEL is exported into DIR, run on ONNX Runtime's CPU provider as it is, and compared with the
unquantised model in PyTorch on the passages of `kimi_deploy/validate/corpus`, as `validate`'s check `quality` does. A
JSON line per scheme. DIR is there, and left as it was.

Where a group does not divide the width of MODEL's experts, their gates and outputs get rows and columns of zeros up to
the next multiple: the same function exactly, which groups of any size fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from kimi_deploy.checkpoint import Checkpoint, released_tensors, write_checkpoint
from kimi_deploy.onnx.export import export_model
from kimi_deploy.quantization.scheme import GROUPS, parse_scheme
from kimi_deploy.quantization.selection import settled
from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.runtime.torch_runner import TorchRunner
from kimi_deploy.text.tokenizer import load_tokenizer
from kimi_deploy.validate.prompts import passages
from kimi_deploy.validate.quantized import measure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("schemes", nargs="+", metavar="SCHEME", help="as `export --quantize` takes it")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    config = Checkpoint.open(arguments.model).config
    texts = passages(load_tokenizer(arguments.model), config.vocab_size)
    unquantised = TorchRunner(arguments.model)
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        for text in arguments.schemes:
            scheme = parse_scheme(text)
            model = arguments.model
            if config.moe_intermediate_size % (scheme.group or min(GROUPS)):
                model = Path(work) / "padded"
                if not model.exists():
                    pad_experts(arguments.model, model, max(GROUPS))
            wanted = settled(scheme, Checkpoint.open(model).config, "float32")
            export_model(
                model,
                Path(work) / "export",
                dtype="float32",
                flavour="ort",
                overwrite=True,
                progress=lambda *_: nullcontext(lambda n: None),
                quantization=wanted,
            )
            quality = measure(unquantised, OrtRunner(Path(work) / "export", kernels="none"), texts, is_text=True)
            report = {"scheme": wanted.text, "padded": model != arguments.model, **quality.to_dict()}
            print(json.dumps(report | {"ratio": quality.ratio}), flush=True)
    return 0


def pad_experts(model: Path, output: Path, multiple: int) -> None:
    """Write `model`, of the released form, with its experts, shared ones too, widened to a multiple of `multiple`."""
    checkpoint = Checkpoint.open(model)
    width = -(-checkpoint.config.moe_intermediate_size // multiple) * multiple
    config = replace(checkpoint.config, moe_intermediate_size=width)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in released_tensors(config, "float32"):
            value = np.zeros(tensor.shape, np.float32)
            stored = checkpoint.tensor(tensor.name)
            value[tuple(slice(n) for n in stored.shape)] = stored
            yield tensor.name, value

    write_checkpoint(output, config, tensors(), "float32")


if __name__ == "__main__":
    sys.exit(main())
