"""kimi-deploy export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kimi_deploy.cli.common import (
    NamedPath,
    folder_argument,
    force_option,
    json_option,
    output_option,
    print_json,
    progress,
    say,
)
from kimi_deploy.cli.sizes import ByteSize
from kimi_deploy.contract import DTYPES
from kimi_deploy.ops.flavours import FLAVOURS
from kimi_deploy.output_folder import CUT_SHORT, partial_folder
from kimi_deploy.quantization.scheme import SYNTAX, describe_precision, parse_scheme


@click.command("export")
@folder_argument("model")
@output_option("model.onnx, weights.bin, manifest.json and tokenizer files")
@click.option("--recipe", type=NamedPath(path_type=Path), help="TOML with dtype, body and quantize; options override.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Floating type of weights and activations.  [float32]")
@click.option(
    "--body",
    type=click.Choice(FLAVOURS),
    help="Bodies of the custom ops: `ort` uses ONNX Runtime's fused kernels, `onnx` opset-27 standard ops, "
    "`primitive` no linear-attention op at all.  [ort]",
)
@click.option("--max-shard-size", type=ByteSize(), metavar="SIZE", help="Size of a weight file, as in 5GB.  [no limit]")
@click.option(
    "--weights",
    type=click.Choice(("pack", "reference")),
    default="pack",
    show_default=True,
    help="`pack` writes all weights to files of the export; `reference` uses the checkpoint's own files, through hard "
    "links, for what they hold just as the graph needs it, and packs the rest.",
)
@click.option(
    "--quantize",
    metavar="SPEC",
    help=f"Store weights in 4 or 8 bits: {SYNTAX}. int4 is asymmetric and hqq, int8 symmetric and rtn, unless it "
    "says otherwise.  [not quantised]",
)
@force_option
@json_option
def export_command(
    model: Path,
    output: Path,
    recipe: Path | None,
    dtype: str | None,
    body: str | None,
    max_shard_size: int | None,
    weights: str,
    quantize: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Export the checkpoint folder MODEL to one ONNX graph for prefill and decode, states as inputs and outputs.

    The result is checked before it is kept: interface, structure, and every weight's values. Memory does not grow with
    the checkpoint, and the same command goes on with a run that was cut short.
    """
    settings = _settings(recipe, dtype, body, quantize)
    scheme = parse_scheme(settings["quantize"]) if settings["quantize"] else None
    from kimi_deploy.onnx.export import export_model

    try:
        manifest = export_model(
            model,
            output,
            dtype=settings["dtype"],
            flavour=settings["body"],
            overwrite=force,
            progress=progress,
            max_shard_bytes=max_shard_size,
            reference=weights == "reference",
            quantization=scheme,
        )
    except CUT_SHORT:
        partial = partial_folder(output)
        if partial.exists():
            say(f"what is written so far is in {partial}: the same command goes on with it; remove it otherwise")
        raise
    if as_json:
        print_json({"output": str(output), "manifest": manifest.to_dict()})
        return
    kind = describe_precision(manifest.details)
    say(f"exported {manifest.source['name']}: {kind}, {settings['body']} bodies; every weight checked")
    for name, entry in manifest.files.items():
        click.echo(f"{entry['bytes']:>14,}  {output / name}")


def _settings(recipe: Path | None, dtype: str | None, body: str | None, quantize: str | None) -> dict[str, Any]:
    """Options over the recipe over the defaults."""
    from kimi_deploy.errors import UsageError
    from kimi_deploy.recipe import read_recipe

    settings = {"dtype": "float32", "body": "ort", "quantize": ""}
    if recipe is not None:
        settings |= read_recipe(recipe, {"dtype": str, "body": str, "quantize": str})
    given = {"dtype": dtype, "body": body, "quantize": quantize}
    settings |= {k: v for k, v in given.items() if v is not None}
    for key, allowed in (("dtype", DTYPES), ("body", FLAVOURS)):
        if settings[key] not in allowed:
            raise UsageError(f"{recipe}: {key} is not known", seen=settings[key], expected=f"one of {allowed}")
    return settings
