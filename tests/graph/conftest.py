"""Exports shared by the tests of this tier: tracing and opening a session is what costs time."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from kimi_deploy.contract import Dtype
from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx.bodies import set_bodies
from kimi_deploy.onnx.export import export_model
from kimi_deploy.ops.flavours import Flavour
from kimi_deploy.quantization.scheme import Scheme
from tests.configs import config
from tests.models import write_model

torch.set_num_threads(1)

# what the bodies specialise on or branch over, each in at least one model
CONFIGS = {
    "softplus": {"layers": "KKM"},
    "bounded": {"layers": "KM", "linear_attn_config": {"gate_lower_bound": -4.0, "head_dim": 24}},
    "groups": {
        "layers": "MK",
        "num_experts": 8,
        "num_expert_group": 4,
        "topk_group": 2,
        "moe_renormalize": False,
        "num_shared_experts": 0,
        "q_lora_rank": 24,
    },
    "tied": {"layers": "KK", "tie_word_embeddings": True, "first_k_dense_replace": 2},
}


def no_progress(description: str, total: int | None = None, unit: str = "bytes") -> nullcontext[Callable[[int], None]]:
    return nullcontext(lambda n: None)


def export(
    folder: Path,
    output: Path,
    dtype: Dtype = "float32",
    flavour: Flavour = "ort",
    quantization: Scheme | None = None,
) -> Path:
    export_model(
        folder,
        output,
        dtype=dtype,
        flavour=flavour,
        overwrite=False,
        progress=no_progress,
        quantization=quantization,
    )
    return output


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, config(**changes)) for name, changes in CONFIGS.items()}


@pytest.fixture(scope="session")
def exported(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export of (model, flavour, dtype), made once."""
    root = tmp_path_factory.mktemp("exports")

    def get(name: str, flavour: Flavour = "ort", dtype: Dtype = "float32") -> Path:
        output = root / f"{name}-{flavour}-{dtype}"
        if output.exists():
            return output
        if flavour == "ort":
            return export(models[name], output, dtype, flavour)
        # another flavour is another set of bodies in the same graph: no second trace
        shutil.copytree(get(name, "ort", dtype), output)
        model = ir.load(output / "model.onnx")
        set_bodies(model, flavour, dtype)
        ir.save(model, output / "model.onnx")
        manifest = Manifest.read(output)
        replace(manifest, details={**manifest.details, "body": flavour}).write(output)
        return output

    return get
