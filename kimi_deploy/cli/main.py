"""kimi-deploy: the command line. Commands load on use, so that help needs nothing but click."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

import click

from kimi_deploy import __version__
from kimi_deploy.errors import KimiDeployError, UsageError
from kimi_deploy.optional_packages import INSTALL, missing_packages

# command -> (module under kimi_deploy.cli, short help): the table keeps `-h` free of imports
COMMANDS = {
    "export": ("export", "Export a checkpoint to ONNX with its states as inputs and outputs."),
    "build-engine": ("build_engine", "Build a TensorRT engine from an export."),
    "refit": ("refit", "Fill an export's weights into an engine built without them."),
    "generate": ("generate", "Generate text from an export, an engine or a checkpoint."),
    "validate": ("validate", "Compare an export or engine with the PyTorch model, outputs and states."),
    "inspect": ("inspect", "Say what a checkpoint, export or engine folder holds."),
    "synth": ("synth", "Write a random checkpoint of a known shape."),
    "plan": ("plan", "Say what a model takes: memory, longest context, bounds of speed."),
    "bench": ("bench", "Measure prefill and decode, each runtime in its own process."),
    "doctor": ("doctor", "Check this machine: packages, runtimes, GPU, disk and memory."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"kimi_deploy.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{COMMANDS[cmd_name][0]}_command")
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # whoever read our output has enough (`generate ... | head`): end as SIGPIPE would, with nothing to flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(128 + signal.SIGPIPE)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kimi-deploy")
def cli() -> None:
    """Run Kimi Linear models outside PyTorch: export, build, generate, validate.

    Exit codes: 0 ok, 1 a check failed or the work could not be done, 2 wrong usage, 130 interrupted.
    """


def _fail(error: KimiDeployError) -> NoReturn:
    if "--json" in sys.argv:
        from kimi_deploy.cli.common import print_json

        # standard output may be what failed
        with suppress(OSError):
            print_json(error.to_dict())
    click.echo(f"error: {error}", err=True)
    sys.exit(error.exit_code)


def main() -> None:
    """Entry point: a typed error is printed without a traceback, and as JSON too when JSON was asked for."""
    # a polite kill unwinds as Ctrl-C does, so that no half-written folder stays behind
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        # outside standalone mode click returns the code that a command gave to ctx.exit
        code = cli(prog_name="kimi-deploy", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except KimiDeployError as error:
        _fail(error)
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name not in INSTALL:
            raise
        _fail(missing_packages(name))
    except OSError as error:
        # what no command foresaw: a full disk under standard output, a file that vanishes while it is read
        where = f"{error.filename}: " if error.filename else ""
        _fail(KimiDeployError("the system refused to read or write", seen=f"{where}{error.strerror or error}"))
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.UsageError as error:
        # a group without a command prints its help
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            error.show()
            sys.exit(error.exit_code)
        what = error.format_message().rstrip(".")
        command = error.ctx.command_path if error.ctx is not None else "kimi-deploy"
        _fail(UsageError(what[:1].lower() + what[1:], fix=f"{command} -h lists arguments and options"))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
