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
    from kimi_deploy.engine.backend import TensorRT
    from kimi_deploy.engine.recipe import EngineRecipe

BACKENDS = ("auto", "tensorrt", "tensorrt-rtx")
PLUGINS = ("auto", "native", "python", "none")
PLANS = ("one", "two")
HARDWARE = ("none", "ampere+", "sameComputeCapability")
VERBOSITIES = ("layer_names_only", "detailed", "none")
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
@click.option(
    "--plugin",
    type=click.Choice(PLUGINS),
    help="native: those of `make plugins`. python: the same engine, without a compiler. none: only standard operators. "
    "auto: python.",
)
@click.option(
    "--plans", type=click.Choice(PLANS), help="one: both profiles in one file, weights stored once. two: a file each."
)
@click.option(
    "--capability",
    "capabilities",
    multiple=True,
    metavar="X.Y",
    help="Compute capability to build for (TensorRT-RTX); give it once per architecture.  [8.9, 12.0]",
)
@click.option("--prefill", metavar=RANGES, help="Sizes of the prefill profile's axes, e.g. sequence=1:256:512,batch=1.")
@click.option("--decode", metavar=RANGES, help="Sizes of the decode profile's axes, e.g. capacity=1:4096:8192.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="Of TensorRT's builder.  [3]")
@click.option("--workspace-mib", type=click.IntRange(0), help="Most scratch memory of a layer; 0 is no limit.  [0]")
@click.option("--timing-cache", metavar="FILE", help="Read if it is there, else written (full TensorRT).")
@click.option("--version-compatible", is_flag=True, default=None, help="For later TensorRTs too (full TensorRT).")
@click.option("--hardware-compatibility", type=click.Choice(HARDWARE), help="For other GPUs too (full TensorRT).")
@click.option("--refit", is_flag=True, default=None, help="Weights can be exchanged later (on a machine with a GPU).")
@click.option("--strip-weights", is_flag=True, default=None, help="A plan without weights (on a machine with a GPU).")
@click.option("--profiling-verbosity", type=click.Choice(VERBOSITIES), help="What inspectors see.  [layer_names_only]")
@click.option(
    "--save-onnx",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the graph that TensorRT parses, for other tools.",
)
@click.option("--print-trtexec", is_flag=True, help="Print the equal trtexec commands, for --save-onnx; build nothing.")
@click.option("--print-polygraphy", is_flag=True, help="Print the equal polygraphy commands; build nothing.")
@force_option
@json_option
def build_engine_command(
    export: Path,
    output: Path,
    recipe: Path | None,
    prefill: str | None,
    decode: str | None,
    save_onnx: Path | None,
    print_trtexec: bool,
    print_polygraphy: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build a TensorRT engine with prefill and decode profiles from the folder EXPORT.

    Any body flavour will do: ops without a plugin get bodies of standard operators. The axes of a profile are batch,
    sequence, capacity (tokens the state can hold) and num_logits. TensorRT-RTX needs no GPU to build.
    """
    settings = _settings(recipe, prefill, decode, options)
    if print_trtexec or print_polygraphy:
        _print_commands(export, output, settings, save_onnx, print_trtexec, print_polygraphy, force)
        return
    from kimi_deploy.engine.engine_from_onnx import build_engine, graph_for

    if save_onnx is not None:
        from kimi_deploy.engine.save_graph import save_graph

        save_graph(graph_for(export, settings), export, save_onnx, overwrite=force)
    manifest = build_engine(export, output, settings, overwrite=force, progress=progress, warn=say)
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


def _print_commands(
    export: Path,
    output: Path,
    settings: EngineRecipe,
    save_onnx: Path | None,
    trtexec: bool,
    polygraphy: bool,
    force: bool,
) -> None:
    """Write the graph, and print the shell commands that build from it what `build-engine` would."""
    import shlex

    from kimi_deploy.engine import command_lines
    from kimi_deploy.engine.engine_from_onnx import graph_for, read_export
    from kimi_deploy.engine.plugin_library import PluginLibrary
    from kimi_deploy.engine.recipe import DEFAULT_RTX_CAPABILITIES
    from kimi_deploy.engine.save_graph import save_graph
    from kimi_deploy.errors import UsageError

    if save_onnx is None:
        raise UsageError(
            "--print-trtexec and --print-polygraphy need a graph whose bodies TensorRT parses",
            fix="add --save-onnx DIR: the commands then name the graph that is written there",
        )
    read_export(export)
    # these tools have the C++ plugins only
    library = None if settings.plugin == "none" else PluginLibrary.open().path
    graph = graph_for(export, settings)
    path = save_graph(graph, export, save_onnx, overwrite=force)
    click.echo(shlex.join(["mkdir", "-p", str(output)]))
    commands = []
    if trtexec:
        commands += command_lines.trtexec(settings, graph.contract, path, output, library)
    if polygraphy:
        backend: TensorRT = "tensorrt" if settings.backend == "tensorrt" else "tensorrt-rtx"
        capabilities = settings.compute_capabilities or DEFAULT_RTX_CAPABILITIES if backend == "tensorrt-rtx" else ()
        commands += command_lines.polygraphy(settings, graph.contract, path, output, library, backend, capabilities)
    for words in commands:
        click.echo(shlex.join(words))


def _settings(recipe: Path | None, prefill: str | None, decode: str | None, options: dict[str, Any]) -> EngineRecipe:
    """Options over the recipe over the defaults."""
    from kimi_deploy.engine.recipe import EngineRecipe, parse_profile

    settings = EngineRecipe() if recipe is None else EngineRecipe.from_toml(recipe)
    given = {k: v for k, v in options.items() if v is not None}
    given["compute_capabilities"] = given.pop("capabilities") or settings.compute_capabilities
    if prefill is not None:
        given["prefill"] = parse_profile(settings.prefill, prefill, "--prefill")
    if decode is not None:
        given["decode"] = parse_profile(settings.decode, decode, "--decode")
    settings = replace(settings, **given)
    settings.check("the command line")
    return settings
