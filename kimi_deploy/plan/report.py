"""The plan of one model on one device: what it takes, what fits, how fast it can be at most."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.contract import Dtype
from kimi_deploy.onnx.budget import IN_FLIGHT_BYTES, PART_BYTES
from kimi_deploy.plan.cpu import PROCESS_BYTES, PROCESS_BYTES_WITH_KERNELS, TOKENWISE_BYTES, CpuWeights, cpu_weights
from kimi_deploy.plan.gpus import Gpu
from kimi_deploy.plan.memory import (
    ITEM_BYTES,
    Attention,
    Component,
    activation_bytes,
    break_even_tokens,
    full_mha_bytes_per_token,
    full_mla_bytes_per_token,
    kda_state_bytes,
    latent_bytes_per_token,
    weight_components,
)
from kimi_deploy.plan.speed import StepTraffic, decode_traffic
from kimi_deploy.quantization.scheme import Scheme
from kimi_deploy.quantization.selection import settled
from kimi_deploy.runtime.generation import DEFAULT_CHUNK

STATE_BUFFERS = 2
"""A step reads a KDA state and writes another; the latent cache is written in place."""
DEVICE_RESERVE = 1_000_000_000
"""Device memory left to the driver's context, the runtime's libraries and allocator gaps: an assumption."""
EXPORT_PROCESS_BYTES = 700_000_000
"""Resident memory of an export beside its weights: Python, torch and the traced graph, measured with torch 2.13."""
GRAPH_BYTES = 10_000_000
"""The graph itself and the small files beside it."""
MOST_SEQUENCES = 1 << 16


@dataclass(frozen=True)
class Memory:
    """Bytes on the device: weights, KDA states with their second buffer, latent cache, activations, reserve.

    `weights` are those in memory, which kernels may keep in another layout than the export's files; `reserve` is the
    process itself, or what a device's driver and libraries take.
    """

    weights: int
    kda_states: int
    latent_cache: int
    activations: int
    reserve: int

    @property
    def total(self) -> int:
        return self.weights + self.kda_states + self.latent_cache + self.activations + self.reserve


@dataclass(frozen=True)
class Plan:
    """Everything `kimi-deploy plan` says. Sizes are bytes; None where no device or bandwidth is known.

    `chunk` is the prefill step that activations are counted for. `saved` is the share of full MLA's cache that the
    hybrid's states save at `context`. `longest_context` and `largest_batch` are what fits with the other as asked for;
    0 where the weights alone do not.
    """

    model: str
    dtype: Dtype
    quantization: str | None
    context: int
    batch: int
    chunk: int
    components: tuple[Component, ...]
    memory: Memory
    kda_state_per_sequence: int
    latent_per_token: int
    full_mla_per_token: int
    full_mha_per_token: int
    saved: float
    break_even: float
    device: str | None
    device_memory: int | None
    longest_context: int | None
    largest_batch: int | None
    traffic: StepTraffic
    bandwidth: int | None
    tokens_per_second: float | None
    cpu_resident: int
    cpu_weights: CpuWeights
    cpu_resident_with_kernels: int
    cpu_weights_with_kernels: CpuWeights
    export_resident: int
    export_disk: int

    @property
    def fits(self) -> bool | None:
        """Whether it fits the device; None where none was named."""
        return None if self.device_memory is None else self.memory.total <= self.device_memory

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for `--json`."""
        raw = asdict(self) | {"fits": self.fits}
        raw["memory"]["total"] = self.memory.total
        raw["traffic"]["total"] = self.traffic.total
        raw["break_even"] = None if math.isinf(self.break_even) else self.break_even
        return raw


