"""kimi-deploy plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from kimi_deploy.cli.common import NamedPath, json_option, print_json, print_table, say
from kimi_deploy.cli.sizes import ByteSize, TokenCount
from kimi_deploy.contract import DTYPES, Dtype
from kimi_deploy.output_file import check_writable
from kimi_deploy.quantization.scheme import parse_scheme, recorded_scheme

if TYPE_CHECKING:
    from kimi_deploy.config import KimiLinearConfig
    from kimi_deploy.plan.report import Plan

_LEAST_BYTES = 1_000_000
"""What is less was written without its unit: a plan of 32 bytes says that nothing fits, which is true and no answer."""


@click.command("plan")
@click.argument("model", metavar="MODEL|PRESET")
@click.option("--context", default="4096", show_default=True, type=TokenCount(), help="Tokens per sequence, as 128K.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Sequences at a time.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Of weights and activations.  [what the folder holds; float32 quantised]"
)
@click.option("--quantize", metavar="SPEC", help="As `export --quantize` takes it.")
@click.option("--chunk", default=512, show_default=True, type=TokenCount(), help="Tokens per prefill step.")
@click.option("--layers", type=int, metavar="N", help="Only the first N layers of a preset.  [all]")
@click.option("--gpu", metavar="NAME", help="A GPU of kimi_deploy/plan/gpus.toml, as h100-sxm.")
@click.option("--memory", type=ByteSize(), metavar="SIZE", help="Device memory, as 24GB, instead of a GPU's.")
@click.option("--bandwidth", type=ByteSize(), metavar="SIZE", help="Device memory bandwidth per second, as 900GB.")
@click.option("--chart", type=NamedPath(path_type=Path), metavar="FILE", help="Write a PNG of memory against context.")
@json_option
def plan_command(
    model: str,
    context: int,
    batch: int,
    dtype: str | None,
    quantize: str | None,
    chunk: int,
    layers: int | None,
    gpu: str | None,
    memory: int | None,
    bandwidth: int | None,
    chart: Path | None,
    as_json: bool,
) -> None:
    """Say what a model takes and how fast it can be: MODEL is a checkpoint or export folder, PRESET a known shape.

    A quantised model is planned on the CPU, any other on a device. States and caches are exact. Speeds are bounds: a
    decode step cannot be faster than its bytes can be read.
    Exits 1 when a device is named and the model does not fit it.
    """
    from kimi_deploy.errors import UsageError
    from kimi_deploy.plan.gpus import find_gpu
    from kimi_deploy.plan.report import Request, make_plan

    for option, value in (("--memory", memory), ("--bandwidth", bandwidth)):
        if value is not None and value < _LEAST_BYTES:
            raise UsageError(
                f"{option} is less than any device has",
                seen=f"{value} bytes",
                expected="a size with its unit",
                fix=f"{option} {value}GB, if that is what you mean",
            )
    if chart is not None:
        check_writable("--chart", chart)
    device = find_gpu(gpu) if gpu else None
    config, name = _config(model, layers)
    exported = _exported(model)
    scheme = parse_scheme(quantize) if quantize else recorded_scheme(exported)
    stored = exported.get("dtype", config.dtype if config.dtype in DTYPES else "bfloat16")
    settled = cast(Dtype, dtype or ("float32" if scheme else stored))
    if scheme is not None and device is not None:
        raise UsageError(
            "a quantised model runs on ONNX Runtime's CPU provider alone",
            seen=f"--gpu {gpu}",
            expected="the machine's own memory",
            fix="give --memory, and --bandwidth for speeds, instead of --gpu; or plan without --quantize",
        )
    request = Request(config, settled, context, batch, chunk, scheme)
    plan = make_plan(request, name, gpu=device, memory=memory, bandwidth=bandwidth)
    if chart is not None:
        from kimi_deploy.plan.chart import write_chart

        write_chart(plan, max(context, config.max_position_embeddings), chart)
        say(f"wrote {chart}")
    if as_json:
        print_json(plan.to_dict())
    else:
        _print(plan)
    if plan.fits is False:
        click.get_current_context().exit(1)


def _config(model: str, layers: int | None) -> tuple[KimiLinearConfig, str]:
    from kimi_deploy.checkpoint.presets import PRESETS, preset_config
    from kimi_deploy.config import KimiLinearConfig
    from kimi_deploy.errors import UsageError
    from kimi_deploy.model_folder import require_folder

    folder = Path(model)
    if model in PRESETS:
        return preset_config(model, layers), model if layers is None else f"{model}, {layers} layers"
    require_folder(folder, f"a folder with config.json, or a preset: {', '.join(PRESETS)}")
    if layers is not None:
        raise UsageError("--layers cuts presets only", seen=model, fix="leave --layers out")
    return KimiLinearConfig.from_folder(folder), folder.resolve().name


def _exported(model: str) -> dict[str, Any]:
    """The details of an export folder's manifest; empty for a checkpoint and for a preset."""
    from kimi_deploy.manifest import MANIFEST_NAME, Manifest

    return Manifest.read(Path(model)).details if (Path(model) / MANIFEST_NAME).is_file() else {}


