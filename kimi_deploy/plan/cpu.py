"""Resident memory of a process that runs an export on ONNX Runtime's CPU provider, by what holds it.

Every rule here is of ONNX Runtime 1.32 on x86-64, found by following what it keeps: `Anonymous` and file pages of
/proc/self/smaps after loading, and the initializers of the graph that it has optimised. `kernels` says whether our ops
run in the library of CPU kernels (`kimi_deploy/runtime/ort_kernels.py`), which reads weights where they lie, or as
their function bodies. The processes measured are those of `scripts/measure_resident.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.contract import Dtype
from kimi_deploy.plan.memory import component_of, weight_bytes
from kimi_deploy.plan.speed import expected_experts
from kimi_deploy.quantization.scheme import Scheme
from kimi_deploy.quantization.selection import Role, quantized_parameters
from kimi_deploy.quantization.storage import stored_parts
from kimi_deploy.runtime.huge_pages import MOST_BYTES
from kimi_deploy.weights import weight_table

PROCESS_BYTES, PROCESS_BYTES_WITH_KERNELS = 90_000_000, 82_000_000
"""Python, NumPy, ONNX Runtime's code and a graph of some thousand nodes, or of some hundred without the bodies."""
TOKENWISE_BYTES = 24_000_000
"""What a quantised graph takes beside that with kernels: the strips in which Tokenwise takes many tokens, and the graph
read and written again to put its nodes in. Measured on a mini-62m of 4 layers, 130 and 2,050 tokens."""
KV_B_COPIES = 4.5
"""LatentAttention's body reads `kv_b_proj` in the forms of its branches, each of which is folded to a constant: the key
half once as it is, both halves transposed for either of two branches, and again for two products that pack theirs."""
_WINDOW = 64 << 10
"""Linux maps so much of a file around a page that is read, where it has it in memory."""


@dataclass(frozen=True)
class CpuWeights:
    """Bytes of weights in memory. `packed`: the process's own copies, in its kernels' layout. `mapped`: pages of the
    export's files that were read; the system takes them back when memory is short. `experts`: those of `mapped` that
    are experts, and fewer where a router prefers some of them."""

    packed: int
    mapped: int
    experts: int


def cpu_weights(
    config: KimiLinearConfig, dtype: Dtype, scheme: Scheme | None, tokens: int, kernels: bool = False
) -> CpuWeights:
    """What is in memory of an export's weights after `tokens` tokens of all rows together, equally likely each.

    `scheme` is settled; the bodies are `ort`. A float32 weight is in memory once: packed by the product that reads it,
    or mapped. One of 16 bits is widened when it is loaded. The library's kernels read quantised weights as they are
    stored. Of experts that are mapped only those chosen count, which is the most that they can become, of an embedding
    table what lies around the rows looked up.
    """
    kept = _kept(config, dtype, scheme, kernels)
    chosen = expected_experts(config, tokens) / config.num_experts if config.num_experts else 0.0
    looked_up = sum(_looked_up(nbytes, tokens) for nbytes in kept.tables)
    experts = round(kept.experts * chosen)
    return CpuWeights(kept.packed, round(kept.mapped + experts + looked_up), experts)


@dataclass(frozen=True)
class _Kept:
    """Bytes that loading leaves in memory, and what is mapped as it is read: experts, and an embedding's tensors."""

    packed: int
    mapped: int
    experts: int
    tables: tuple[int, ...]


@lru_cache(maxsize=8)
def _kept(config: KimiLinearConfig, dtype: Dtype, scheme: Scheme | None, kernels: bool) -> _Kept:
    roles = quantized_parameters(config, scheme) if scheme else {}
    packed = mapped = experts = 0
    tables: tuple[int, ...] = ()
    for weight in weight_table(config):
        component, wide = component_of(weight, config), weight_bytes(weight, "float32")
        if scheme is not None and weight.name in roles:
            stored = tuple(part.nbytes for part in stored_parts(weight.shape, roles[weight.name], scheme))
            if component == "embeddings":
                tables = stored
            elif component == "experts" and kernels:
                experts += sum(stored)
            elif kernels:
                mapped += sum(stored)
            else:
                own, read = quantized_bytes(weight.shape, roles[weight.name], scheme)
                packed, mapped = packed + own, mapped + read
        elif component == "embeddings" and not config.tie_word_embeddings:
            tables = (weight_bytes(weight, dtype),)
        elif component == "experts" and dtype == "float32":
            experts += wide
        elif weight.name.endswith("kv_b_proj.weight"):
            packed, mapped = packed + (0 if kernels else round(KV_B_COPIES * wide)), mapped + kernels * wide
        else:
            packed += wide
    if scheme is not None and kernels and packed + mapped + experts <= MOST_BYTES:
        # kernel_weights of kimi_deploy/runtime/ort_weights.py copies what is no more
        packed, mapped, experts = packed + mapped + experts, 0, 0
    return _Kept(packed, mapped, experts, tables)


def quantized_bytes(shape: tuple[int, ...], role: Role, scheme: Scheme) -> tuple[int, int]:
    """Packed and mapped bytes of a quantised product's or of experts' weights.

    With int8 activations the kernels pack levels, scales and a float32 sum of each group (MLAS: PackQuantBDataSize,
    CompInt8), and have read scales and zero points from the file. With float32 activations they pack 4-bit levels
    alone; of 8 bits nothing.
    """
    sizes = {part.name: part.nbytes for part in stored_parts(shape, role, scheme)}
    beside = sum(sizes.values()) - sizes["levels"]
    if scheme.activations == "int8":
        return sizes["levels"] + 2 * sizes["scales"], beside
    return (sizes["levels"], beside) if scheme.bits == 4 else (0, sizes["levels"] + beside)


def _looked_up(nbytes: int, tokens: int) -> float:
    """Expected bytes in memory of a table of `nbytes` of which `tokens` rows were read."""
    windows = max(1.0, nbytes / _WINDOW)
    return nbytes * (1 - (1 - 1 / windows) ** tokens)
