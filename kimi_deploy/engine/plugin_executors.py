"""What runs the Python plugins: the kernels' C ABI, with the calls that the C++ plugins make, or the torch op."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from kimi_deploy.engine.plugin_call import Executor, PluginCall
from kimi_deploy.errors import BackendError, ContractError, install_line
from kimi_deploy.kernels.abi import (
    ACTIVATIONS,
    DATA_TYPES,
    GATES,
    UPDATE_RULES,
    CausalConvArguments,
    KdaArguments,
    LinearAttentionArguments,
    MoeArguments,
)
from kimi_deploy.kernels.library import KernelLibrary, default_path

if TYPE_CHECKING:
    from kimi_deploy.engine.plugin_memory import Device


@dataclass(frozen=True)
class Launcher:
    """What an op adds: its argument struct from a call, and the C functions. No `workspace`: the op never needs any."""

    arguments: Callable[[PluginCall], ctypes.Structure]
    run: str
    workspace: str | None = None


def _kda(call: PluginCall) -> KdaArguments:
    fields, symbols = call.fields, call.symbols
    arguments = KdaArguments(
        struct_size=ctypes.sizeof(KdaArguments),
        data_type=DATA_TYPES[call.inputs[0].dtype],
        state_type=DATA_TYPES["float32"],
        gate=GATES[str(fields["gate"])],
        batch=symbols["batch"],
        sequence=symbols["sequence"],
        num_heads=symbols["num_heads"],
        head_dim=symbols["head_dim"],
        conv_width=symbols["conv_width"],
        norm_eps=fields["norm_eps"],
        scale=fields["scale"],
        gate_lower_bound=fields["gate_lower_bound"],
    )
    return _with_memory(arguments, call)


def _moe(call: PluginCall) -> MoeArguments:
    fields, symbols = call.fields, call.symbols
    sizes = ("hidden", "num_experts", "intermediate", "top_k", "n_group", "topk_group", "renormalize")
    arguments = MoeArguments(
        struct_size=ctypes.sizeof(MoeArguments),
        data_type=DATA_TYPES[call.inputs[0].dtype],
        tokens=symbols["batch"] * symbols["sequence"],
        routed_scaling_factor=fields["routed_scaling_factor"],
        **{name: symbols[name] for name in sizes},
    )
    return _with_memory(arguments, call)


def _linear_attention(call: PluginCall) -> LinearAttentionArguments:
    fields, symbols, bound = call.fields, call.symbols, call.bindings
    rule, states = str(fields["update_rule"]), symbols["kv_num_heads"]
    for name, needed in (("decay", "gated" in rule), ("beta", "delta" in rule)):
        if (name in bound) != needed:
            raise ContractError(
                f"plugin {call.plugin.label}: update_rule {rule} {'needs' if needed else 'takes no'} {name}",
                fix="rewrite the graph with kimi_deploy.engine.standard_nodes",
            )
    key_dim = _quotient("query", symbols["query_size"], symbols["q_num_heads"])
    per_key = symbols.get("decay_size", states) != states
    shared = symbols.get("beta_size") == 1
    for name, size, sizes in (
        ("decay", symbols.get("decay_size"), (states, states * key_dim)),
        ("beta", symbols.get("beta_size"), (1, states)),
    ):
        if size is not None and size not in sizes:
            raise ContractError(
                f"plugin {call.plugin.label}: input {name} has the wrong size on axis 2",
                seen=str(size),
                expected=f"one of {sizes}",
            )
    state = bound.get("past_state", call.inputs[0])
    arguments = LinearAttentionArguments(
        struct_size=ctypes.sizeof(LinearAttentionArguments),
        data_type=DATA_TYPES[call.inputs[0].dtype],
        state_type=DATA_TYPES[state.dtype],
        update_rule=UPDATE_RULES[rule],
        batch=symbols["batch"],
        sequence=symbols["sequence"],
        q_num_heads=symbols["q_num_heads"],
        kv_num_heads=states,
        key_num_heads=_quotient("key", symbols["key_size"], key_dim),
        key_dim=key_dim,
        value_dim=_quotient("value", symbols["value_size"], states),
        decay_per_key=int(per_key),
        beta_num_heads=1 if shared else states,
        scale=fields["scale"],
    )
    return _with_memory(arguments, call)


def _quotient(what: str, size: int, parts: int) -> int:
    if parts < 1 or size % parts or size == 0:
        raise ContractError(f"{what} does not divide into heads", seen=f"{size} values, {parts} parts")
    return size // parts


def _causal_conv(call: PluginCall) -> CausalConvArguments:
    if call.fields["ndim"] != 1:
        raise ContractError(f"plugin {call.plugin.label}: ndim is {call.fields['ndim']}", expected="1")
    symbols = call.symbols
    arguments = CausalConvArguments(
        struct_size=ctypes.sizeof(CausalConvArguments),
        data_type=DATA_TYPES[call.inputs[0].dtype],
        activation=ACTIVATIONS[str(call.fields["activation"])],
        batch=symbols["batch"],
        channels=symbols["channels"],
        sequence=symbols["length"],
        width=symbols["kernel_size"],
    )
    return _with_memory(arguments, call)


def _with_memory(arguments: Any, call: PluginCall) -> Any:
    """The struct's pointers have the names of the ports."""
    for name, binding in call.bindings.items():
        setattr(arguments, name, binding.address)
    for name in ("workspace", "workspace_size", "stream"):
        if hasattr(arguments, name):
            setattr(arguments, name, getattr(call, name))
    return arguments