def _size(nbytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:,.2f} {unit}"
    return f"{nbytes:,.0f} B"


def _print(plan: Plan) -> None:
    weights = f"{plan.dtype}, {plan.quantization}" if plan.quantization else plan.dtype
    click.echo(f"{plan.model}: {weights}, batch {plan.batch}, context {plan.context:,}")
    memory = plan.memory
    rows = [(f"  {c.name}", _size(c.nbytes), f"{c.parameters:,} parameters") for c in plan.components if c.parameters]
    stored = sum(c.nbytes for c in plan.components)
    layout = f"as their kernels hold them; stored, by component: {_size(stored)}" if plan.quantization else ""
    rows = [("weights", _size(memory.weights), layout), *rows]
    rows += [
        ("KDA states", _size(memory.kda_states), f"2 x {_size(plan.kda_state_per_sequence)} per sequence, any length"),
        ("latent cache", _size(memory.latent_cache), f"{plan.latent_per_token:,} B per token"),
        ("activations", _size(memory.activations), f"estimate, a prefill step of {plan.chunk} tokens per sequence"),
        ("reserve", _size(memory.reserve), "the process" if plan.quantization else "assumed: driver, libraries, gaps"),
        ("total", _size(memory.total), ""),
    ]
    print_table(("memory on the CPU" if plan.quantization else "device memory", "", ""), rows)
    if plan.device_memory is not None:
        verdict = "fits" if plan.fits else "does NOT fit"
        click.echo(
            f"{verdict} {plan.device or 'the device'} of {_size(plan.device_memory)}: longest context "
            f"{plan.longest_context:,} at batch {plan.batch}, largest batch {plan.largest_batch:,} at {plan.context:,}"
        )
    if plan.full_mla_per_token != plan.latent_per_token:
        click.echo(
            f"states and cache: {plan.saved:.1%} less than full MLA at this context ({plan.full_mla_per_token:,} B per "
            f"token; full MHA {plan.full_mha_per_token:,}), even at {plan.break_even:,.0f} tokens"
        )
    traffic = plan.traffic
    click.echo(
        f"a decode step moves {_size(traffic.total)}: weights {_size(traffic.weights)}, KDA states "
        f"{_size(traffic.kda_states)}, latent cache {_size(traffic.latent_cache)}"
    )
    if plan.tokens_per_second is not None and plan.bandwidth is not None:
        click.echo(f"at {_size(plan.bandwidth)}/s: at most {plan.tokens_per_second:,.1f} tokens per second")
    ways = [("with `ort` bodies", plan.cpu_resident, plan.cpu_weights)]
    if plan.dtype == "float32":
        ways.append(("with `make cpu-kernels`", plan.cpu_resident_with_kernels, plan.cpu_weights_with_kernels))
    for what, resident, held in ways if plan.dtype != "bfloat16" else ():
        bound, experts = "", ""
        if held.experts:
            bound = "at most "
            experts = f"; {_size(held.experts)} are experts, fewer where a router prefers some of them"
        click.echo(
            f"ONNX Runtime on the CPU, {what}: {bound}{_size(resident)} resident, {_size(held.mapped)} of it pages of "
            f"the weight files, which the system can take back{experts}"
        )
    if plan.dtype == "bfloat16":
        click.echo(
            "ONNX Runtime has no bfloat16 kernels on the CPU: export float16 or float32, either of them "
            f"{_size(plan.cpu_resident)} resident"
        )
    click.echo(f"export: at most {_size(plan.export_resident)} of memory, {_size(plan.export_disk)} of disk")
