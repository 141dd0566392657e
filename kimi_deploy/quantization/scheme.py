"""What `--quantize` asks for. Needs nothing heavy: the command line reads it before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from kimi_deploy.errors import ManifestError, UsageError

Method = Literal["rtn", "hqq"]
"""`rtn`: every value to the nearest level of its group. `hqq`: half-quadratic quantisation, which fits each group's
scale and zero point to a norm that forgives outliers (Badri and Shaji, 2023); it needs no data."""
Activations = Literal["float32", "int8"]
"""What a quantised product reads: its input as it is, or rounded to int8 by groups, each with its own scale."""
METHODS: tuple[Method, ...] = get_args(Method)
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
BITS = (4, 8)
GROUPS = (32, 64, 128)
PREFERRED_GROUP = 64

SYNTAX = (
    "int4 or int8, then any of: group=32|64|128, symmetric|asymmetric, rtn|hqq, activations=int8|float32, "
    "head, embeddings; separated by commas"
)


@dataclass(frozen=True)
class Scheme:
    """A whole choice of weight-only quantisation.

    `bits` per weight and `group` consecutive inputs that share a scale (None: `PREFERRED_GROUP` where it divides every
    quantised dimension, else 32). `symmetric`: no zero points. `head` and `embeddings`: whether those are quantised.
    """

    bits: int
    group: int | None = None
    symmetric: bool = False
    method: Method = "hqq"
    activations: Activations = "int8"
    head: bool = False
    embeddings: bool = False

    @property
    def text(self) -> str:
        """The specification that gives this scheme."""
        parts = [f"int{self.bits}"]
        if self.group is not None:
            parts.append(f"group={self.group}")
        parts += ["symmetric" if self.symmetric else "asymmetric", self.method, f"activations={self.activations}"]
        return ",".join(parts + [name for name in ("head", "embeddings") if getattr(self, name)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Scheme:
        """Inverse of `to_dict`; keys that are not the scheme's are ignored. Raises ManifestError when it is none."""
        names = cls.__dataclass_fields__
        try:
            return parse_scheme(cls(**{k: v for k, v in raw.items() if k in names}).text)
        except (TypeError, UsageError) as error:
            raise ManifestError(
                "manifest.json: the quantisation is not valid",
                seen=repr(raw)[:300],
                expected=SYNTAX,
                fix="export again",
            ) from error


def parse_scheme(text: str) -> Scheme:
    """The scheme that `text` asks for; int8 is rounded to nearest and symmetric unless it says otherwise.

    Raises UsageError naming what is not known or said twice.
    """
    words = [w.strip() for w in text.split(",")]
    bits = {f"int{b}": b for b in BITS}
    if words[0] not in bits:
        raise UsageError("--quantize: no such precision", seen=repr(words[0]), expected=SYNTAX)
    values: dict[str, Any] = {"bits": bits[words[0]]}
    if values["bits"] == 8:
        defaults: dict[str, Any] = {"symmetric": True, "method": "rtn"}
    else:
        defaults = {}
    known: dict[str, tuple[str, Any]] = {
        **{f"group={g}": ("group", g) for g in GROUPS},
        "symmetric": ("symmetric", True),
        "asymmetric": ("symmetric", False),
        **{m: ("method", m) for m in METHODS},
        **{f"activations={a}": ("activations", a) for a in ACTIVATIONS},
        "head": ("head", True),
        "embeddings": ("embeddings", True),
    }
    for word in words[1:]:
        if word not in known:
            raise UsageError("--quantize: no such choice", seen=repr(word), expected=SYNTAX)
        name, value = known[word]
        if name in values:
            raise UsageError(f"--quantize: {name} is given twice", seen=repr(text), expected=SYNTAX)
        values[name] = value
    return Scheme(**defaults | values)


def recorded_scheme(details: Mapping[str, Any]) -> Scheme | None:
    """The quantisation that a manifest's details hold; None without one. Raises ManifestError for a wrong one."""
    record = details.get("quantization")
    return None if record is None else Scheme.from_dict(record)


def describe_precision(details: Mapping[str, Any]) -> str:
    """How an export's numbers are stored, from a manifest's details: "float32", "float32, int4,group=64,...".

    Raises ManifestError for a quantisation that is not valid.
    """
    scheme = recorded_scheme(details)
    return str(details["dtype"]) if scheme is None else f"{details['dtype']}, {scheme.text}"
