"""Engine recipes: what to build for, read from TOML and checked before anything expensive starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from kimi_deploy.contract import BATCH, CAPACITY, NUM_LOGITS, SEQUENCE, GraphContract
from kimi_deploy.engine.backend import BACKEND_CHOICES, BackendChoice, TensorRT
from kimi_deploy.errors import EngineError, UsageError
from kimi_deploy.ops.plugins import PLUGIN_OPS
from kimi_deploy.recipe import read_recipe

PluginChoice = Literal["auto", "native", "python", "none"]
PLUGIN_CHOICES: tuple[PluginChoice, ...] = get_args(PluginChoice)
HardwareLevel = Literal["none", "ampere+", "sameComputeCapability"]
HARDWARE_LEVELS: tuple[HardwareLevel, ...] = get_args(HardwareLevel)
Verbosity = Literal["layer_names_only", "detailed", "none"]
VERBOSITIES: tuple[Verbosity, ...] = get_args(Verbosity)
Plans = Literal["one", "two"]
PLANS: tuple[Plans, ...] = get_args(Plans)
PLAN_NAMES: dict[Plans, tuple[str, str]] = {
    "one": ("engine.plan", "engine.plan"),
    "two": ("engine.plan", "decode.plan"),
}
"""The files that hold the prefill and the decode profile."""
PROFILES = ("prefill", "decode")
LISTS = ("compute_capabilities", "plugin_ops")
"""Keys that are lists in a recipe's file."""
AXES = (BATCH, SEQUENCE, CAPACITY, NUM_LOGITS)
# TensorRT-RTX compiles for a list of architectures; these are the GeForce generations most in use, Ada and Blackwell
DEFAULT_RTX_CAPABILITIES = ("8.9", "12.0")
AMPERE = (8, 0)
"""The first compute capability with bfloat16, which the project's kernels start at too."""
MAX_ELEMENTS = 2**31 - 1
"""Elements of one tensor that TensorRT can address."""

