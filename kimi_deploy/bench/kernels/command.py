"""What the measurements that are modules of their own share: `--json` or a table, and an error as one line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from kimi_deploy.errors import KimiDeployError


def run_measurement(
    description: str | None, measure: Callable[[], dict[str, Any]], print_tables: Callable[[dict[str, Any]], None]
) -> None:
    """Parse the command line, measure, and print: the device's name and tables, or one JSON object with `--json`.

    Raises SystemExit with the message of a KimiDeployError.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    try:
        measured = measure()
    except KimiDeployError as error:
        raise SystemExit(f"error: {error}") from None
    if arguments.json:
        json.dump(measured, sys.stdout)
        return
    print(measured["device"]["name"])
    print_tables(measured)