@dataclass(frozen=True)
class Request:
    """What is planned: `batch` sequences of at most `context` tokens, prefilled `chunk` tokens at a time."""

    config: KimiLinearConfig
    dtype: Dtype
    context: int
    batch: int
    chunk: int = DEFAULT_CHUNK
    scheme: Scheme | None = None

    def memory(self) -> Memory:
        """On a device whose kernels compute in `dtype`; of a quantised model on the CPU, where alone it runs."""
        if self.scheme is not None:
            return self.cpu_memory()
        weights = sum(c.nbytes for c in weight_components(self.config, self.dtype))
        return self._beside(weights, DEVICE_RESERVE, ITEM_BYTES[self.dtype])

    def cpu_memory(self, kernels: bool = False) -> Memory:
        """Of a process that runs the export on ONNX Runtime's CPU provider, after a prefill of all `context` tokens.

        With `kernels`, in the library of CPU kernels, which runs float32 graphs; else as function bodies.
        """
        kernels = kernels and self.dtype == "float32"
        weights = self.cpu_weights(kernels)
        process = PROCESS_BYTES_WITH_KERNELS if kernels else PROCESS_BYTES
        return self._beside(
            weights.packed + weights.mapped,
            process + (TOKENWISE_BYTES if kernels and self.scheme is not None else 0),
            ITEM_BYTES["float32"],
            "kernel" if kernels else "tiled",
        )

    def cpu_weights(self, kernels: bool = False) -> CpuWeights:
        """The part of `cpu_memory` that is weights."""
        kernels = kernels and self.dtype == "float32"
        return cpu_weights(self.config, self.dtype, self.scheme, self.batch * self.context, kernels)

    def _beside(self, weights: int, reserve: int, item: int, attention: Attention = "whole") -> Memory:
        tokens = min(self.chunk, self.context)
        return Memory(
            weights,
            STATE_BUFFERS * self.batch * kda_state_bytes(self.config, self.dtype),
            self.batch * self.context * latent_bytes_per_token(self.config, self.dtype),
            activation_bytes(self.config, self.batch, tokens, self.context, item, attention),
            reserve,
        )

    def longest_context(self, available: int) -> int:
        """Tokens per sequence that fit into `available` bytes, never more than the model was made for."""
        return self._largest("context", self.config.max_position_embeddings, available)

    def largest_batch(self, available: int) -> int:
        """Sequences that fit into `available` bytes."""
        return self._largest("batch", MOST_SEQUENCES, available)

    def _largest(self, field: Literal["context", "batch"], most: int, available: int) -> int:
        """The largest value of `field`, up to `most`, that fits; 0 where not even 1 does."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            changed = replace(self, context=middle) if field == "context" else replace(self, batch=middle)
            low, high = (middle, high) if changed.memory().total <= available else (low, middle - 1)
        return low


def make_plan(
    request: Request,
    model: str,
    *,
    gpu: Gpu | None = None,
    memory: int | None = None,
    bandwidth: int | None = None,
) -> Plan:
    """The plan of a request; `memory` and `bandwidth` override the GPU's.

    Raises UsageError for a quantisation that does not fit the model.
    """
    config, dtype, context, batch = request.config, request.dtype, request.context, request.batch
    if request.scheme is not None:
        request = replace(request, scheme=settled(request.scheme, config, dtype))
    components = weight_components(config, dtype, request.scheme)
    kda, latent = kda_state_bytes(config, dtype), latent_bytes_per_token(config, dtype)
    available = memory if memory is not None else gpu.memory if gpu else None
    speed = bandwidth if bandwidth is not None else gpu.bandwidth if gpu else None
    traffic = decode_traffic(config, dtype, {c.name: c.nbytes for c in components}, batch, context)
    full_mla = full_mla_bytes_per_token(config, dtype)
    return Plan(
        model=model,
        dtype=dtype,
        quantization=request.scheme.text if request.scheme else None,
        context=context,
        batch=batch,
        chunk=request.chunk,
        components=components,
        memory=request.memory(),
        kda_state_per_sequence=kda,
        latent_per_token=latent,
        full_mla_per_token=full_mla,
        full_mha_per_token=full_mha_bytes_per_token(config, dtype),
        saved=1 - (kda + latent * context) / (full_mla * context),
        break_even=break_even_tokens(config, dtype),
        device=gpu.name if gpu else None,
        device_memory=available,
        longest_context=None if available is None else request.longest_context(available),
        largest_batch=None if available is None else request.largest_batch(available),
        traffic=traffic,
        bandwidth=speed,
        tokens_per_second=None if speed is None else traffic.tokens_per_second(batch, speed),
        cpu_resident=request.cpu_memory().total,
        cpu_weights=request.cpu_weights(),
        cpu_resident_with_kernels=request.cpu_memory(kernels=True).total,
        cpu_weights_with_kernels=request.cpu_weights(kernels=True),
        export_resident=export_resident_bytes(config, dtype, request.scheme),
        export_disk=sum(c.nbytes for c in components) + GRAPH_BYTES,
    )


def export_resident_bytes(config: KimiLinearConfig, dtype: Dtype, scheme: Scheme | None = None) -> int:
    """Most resident memory of `kimi-deploy export`: the process, and the largest piece or all pieces in flight.

    The head is one piece, for it is transposed, unless it is quantised.
    """
    whole = not config.tie_word_embeddings and not (scheme and scheme.head)
    head = config.vocab_size * config.hidden_size * ITEM_BYTES[dtype] if whole else 0
    return EXPORT_PROCESS_BYTES + max(IN_FLIGHT_BYTES, head + 4 * PART_BYTES)