LAUNCHERS: dict[str, Launcher] = {
    "KimiDeltaAttention": Launcher(_kda, "kimi_kda", "kimi_kda_workspace"),
    "MixtureOfExperts": Launcher(_moe, "kimi_moe", "kimi_moe_workspace"),
    "LinearAttention": Launcher(_linear_attention, "kimi_linear_attention", "kimi_linear_attention_workspace"),
    "CausalConvWithState": Launcher(_causal_conv, "kimi_causal_conv"),
}
"""By op."""


KERNELS_NEEDED = frozenset({"MixtureOfExperts", "LinearAttention", "CausalConvWithState"})
"""Ops that torch does not run in an engine: it has no such op, or its form waits for the GPU at every call."""


def kernels_are_built() -> bool:
    """Whether `make kernels` has been run here."""
    return default_path("cuda").is_file()


@dataclass(frozen=True)
class KernelExecutor:
    """The functions of a kernel library; its backend says whether addresses are of device or of host memory."""

    library: KernelLibrary

    def workspace(self, call: PluginCall) -> int:
        """Bytes of workspace. Raises ContractError, with the kernels' reason, for what they do not take."""
        launcher = LAUNCHERS[call.plugin.op.name]
        arguments = launcher.arguments(call)
        if launcher.workspace is None:
            return 0
        size = ctypes.c_size_t()
        self.library.call(launcher.workspace, arguments, ctypes.byref(size))
        return size.value

    def enqueue(self, call: PluginCall) -> None:
        """Launch on the call's stream. Raises ContractError for refused arguments, BackendError for a failed launch."""
        launcher = LAUNCHERS[call.plugin.op.name]
        self.library.call(launcher.run, launcher.arguments(call))


@dataclass(frozen=True)
class TorchExecutor:
    """torch.ops.kimi.<op> on `device`: "cuda" as in TensorRT, "cpu" for driving a plugin on host memory."""

    device: Device = "cuda"

    def workspace(self, call: PluginCall) -> int:
        """None: torch has its own. Raises BackendError for an op that torch does not run in an engine."""
        if call.plugin.op.name in KERNELS_NEEDED:
            raise BackendError(
                f"plugin {call.plugin.label} needs the kernel library",
                seen="it is not built, and torch has no form of the op that an engine can run",
                fix="build it: make kernels",
            )
        return 0

    def enqueue(self, call: PluginCall) -> None:
        """Run the torch op. Raises BackendError without torch."""
        try:
            from kimi_deploy.engine.plugin_enqueue import run_op
        except ImportError as error:
            raise BackendError(
                "Python plugins need the kernel library or torch",
                seen=str(error),
                fix=f"make kernels, or {install_line('torch')}",
            ) from None
        run_op(call, self.device)


@dataclass(frozen=True)
class ChosenExecutor:
    """The kernels for what they take, torch for other sizes and types of what it runs; the same choice every time."""

    kernels: KernelExecutor
    torch: TorchExecutor

    def workspace(self, call: PluginCall) -> int:
        """As the chosen one's."""
        return self._choose(call).workspace(call)

    def enqueue(self, call: PluginCall) -> None:
        """As the chosen one's."""
        self._choose(call).enqueue(call)

    def _choose(self, call: PluginCall) -> Executor:
        if call.plugin.op.name in KERNELS_NEEDED or importlib.util.find_spec("torch") is None:
            return self.kernels
        try:
            self.kernels.workspace(call)
        except ContractError:
            return self.torch
        return self.kernels


@cache
def default_executor() -> Executor:
    """The CUDA kernel library if it was built, for what it takes, and else torch. An engine must be run by what sized
    its workspace or by something that needs less: a plugin refuses at the first shape otherwise.
    """
    if kernels_are_built():
        return ChosenExecutor(KernelExecutor(KernelLibrary.open()), TorchExecutor())
    return TorchExecutor()


def check_kernels(ops: frozenset[str]) -> None:
    """Raise BackendError where the Python plugin of one of `ops` has nothing to run, or to size, it with."""
    needed = sorted(KERNELS_NEEDED & ops)
    if needed and isinstance(default_executor(), TorchExecutor):
        raise BackendError(
            f"the Python plugins of {' and '.join(needed)} need the kernel library",
            seen="it is not built",
            fix="make kernels (needs nvcc), or give the whole library with --plugin native: make plugins",
        )