Range = tuple[int, int, int]
"""Smallest, most likely and largest size of an axis."""
Shapes = dict[str, tuple[tuple[int, ...], ...]]
"""Smallest, most likely and largest shape of every input: an optimisation profile as TensorRT has it."""


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: the sizes each symbolic axis of the graph may take.

    The default decode profile leaves the batch open: with batch and sequence both fixed to 1, TensorRT-RTX 1.7.1 stores
    every weight of a plain matrix product a second time, transposed.
    """

    batch: Range = (1, 1, 4)
    sequence: Range = (1, 1, 1)
    capacity: Range = (1, 4096, 4096)
    num_logits: Range = (1, 1, 1)

    def shapes(self, contract: GraphContract) -> Shapes:
        """The shapes of every graph input."""
        return shapes_of({spec.name: spec.dims for spec in contract.inputs}, asdict(self))


@dataclass(frozen=True)
class EngineRecipe:
    """Everything that decides what `build-engine` makes of an export.

    plans: "one" engine with both profiles and one copy of the weights, or "two", each with a profile and all weights.
    compute_capabilities: GPU architectures to build for, such as "8.9" (TensorRT-RTX only; the full TensorRT builds
    for the GPU it runs on). plugin: "auto" and "python" make Python plugins, "native" those of the C++ library; the
    engine is the same. plugin_ops: which ops they run; all of them where the kernels are built, when it is empty, and
    else those that torch runs as well. workspace_mib: largest scratch memory of a layer; tactic_shared_memory_kib: of
    a kernel; 0 for no limit. tf32: let float32 products round their inputs to 10 bits. in_place_state: alias state
    outputs of plugins to their inputs, so that caller and engine share one buffer. version_compatible,
    hardware_compatibility, refit, strip_weights, profiling_verbosity: trtexec's options of these names. timing_cache:
    a file that is read if it is there, and written if not; with timing_cache_sha256 it must be there with that hash.
    """

    backend: BackendChoice = "auto"
    plugin: PluginChoice = "auto"
    plugin_ops: tuple[str, ...] = ()
    plans: Plans = "one"
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int = 3
    workspace_mib: int = 0
    tactic_shared_memory_kib: int = 0
    tf32: bool = False
    in_place_state: bool = False
    version_compatible: bool = False
    hardware_compatibility: HardwareLevel = "none"
    refit: bool = False
    strip_weights: bool = False
    profiling_verbosity: Verbosity = "layer_names_only"
    timing_cache: str = ""
    timing_cache_sha256: str = ""
    prefill: Profile = field(default=Profile(sequence=(1, 256, 512), num_logits=(1, 1, 64)))
    decode: Profile = field(default=Profile())

    @property
    def plugin_kind(self) -> Literal["native", "python"]:
        """The kind of plugins to register, where any are used."""
        return "native" if self.plugin == "native" else "python"

    @property
    def profiles(self) -> dict[str, Profile]:
        """The profiles in the order they have in the engine."""
        return {"prefill": self.prefill, "decode": self.decode}

    @property
    def profiles_of_plans(self) -> dict[str, dict[str, Profile]]:
        """File name of each plan -> its profiles, in their order."""
        found: dict[str, dict[str, Profile]] = {}
        for plan, (name, profile) in zip(PLAN_NAMES[self.plans], self.profiles.items(), strict=True):
            found.setdefault(plan, {})[name] = profile
        return found

    def shapes_of_plans(self, contract: GraphContract) -> dict[str, dict[str, Shapes]]:
        """File name of each plan -> its profiles' shapes, by the profiles' names, in their order."""
        return {
            plan: {name: profile.shapes(contract) for name, profile in profiles.items()}
            for plan, profiles in self.profiles_of_plans.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the keys of the TOML file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> EngineRecipe:
        """The recipe of `to_dict`, or part of one; keys that are absent keep their defaults.

        Raises UsageError for a value that makes no sense, naming `where` and key.
        """
        values = dict(raw)
        for name in PROFILES:
            if name in values:
                values[name] = change_profile(getattr(cls(), name), values[name], f"{where}: {name}")
        for name in LISTS:
            if name in values:
                values[name] = tuple(values[name])
        try:
            recipe = cls(**values)
        except TypeError as error:
            raise UsageError(f"{where}: this is not a recipe", seen=str(error)) from error
        recipe.check(where)
        return recipe

    @classmethod
    def from_toml(cls, path: Path) -> EngineRecipe:
        """Read a recipe; keys that are absent keep their defaults.

        Raises UsageError for an unknown key, a wrong type or a value that makes no sense, naming file and key.
        """
        types: dict[str, type] = {f.name: type(getattr(cls(), f.name)) for f in fields(cls)}
        tables = dict.fromkeys(PROFILES, dict)
        return cls.from_dict(read_recipe(path, types | dict.fromkeys(LISTS, list) | tables), str(path))

    def check(self, where: str) -> None:
        """Raise UsageError for values that no build can use; `where` says where they came from."""
        for key, allowed in (
            ("backend", BACKEND_CHOICES),
            ("plugin", PLUGIN_CHOICES),
            ("plans", PLANS),
            ("hardware_compatibility", HARDWARE_LEVELS),
            ("profiling_verbosity", VERBOSITIES),
            ("optimization_level", range(6)),
        ):
            value = getattr(self, key)
            if value not in allowed:
                raise UsageError(f"{where}: {key} is not known", seen=repr(value), expected=f"one of {list(allowed)}")
        for op in self.plugin_ops:
            if op not in PLUGIN_OPS:
                raise UsageError(
                    f"{where}: plugin_ops names an op without a plugin", seen=repr(op), expected=f"{sorted(PLUGIN_OPS)}"
                )
        for key in ("workspace_mib", "tactic_shared_memory_kib"):
            if getattr(self, key) < 0:
                raise UsageError(f"{where}: {key} is negative", seen=str(getattr(self, key)), expected="0 or more")
        if self.timing_cache_sha256 and not self.timing_cache:
            raise UsageError(f"{where}: timing_cache_sha256 without timing_cache", fix="name the file too")
        for capability in self.compute_capabilities:
            parse_capability(capability)
        for name, profile in self.profiles.items():
            for wider, narrower in ((SEQUENCE, NUM_LOGITS), (CAPACITY, SEQUENCE)):
                big, small = getattr(profile, wider), getattr(profile, narrower)
                if small[2] > big[2] or small[1] > big[1]:
                    raise UsageError(
                        f"{where}: {name} asks for more {narrower} than {wider}",
                        seen=f"{narrower} {list(small)}, {wider} {list(big)}",
                        expected=f"{narrower} at most {wider}",
                    )

    def check_against(self, contract: GraphContract) -> None:
        """Raise EngineError when a tensor of the graph would be larger than TensorRT can address."""
        for name, profile in self.profiles.items():
            tensors = {spec.name: spec.dims for spec in (*contract.inputs, *contract.outputs)}
            check_addressable(tensors, asdict(profile), name, f"--{name}")


def parse_capability(text: object) -> tuple[int, int]:
    """Major and minor of a compute capability such as "8.9". Raises UsageError for anything else."""
    parts = text.split(".") if isinstance(text, str) else []
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() for p in parts):
        raise UsageError("this is not a compute capability", seen=repr(text), expected='such as "8.9"')
    return int(parts[0]), int(parts[1])


def capabilities_for(backend: TensorRT, wanted: tuple[str, ...], offered: tuple[str, ...]) -> tuple[str, ...]:
    """The architectures to build for; `offered` are those of this TensorRT-RTX. Empty for the full TensorRT.

    Raises UsageError when one is not offered, and when they were named for the full TensorRT.
    """
    if backend == "tensorrt":
        if wanted:
            raise UsageError(
                "the full TensorRT builds for the GPU of this machine, not for a list of architectures",
                seen=f"compute capabilities {list(wanted)}",
                fix="leave them out, or use --backend tensorrt-rtx",
            )
        return ()
    chosen = wanted or DEFAULT_RTX_CAPABILITIES
    for capability in chosen:
        if capability not in offered:
            raise UsageError(
                f"TensorRT-RTX does not build for compute capability {capability}",
                seen="Hopper (H100, H200): TensorRT-RTX runs on none" if capability == "9.0" else "",
                expected=f"some of {list(offered)}",
                fix="on a GPU that is not listed use the full TensorRT (--backend tensorrt), or ONNX Runtime",
            )
    return chosen


def shapes_of(inputs: Mapping[str, Sequence[int | str]], ranges: Mapping[str, Range]) -> Shapes:
    """Shapes of inputs whose dims are sizes, or names that `ranges` has."""
    return {
        name: tuple(tuple(d if isinstance(d, int) else ranges[d][i] for d in dims) for i in range(3))
        for name, dims in inputs.items()
    }


def check_addressable(
    tensors: Mapping[str, Sequence[int | str]], ranges: Mapping[str, Range], profile: str, option: str
) -> None:
    """Raise EngineError when a tensor is larger than TensorRT can address, at the largest sizes of its axes.

    `option` is the one of the command line that gives them.
    """
    for name, dims in tensors.items():
        elements = 1
        for dim in dims:
            elements *= dim if isinstance(dim, int) else ranges[dim][2]
        if elements > MAX_ELEMENTS:
            raise EngineError(
                f"profile {profile} makes {name} too large",
                seen=f"{elements} elements at the largest sizes of {tuple(dims)}",
                expected=f"at most {MAX_ELEMENTS}",
                fix=f"lower the largest sizes of {profile}, in the recipe or with {option}",
            )


def change_profile(profile: Profile, changes: Mapping[str, Any], where: str) -> Profile:
    """`profile` with some ranges replaced: each a size or [min, opt, max]. Raises UsageError naming `where`."""
    for axis in changes:
        if axis not in AXES:
            raise UsageError(f"{where}: unknown axis {axis!r}", expected=f"some of {AXES}")
    return replace(profile, **checked_ranges(changes, where))


def checked_ranges(sizes_of: Mapping[str, Any], where: str) -> dict[str, Range]:
    """Axis -> its range, each given as a size or [min, opt, max]. Raises UsageError naming `where`."""
    ranges: dict[str, Range] = {}
    for axis, value in sizes_of.items():
        sizes = [value] * 3 if isinstance(value, int) else value
        ok = isinstance(sizes, list | tuple) and len(sizes) == 3 and all(type(s) is int for s in sizes)
        if not ok or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise UsageError(
                f"{where}: {axis} is not a range",
                seen=repr(value),
                expected="[min, opt, max], whole numbers, 1 <= min <= opt <= max",
            )
        ranges[axis] = (sizes[0], sizes[1], sizes[2])
    return ranges


def parse_profile(profile: Profile, text: str, option: str) -> Profile:
    """`profile` changed by a command line's text as `parse_ranges` reads it. Raises UsageError naming the option."""
    return change_profile(profile, parse_ranges(text, option), option)


def parse_ranges(text: str, option: str) -> dict[str, Range]:
    """Axis -> range of a command line's "sequence=1:256:512,batch=1". Raises UsageError naming the option."""
    changes: dict[str, Any] = {}
    for part in text.split(","):
        axis, _, sizes = part.partition("=")
        numbers = sizes.split(":")
        if not all(n.isascii() and n.isdigit() for n in numbers) or len(numbers) not in (1, 3):
            raise UsageError(f"{option}: cannot be read", seen=part, expected="AXIS=MIN:OPT:MAX or AXIS=SIZE")
        values = [int(n) for n in numbers]
        changes[axis.strip()] = values if len(values) == 3 else values[0]
    return checked_ranges(changes, option)
