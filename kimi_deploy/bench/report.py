"""The report of `bench MODEL EXPORT`: its one definition, from which the JSON schema is written.

`python -m kimi_deploy.bench.report` prints that schema, which stands in docs/benchmarks/report.schema.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kimi_deploy.errors import UsageError
from kimi_deploy.strict_json import read_json_object

Version = Literal[4]
SCHEMA_VERSION: Version = 4
"""Goes up with every change of a field, a new one too: a reader refuses fields that it does not know."""
MAX_BYTES = 64 << 20

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Spread(_Part):
    """Median and 10th and 90th percentile of `count` measured times, seconds."""

    median: Positive
    p10: Positive
    p90: Positive
    count: Count


class Phases(_Part):
    """A number for the prefill and one for a decode step."""

    prefill: Positive
    decode: Positive


class Kernels(_Part):
    """Kernels of ours in ONNX Runtime: the ops, the sha256 of the library's file, the instruction set it was compiled
    for.
    """

    ops: Annotated[list[str], Field(min_length=1)]
    library: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    instruction_set: str


class Result(_Part):
    """One runtime at one point.

    `prefill` is the call with the whole prompt, `decode` one step of every sequence. `time_to_first_token` goes from
    an empty state to the token chosen from the prompt's logits; `time_per_output_token` is a step and its choice.
    `tokens_per_second` counts the tokens of all sequences. `times_of_first` is the median over the first runtime's,
    `times_of_floor` over the floor. `load` is seconds, `peak_bytes` the largest resident size of the process. `kernels`
    is what ran in ONNX Runtime in the place of function bodies; null where these ran, and for other runtimes.
    """

    prefill: Spread
    decode: Spread
    time_to_first_token: Spread
    time_per_output_token: Spread
    tokens_per_second: Phases
    times_of_first: Phases
    times_of_floor: Phases
    load: Positive
    peak_bytes: Count
    kernels: Kernels | None


class Floor(_Part):
    """What the weights alone demand at a point: bytes of a decode step, multiply-adds of the prefill, seconds."""

    decode_bytes: Positive
    prefill_multiply_adds: Positive
    seconds: Phases


class Point(_Part):
    """`batch` sequences of `context` prompt tokens each, and every runtime's result."""

    batch: Count
    context: Count
    floor: Floor
    results: Annotated[dict[str, Result], Field(min_length=1)]


class MeasuredRates(_Part):
    """The machine's rates, medians of this run: weights read and multiply-adds done per second."""

    read_bytes_per_second: Positive
    multiply_adds_per_second: Positive


class Machine(_Part):
    """Where it was measured."""

    processor: str
    cpus: Count


class Settings(_Part):
    """Decode steps after each prompt, counted sequences per process, processes per runtime, CPU threads."""

    steps: Count
    repeats: Count
    rounds: Count
    threads: Count


class Report(_Part):
    """Everything one run measured. `export` is the manifest's name and details of the exported graph."""

    schema_version: Version = SCHEMA_VERSION
    kimi_deploy: str
    machine: Machine
    settings: Settings
    rates: MeasuredRates
    export: dict[str, Any]
    points: Annotated[list[Point], Field(min_length=1)]

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def read_report(path: Path) -> Report:
    """A report of `bench MODEL EXPORT -o`.

    Raises UsageError for a file that is none, naming its schema version and, where that fits, the first wrong field.
    """
    fix = "measure again with `bench MODEL EXPORT -o FILE`"
    data = read_json_object(path, MAX_BYTES, UsageError, fix)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UsageError(
            "this is not a report of this version",
            seen=f"{path}: schema_version {json.dumps(version)[:100]}",
            expected=f"a file that `bench MODEL EXPORT -o FILE` wrote, schema_version {SCHEMA_VERSION}",
            fix=fix,
        )
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        field = ".".join(map(str, wrong[0]["loc"]))
        raise UsageError(
            f"the report's field {field} is wrong",
            seen=f"{path}, schema_version {version}: {wrong[0]['msg']}; {len(wrong)} wrong in all",
            expected=f"what docs/benchmarks/report.schema.json, version {SCHEMA_VERSION}, says",
            fix=fix,
        ) from error


def json_schema() -> str:
    """The JSON schema of a report, as text."""
    return json.dumps(Report.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
