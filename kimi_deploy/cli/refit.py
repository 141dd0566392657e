"""kimi-deploy refit."""

from __future__ import annotations

from pathlib import Path

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


@click.command("refit")
@folder_argument("engine")
@folder_argument("export")
@output_option("the engine with its weights")
@force_option
@json_option
def refit_command(engine: Path, export: Path, output: Path, force: bool, as_json: bool) -> None:
    """Fill the weights of EXPORT into ENGINE, built with --strip-weights or --refit. Needs a GPU that runs it."""
    from kimi_deploy.engine.refit import refit_engine

    manifest = refit_engine(engine, export, output, overwrite=force, progress=progress)
    if as_json:
        print_json({"output": str(output), "manifest": manifest.to_dict()})
        return
    say(f"filled {engine} with the weights of {manifest.source['name']}")
    for name, entry in manifest.files.items():
        click.echo(f"{entry['bytes']:>14,}  {output / name}")
