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
    from kimi_deploy.engine.command_lines import Plans
    from kimi_deploy.engine.recipe import EngineRecipe

BACKENDS = ("auto", "tensorrt", "tensorrt-rtx")
PLUGINS = ("auto", "native", "python", "none")
PLANS = ("one", "two")
HARDWARE = ("none", "ampere+", "sameComputeCapability")
VERBOSITIES = ("layer_names_only", "detailed", "none")
RANGES = "AXIS=MIN:OPT:MAX,..."


@click.command("build-engine")
@folder_argument("export")
@output_option("engine.plan, manifest.json and, from an export, tokenizer files")
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
@click.option(
    "--profile",
    "file_profiles",
    multiple=True,
    metavar=RANGES,
    help="Of a file's own axes, e.g. batch=1,sequence=1:256:512; once per profile.",
)
@click.option("--optimization-level", type=click.IntRange(0, 5), help="Of TensorRT's builder.  [3]")
@click.option(
    "--workspace-mib", type=click.IntRange(0, 1 << 30), help="Most scratch memory of a layer; 0 is no limit.  [0]"
)
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
    file_profiles: tuple[str, ...],
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

    EXPORT may also be an ONNX file of another exporter with LinearAttention or CausalConvWithState nodes (ai.onnx's or
    com.microsoft's): its axes then are its own, given with --profile.
    """
    settings = _settings(recipe, prefill, decode, options)
    _check_sources(export, file_profiles, prefill, decode)
    if print_trtexec or print_polygraphy:
        _print_commands(export, output, settings, file_profiles, save_onnx, print_trtexec, print_polygraphy, force)
        return
    if export.is_file():
        from kimi_deploy.engine.engine_from_file import build_engine_from_file

        manifest = build_engine_from_file(
            export, output, settings, file_profiles, overwrite=force, progress=progress, warn=say, graph_to=save_onnx
        )
    else:
        from kimi_deploy.engine.engine_from_onnx import build_engine

        manifest = build_engine(
            export, output, settings, overwrite=force, progress=progress, warn=say, graph_to=save_onnx
        )
    if as_json:
        print_json({"output": str(output), "manifest": manifest.to_dict()})
        return
    details = manifest.details
    plugins = ", ".join(f"{count} {name} plugin layers" for name, count in details["plugins"].items()) or "no plugin"
    what = (
        f"{len(details['profiles'])} profiles"
        if manifest.kind == "plan"
        else f"{details['dtype']}, {' and '.join(details['profiles'])}"
    )
    say(
        f"built {manifest.source.get('name') or manifest.source['model']} for {details['backend']} "
        f"{details['backend_version']}, compute capability {', '.join(details['compute_capabilities'])}: {what}, "
        f"{plugins}"
    )
    for name, entry in manifest.files.items():
        click.echo(f"{entry['bytes']:>14,}  {output / name}")


def _print_commands(
    export: Path,
    output: Path,
    settings: EngineRecipe,
    file_profiles: tuple[str, ...],
    save_onnx: Path | None,
    trtexec: bool,
    polygraphy: bool,
    force: bool,
) -> None:
    """Write the graph, and print the shell commands that build from it what `build-engine` would."""
    import shlex

    from kimi_deploy.engine import command_lines
    from kimi_deploy.engine.backend import choose
    from kimi_deploy.engine.plugin_library import PluginLibrary
    from kimi_deploy.engine.save_graph import GRAPH_NAME, save_graph
    from kimi_deploy.errors import UsageError

    if save_onnx is None:
        raise UsageError(
            "--print-trtexec and --print-polygraphy need a graph whose bodies TensorRT parses",
            fix="add --save-onnx DIR: the commands then name the graph that is written there",
        )
    if trtexec and polygraphy:
        raise UsageError(
            "--print-trtexec and --print-polygraphy are of two tools that write the same plan", fix="give one of them"
        )
    proto, plans, bfloat16 = _graph(export, settings, file_profiles)
    # these tools have the C++ plugins only
    library = None if settings.plugin == "none" else PluginLibrary.open().path
    path = save_onnx / GRAPH_NAME
    commands = [["set", "-e"], ["mkdir", "-p", str(output)]]
    if trtexec:
        if settings.backend == "tensorrt-rtx":
            raise UsageError("trtexec is of the full TensorRT", seen="tensorrt-rtx", fix="add --backend tensorrt")
        _target(settings, "tensorrt", bfloat16, library is not None)
        commands += command_lines.trtexec(settings, plans, path, output, library)
    if polygraphy:
        # auto is what a build here would take; a TensorRT that is named may be another machine's
        backend = choose("auto") if settings.backend == "auto" else settings.backend
        capabilities = _target(settings, backend, bfloat16, library is not None)
        commands += command_lines.polygraphy(settings, plans, path, output, library, backend, capabilities)
    save_graph(proto, _folder(export), save_onnx, overwrite=force, check=lambda: _check_weights(export))
    for words in commands:
        click.echo(shlex.join(words))


def _target(settings: EngineRecipe, backend: TensorRT, bfloat16: bool, kernels: bool) -> tuple[str, ...]:
    """The architectures a command names. Refuses, as a build does, what this TensorRT or these have not."""
    from kimi_deploy.engine.backend import installed, load
    from kimi_deploy.engine.recipe import DEFAULT_RTX_CAPABILITIES, capabilities_for
    from kimi_deploy.engine.requirements import check_options, check_target

    check_options(backend, settings, here=False)
    wanted = settings.compute_capabilities
    if backend == "tensorrt-rtx" and not installed(backend):
        capabilities = wanted or DEFAULT_RTX_CAPABILITIES
    else:
        offered = () if backend == "tensorrt" else load(backend).offered_capabilities
        capabilities = capabilities_for(backend, wanted, offered)
    if capabilities:
        check_target(capabilities, bfloat16=bfloat16, kernels=kernels)
    return capabilities


def _check_sources(export: Path, file_profiles: tuple[str, ...], prefill: str | None, decode: str | None) -> None:
    """Refuse the profile options of an export for a file, and the other way round."""
    from kimi_deploy.errors import UsageError

    if not export.exists():
        raise UsageError(
            "there is no such file or folder",
            seen=str(export),
            expected="a folder written by `kimi-deploy export`, or another exporter's ONNX file",
            fix="check the path",
        )
    if export.is_file() and (prefill or decode):
        raise UsageError(
            "--prefill and --decode are profiles of an export", seen=f"{export}, a file", fix="give --profile instead"
        )
    if file_profiles and not export.is_file():
        raise UsageError(
            "--profile is for an ONNX file of another exporter",
            seen=f"{export}, a folder",
            fix="give --prefill and --decode for an export",
        )


def _check_weights(export: Path) -> None:
    """As a build does: of another exporter's file nothing says what its weights should be."""
    if export.is_dir():
        from kimi_deploy.engine.engine_from_onnx import check_weights, read_export

        check_weights(read_export(export), export, progress)


def _folder(export: Path) -> Path:
    """Where the graph's weight files lie."""
    return export.parent if export.is_file() else export


def _graph(export: Path, settings: EngineRecipe, file_profiles: tuple[str, ...]) -> tuple[bytes, Plans, bool]:
    """The graph as TensorRT is to parse it, the profiles of each plan, and whether it computes in bfloat16."""
    if export.is_file():
        from kimi_deploy.engine.engine_from_file import PLAN_NAME, check_recipe, parse_profiles, read_standard_graph

        check_recipe(settings)
        found = read_standard_graph(export)
        return found.proto, {PLAN_NAME: parse_profiles(found, file_profiles)}, found.bfloat16
    from kimi_deploy.engine.engine_from_onnx import check_graph_file, graph_for, read_export

    check_graph_file(read_export(export), export)
    graph = graph_for(export, settings)
    return graph.proto, settings.shapes_of_plans(graph.contract), graph.contract.dtype == "bfloat16"


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
