"""kimi-deploy build-engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kimi_deploy.cli.common import (
    folder_argument,
    force_option,
    json_option,
    output_option,
    print_json,
    progress,
    say,
)

if TYPE_CHECKING:
    from kimi_deploy.engine.recipe import EngineRecipe

BACKENDS = ("auto", "tensorrt", "tensorrt-rtx")
PLUGINS = ("auto", "none")
RANGES = "AXIS=MIN:OPT:MAX,..."


@click.command("build-engine")
@folder_argument("export")
@output_option("engine.plan, manifest.json and tokenizer files")
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="TOML such as engines/default.toml; options override it."
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    help="auto: the full TensorRT where it is installed and a GPU is present, else TensorRT-RTX.  [auto]",
)
@click.option("--plugin", type=click.Choice(PLUGINS), help="none: only standard operators, no plugin.  [auto]")
@click.option(
    "--capability",
    "capabilities",
    multiple=True,
    metavar="X.Y",
    help="Compute capability to build for (TensorRT-RTX); give it once per architecture.  [8.9, 12.0]",
)
@click.option("--prefill", metavar=RANGES, help="Sizes of the prefill profile's axes, e.g. sequence=1:256:512,batch=1.")
@click.option("--decode", metavar=RANGES, help="Sizes of the decode profile's axes, e.g. capacity=1:4096:8192.")
@force_option
@json_option
def build_engine_command(
    export: Path,
    output: Path,
    recipe: Path | None,
    backend: str | None,
    plugin: str | None,
    capabilities: tuple[str, ...],
    prefill: str | None,
    decode: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build a TensorRT engine with prefill and decode profiles from the folder EXPORT.

    Any body flavour will do: ops without a plugin get bodies of standard operators. The axes of a profile are batch,
    sequence, capacity (tokens the state can hold) and num_logits. TensorRT-RTX needs no GPU to build.
    """
    settings = _settings(recipe, backend, plugin, capabilities, prefill, decode)
    from kimi_deploy.engine.engine_from_onnx import build_engine

    manifest = build_engine(export, output, settings, overwrite=force, progress=progress)
    if as_json:
        print_json({"output": str(output), "manifest": manifest.to_dict()})
        return
    details = manifest.details
    plugins = ", ".join(f"{count} {name} plugin layers" for name, count in details["plugins"].items()) or "no plugin"
    say(
        f"built {manifest.source['name']} for {details['backend']} {details['backend_version']}, compute capability "
        f"{', '.join(details['compute_capabilities'])}: {details['dtype']}, {' and '.join(details['profiles'])}, "
        f"{plugins}"
    )
    for name, entry in manifest.files.items():
        click.echo(f"{entry['bytes']:>14,}  {output / name}")


def _settings(
    recipe: Path | None,
    backend: str | None,
    plugin: str | None,
    capabilities: tuple[str, ...],
    prefill: str | None,
    decode: str | None,
) -> EngineRecipe:
    """Options over the recipe over the defaults."""
    from kimi_deploy.engine.recipe import EngineRecipe, parse_profile

    settings = EngineRecipe() if recipe is None else EngineRecipe.from_toml(recipe)
    given: dict[str, Any] = {"backend": backend, "plugin": plugin, "compute_capabilities": capabilities or None}
    if prefill is not None:
        given["prefill"] = parse_profile(settings.prefill, prefill, "--prefill")
    if decode is not None:
        given["decode"] = parse_profile(settings.decode, decode, "--decode")
    settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
    settings.check("the command line")
    return settings
