"""Upper bounds of decode speed: a step reads what it needs once, and nothing is faster than the memory."""

from __future__ import annotations

from dataclasses import dataclass

from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.contract import Dtype
from kimi_deploy.plan.memory import kda_state_bytes, latent_bytes_per_token


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that one decode step moves: weights read, KDA states read and written, latent cache read."""

    weights: int
    kda_states: int
    latent_cache: int

    @property
    def total(self) -> int:
        return self.weights + self.kda_states + self.latent_cache

    def tokens_per_second(self, batch: int, bandwidth: float) -> float:
        """The bound for `batch` rows at `bandwidth` bytes per second."""
        return batch * bandwidth / self.total


def expected_experts(config: KimiLinearConfig, batch: int) -> float:
    """How many experts of a layer `batch` tokens choose together, were every choice equally likely."""
    return config.num_experts * (1 - (1 - config.num_experts_per_token / config.num_experts) ** batch)


def decode_traffic(
    config: KimiLinearConfig, dtype: Dtype, components: dict[str, int], batch: int, context: int
) -> StepTraffic:
    """One step of `batch` rows with `context` tokens cached each; `components` are bytes of weights by component.

    Of the embeddings a step reads one row per token; of the experts those that are chosen, each once.
    """
    weights = sum(nbytes for name, nbytes in components.items() if name not in ("embeddings", "experts"))
    weights += batch * components["embeddings"] // config.vocab_size
    if components["experts"]:
        weights += round(components["experts"] * expected_experts(config, batch) / config.num_experts)
    if config.tie_word_embeddings:
        weights += components["embeddings"]  # as the head
    return StepTraffic(
        weights,
        2 * batch * kda_state_bytes(config, dtype),
        batch * context * latent_bytes_per_token(config, dtype),
    )
