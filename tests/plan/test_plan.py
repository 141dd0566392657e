"""A plan says what is true: sizes equal what is allocated and stored, and what it says fits is what fits."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_deploy.checkpoint.presets import preset_config
from kimi_deploy.checkpoint.synth import synthesize
from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.contract import Dtype
from kimi_deploy.errors import UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx.export import export_model
from kimi_deploy.plan.cpu import quantized_bytes
from kimi_deploy.plan.gpus import find_gpu, gpu_table
from kimi_deploy.plan.memory import (
    break_even_tokens,
    full_mha_bytes_per_token,
    kda_state_bytes,
    latent_bytes_per_token,
    weight_components,
)
from kimi_deploy.plan.report import Request, make_plan
from kimi_deploy.plan.speed import decode_traffic, expected_experts
from kimi_deploy.quantization.scheme import Scheme, parse_scheme
from kimi_deploy.quantization.selection import settled
from kimi_deploy.runtime.ort_runner import OrtRunner
from tests.configs import config
from tests.graph.conftest import no_progress
from tests.models import write_model

RELEASED = preset_config("kimi-linear-48b")


def test_the_released_model_has_its_published_sizes() -> None:
    components = weight_components(RELEASED, "bfloat16")
    assert sum(c.parameters for c in components) == 49_122_681_728
    assert round(sum(c.nbytes for c in components) / 1e9, 2) == 98.25
    # 40 MiB of recurrent state in float32, 1.41 MiB of convolution
    assert kda_state_bytes(RELEASED, "bfloat16") == 20 * (32 * 128 * 128 * 4 + 3 * 4096 * 3 * 2)
    assert latent_bytes_per_token(RELEASED, "bfloat16") == 8064
    assert full_mha_bytes_per_token(RELEASED, "bfloat16") * 7 // 27 == 143_360


@pytest.mark.parametrize(("context", "saved"), [(4096, 0.40), (131_072, 0.730), (1_048_576, 0.739)])
def test_what_the_hybrid_saves_against_full_mla(context: int, saved: float) -> None:
    plan = make_plan(Request(RELEASED, "bfloat16", context, 1), "48b")
    assert plan.saved == pytest.approx(saved, abs=6e-4)
    assert plan.saved < 20 / 27


def test_the_hybrid_breaks_even_at_1884_tokens() -> None:
    assert round(break_even_tokens(RELEASED, "bfloat16")) == 1884


def test_a_token_reads_the_published_active_parameters() -> None:
    components = {c.name: c.nbytes for c in weight_components(RELEASED, "bfloat16")}
    traffic = decode_traffic(RELEASED, "bfloat16", components, batch=1, context=0)
    assert round(traffic.weights / 2e9, 3) == 3.107
    assert expected_experts(RELEASED, 1) == 8
    assert 8 < expected_experts(RELEASED, 2) < 16
    assert expected_experts(RELEASED, 10_000) == pytest.approx(256)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planned")
    model = write_model(root / "model", config("KKM"))
    export_model(model, root / "export", dtype="float32", flavour="ort", overwrite=False, progress=no_progress)
    return root / "export"


@pytest.mark.parametrize(("batch", "context"), [(1, 1), (1, 300), (3, 64)])
def test_states_and_caches_are_what_a_runner_allocates(batch: int, context: int, exported: Path) -> None:
    planned = KimiLinearConfig.from_folder(exported)
    state = OrtRunner(exported, threads=1).new_state(batch, context)
    memory = Request(planned, "float32", context, batch).memory()
    assert memory.kda_states + memory.latent_cache == state.nbytes
    by_kind = {
        kind: sum(m.nbytes for m in state.memory() if m.kind == kind) for kind in {m.kind for m in state.memory()}
    }
    assert memory.latent_cache == by_kind["latent"]
    assert batch * kda_state_bytes(planned, "float32") == by_kind["conv_state"] + by_kind["recurrent_state"]


@pytest.mark.parametrize("scheme", [None, "int4,group=32", "int8,group=32,symmetric,head,embeddings"])
def test_weights_are_what_an_export_stores(scheme: str | None, tmp_path: Path) -> None:
    wide = config("KM", hidden_size=64, kv_lora_rank=32, moe_intermediate_size=32, intermediate_size=64)
    model = write_model(tmp_path / "model", wide)
    wanted = settled(parse_scheme(scheme), wide, "float32") if scheme else None
    manifest = export_model(
        model,
        tmp_path / "export",
        dtype="float32",
        flavour="ort",
        overwrite=False,
        progress=no_progress,
        quantization=wanted,
    )
    planned = sum(c.nbytes for c in weight_components(wide, "float32", wanted))
    stored = manifest.files["weights.bin"]["bytes"]
    # between tensors the file is aligned
    assert planned <= stored <= planned + 64 * 200


def test_the_longest_context_is_the_longest_that_fits() -> None:
    request = Request(RELEASED, "bfloat16", 4096, 2)
    available = find_gpu("h200").memory
    longest = request.longest_context(available)
    assert 4096 < longest < RELEASED.max_position_embeddings
    assert Request(RELEASED, "bfloat16", longest, 2).memory().total <= available
    assert Request(RELEASED, "bfloat16", longest + 1, 2).memory().total > available
    batch = request.largest_batch(available)
    assert Request(RELEASED, "bfloat16", 4096, batch).memory().total <= available
    assert Request(RELEASED, "bfloat16", 4096, batch + 1).memory().total > available


def test_what_does_not_fit_has_no_longest_context() -> None:
    plan = make_plan(Request(RELEASED, "bfloat16", 4096, 1), "48b", gpu=find_gpu("rtx-4090"))
    assert plan.fits is False
    assert plan.longest_context == 0
    assert plan.largest_batch == 0


MEASURE = Path(__file__).parents[2] / "scripts" / "measure_resident.py"


@pytest.mark.parametrize(
    ("dtype", "scheme", "contexts"),
    [
        ("float32", None, "2050"),
        ("float16", None, "514"),
        ("float32", "int8,head", "130"),
        ("float32", "int4,rtn", "2050"),
    ],
)
def test_resident_memory_on_the_cpu_is_predicted_within_15_percent(
    dtype: Dtype, scheme: str | None, contexts: str, library_path: Path, tmp_path: Path
) -> None:
    """Up to 120 MB of weights beside a process of 90: a wrong factor shows, also that of 16-bit weights in float32."""
    model = tmp_path / "model"
    shape = synthesize("mini-62m", model, layers=4, dtype=dtype).config
    export_model(
        model,
        tmp_path / "export",
        dtype=dtype,
        flavour="ort",
        overwrite=False,
        progress=no_progress,
        quantization=settled(parse_scheme(scheme), shape, dtype) if scheme else None,
    )
    # what runs 16 bits is bodies, whatever library there is
    assert_near(tmp_path / "export", contexts, *(("none", str(library_path)) if dtype == "float32" else ("none",)))


def test_the_copies_of_a_latent_projection_are_predicted(library_path: Path, tmp_path: Path) -> None:
    """Three quarters of the process: one copy of `kv_b_proj` more or less would be a sixth of it."""
    wide = {"num_attention_heads": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "v_head_dim": 128}
    model = write_model(tmp_path / "model", config("MMMM", **wide, hidden_size=64, first_k_dense_replace=4))
    export_model(model, tmp_path / "export", dtype="float32", flavour="ort", overwrite=False, progress=no_progress)
    assert_near(tmp_path / "export", "34", "none", str(library_path))


def assert_near(export: Path, contexts: str, *kernels: str) -> None:
    for library in kernels:
        done = subprocess.run(
            [sys.executable, str(MEASURE), str(export), "--context", contexts, "--kernels", library],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_quantised_weights_are_planned_as_their_kernels_hold_them() -> None:
    """4 bits of 128 weights and a scale make 68 B stored, 72 B packed, 4 B read; with zero points half a byte more."""
    shape, role = (4, 16, 256), "experts"
    groups = 4 * 16 * 256 // 128

    def parts(text: str) -> tuple[int, int]:
        return quantized_bytes(shape, role, parse_scheme(text))

    assert parts("int4,group=128,symmetric") == (72 * groups, 4 * groups)
    assert parts("int4,group=128") == (72 * groups, 4.5 * groups)
    assert parts("int4,group=128,activations=float32") == (64 * groups, 4.5 * groups)
    assert parts("int8,group=128") == (136 * groups, 4 * groups)
    assert parts("int8,group=128,activations=float32") == (0, 132 * groups)


def test_a_quantised_model_fits_where_its_process_does() -> None:
    request = Request(
        RELEASED, "float32", 8192, 1, 64, settled(parse_scheme("int4,head,embeddings"), RELEASED, "float32")
    )
    assert request.memory() == request.cpu_memory()
    stored = sum(c.nbytes for c in weight_components(RELEASED, "float32", request.scheme))
    assert make_plan(request, "48b", memory=stored + 2_000_000_000).fits is False
    assert make_plan(request, "48b", memory=request.cpu_memory().total).fits is True


def test_every_gpu_of_the_table_has_a_source_and_sensible_numbers() -> None:
    for gpu in gpu_table().values():
        assert gpu.source.startswith("https://")
        assert 8e9 <= gpu.memory <= 300e9
        assert 200e9 <= gpu.bandwidth <= 10e12
    with pytest.raises(UsageError, match="h100-sxm"):
        find_gpu("voodoo-2")


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kimi_deploy", "plan", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_gives_json_and_a_chart_and_says_by_its_exit_code_whether_it_fits(tmp_path: Path) -> None:
    chart = tmp_path / "memory.png"
    done = plan("kimi-linear-48b", "--context", "128K", "--gpu", "h200", "--chart", str(chart), "--json")
    assert done.returncode == 0, done.stderr
    raw = json.loads(done.stdout)
    assert raw["context"] == 131_072
    assert raw["fits"] is True
    assert raw["memory"]["latent_cache"] == 131_072 * 8064
    assert raw["tokens_per_second"] == pytest.approx(4800e9 / raw["traffic"]["total"])
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert plan("kimi-linear-48b", "--memory", "80GB").returncode == 1


def test_the_table_names_the_model_of_a_folder_and_its_quantisation(exported: Path) -> None:
    done = plan(str(exported), "--context", "64", "--memory", "2GB")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("export: float32, batch 1, context 64")
    manifest = Manifest.read(exported)
    quantized = replace(manifest, details={**manifest.details, "quantization": Scheme(bits=4, head=True).to_dict()})
    shutil.copytree(exported, exported.parent / "int4")
    # a shape that groups of 32 divide
    shutil.copy(Path(__file__).parents[2] / "models" / "demo" / "config.json", exported.parent / "int4")
    quantized.write(exported.parent / "int4")
    assert "int4" in plan(str(exported.parent / "int4")).stdout.splitlines()[0]
    small = plan("kimi-linear-48b", "--quantize", "int4,head,embeddings", "--memory", "48GB")
    assert "int4" in small.stdout.splitlines()[0]
    assert "fits" in small.stdout
    bodies, kernels = (line for line in small.stdout.splitlines() if line.startswith("ONNX Runtime"))
    # experts that are read from the file count as chosen equally often, which is a bound, and is called one
    assert "at most" not in bodies
    assert "at most" in kernels
    assert "are experts" in kernels


@pytest.mark.parametrize(
    "arguments",
    [
        ["nowhere"],
        ["kimi-linear-48b", "--gpu", "abacus"],
        ["kimi-linear-48b", "--context", "0"],
        ["kimi-linear-48b", "--context", "12Q"],
        ["kimi-linear-48b", "--memory", "much"],
        ["kimi-linear-48b", "--memory", "32"],
        ["kimi-linear-48b", "--memory", "80GB", "--bandwidth", "900"],
        ["kimi-linear-48b", "--quantize", "int3"],
        ["kimi-linear-48b", "--quantize", "int4", "--dtype", "bfloat16"],
        ["kimi-linear-48b", "--quantize", "int4", "--gpu", "h200"],
        ["models/demo", "--layers", "2"],
    ],
)
def test_a_request_that_makes_no_sense_exits_2(arguments: list[str]) -> None:
    assert plan(*arguments).returncode == 2


def test_a_plan_needs_no_exporter_and_no_runtime(tmp_path: Path) -> None:
    """Those take seconds to load, in which a mistyped option would go unanswered."""
    for name in ("torch", "onnx", "onnx_ir", "onnxruntime", "matplotlib", "sympy"):
        (tmp_path / f"{name}.py").write_text("raise ImportError(__name__ + ' was loaded')")
    done = subprocess.run(
        [sys.executable, "-m", "kimi_deploy", "plan", "kimi-linear-48b", "--quantize", "int4"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
