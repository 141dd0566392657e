"""What every command shares: JSON or text on stdout, progress on stderr."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from kimi_deploy.errors import UsageError

LINE_SECONDS = 10.0
MOST_THREADS = 1024
"""Of any --threads: more is a slip, and a runtime that is asked for them takes minutes to start or dies."""


class NamedPath(click.Path):
    """A path that was given: an empty one would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("an empty path names nothing; '.' is the current folder", param, ctx)
        return super().convert(value, param, ctx)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
kernels_option = click.option(
    "--kernels",
    default="auto",
    show_default=True,
    metavar="auto|none|PATH",
    help="Our ops on ONNX Runtime's CPU: kernels of `make cpu-kernels` where it was run, function bodies, or kernels "
    "of another library.",
)
force_option = click.option("--force", is_flag=True, help="Replace an output folder that exists.")


threads_option = click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads.")


def output_option(what: str) -> Callable[[Any], Any]:
    """The required `-o/--output DIR`."""
    return click.option(
        "-o",
        "--output",
        type=NamedPath(path_type=Path),
        required=True,
        metavar="DIR",
        help=f"Folder for {what}.",
    )


def folder_argument(name: str) -> Callable[[Any], Any]:
    """A positional folder; the command checks it, knowing what should be in it."""
    return click.argument(name, type=NamedPath(path_type=Path), metavar=name.upper())


def was_given(parameter: click.Parameter) -> bool:
    """Whether a parameter of the running command was given, and is not its default."""
    source = click.get_current_context().get_parameter_source(str(parameter.name))
    return source not in (None, click.core.ParameterSource.DEFAULT)


def refuse_others(mode: str, taken: Collection[str]) -> None:
    """Raise UsageError for an option of the running command that was given and is not of those `taken` in this `mode`:
    it would change nothing. They are named as the command's parameters.
    """
    for option in click.get_current_context().command.params:
        if isinstance(option, click.Option) and was_given(option) and option.name not in taken:
            raise UsageError(f"{option.opts[-1]} is not of {mode}", fix="leave one of them out")


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))


@contextmanager
def progress(description: str, total: int | None = None, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; yields a function that advances it. Where stderr is no terminal, a plain line at the
    beginning and one every `LINE_SECONDS`, so that a log shows that the work goes on."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        with _lines(description, total, unit) as advance:
            yield advance
        return
    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), amount, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.update(task, advance=n)


@contextmanager
def _lines(description: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    done, ended, began = 0, threading.Event(), time.monotonic()

    def advance(n: int) -> None:
        nonlocal done
        done += n

    def report() -> None:
        while not ended.wait(LINE_SECONDS):
            scale, what = (1e6, "MB") if unit == "bytes" else (1, unit)
            parts = f": {done / scale:,.0f} of {total / scale:,.0f} {what}" if total else ""
            say(f"{description}{parts}, {time.monotonic() - began:.0f} s so far ...")

    say(f"{description} ...")
    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield advance
    finally:
        ended.set()
        reporter.join()


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout, as wide as its content needs where stdout is not a terminal."""
    from rich.console import Console as RichConsole
    from rich.table import Table

    class Console(RichConsole):
        def on_broken_pipe(self) -> None:
            # rich would exit with 1, which is a failed check; `main` knows the error
            raise BrokenPipeError

    table = Table(*headers, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def say(text: str) -> None:
    """A line for a person, on stderr."""
    click.echo(text, err=True)
