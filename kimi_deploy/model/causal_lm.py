"""The source model: Kimi Linear with its state as an argument and a result."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from kimi_deploy.checkpoint import Checkpoint
from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.contract import Dtype, state_table
from kimi_deploy.errors import ContractError
from kimi_deploy.model.layers import DecoderLayer, RMSNorm, State


class KimiLinearForCausalLM(nn.Module):
    """`logits, state = model(input_ids, state, sequence_lengths=None)`.

    Parameters have the names, shapes and layouts of `kimi_deploy.weights.weight_table(config)`; they are of `dtype`
    but for A_log, dt_bias and the router bias, which stay float32. Linear and embedding weights are torch's
    defaults, all others zeros or ones, until loaded or initialised.
    """

    def __init__(
        self, config: KimiLinearConfig, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self._states = {f"{s.layer}.{s.kind}" for s in state_table(config, "float32")} | {"lengths"}
        with torch.device(device) if device is not None else torch.device(torch.get_default_device()):
            self.model = _Decoder(config, dtype)
            self.lm_head = (
                None
                if config.tie_word_embeddings
                else nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        state: State,
        sequence_lengths: torch.Tensor | None = None,
        *,
        logits_indices: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        """Consume input_ids [batch, sequence] int64, right-padded; the state given is left as it is.

        `state` maps "{layer}.{kind}" to the tensors of `contract.state_table`, and "lengths" to int32 [batch], the
        tokens consumed so far; sequence_lengths int32 [batch] are the valid steps (None: all). Returns float32
        logits [batch, num_logits, vocab] of the steps logits_indices int64 [batch, num_logits] (None: every step) and
        the new state. Raises ContractError when the state is of another model, a tensor does not fit its op, or a
        latent cache is full.
        """
        if state.keys() != self._states:
            raise ContractError(
                "the state is not one of this model",
                seen=f"missing or unknown: {sorted(state.keys() ^ self._states)}",
                expected=f"{len(self._states)} tensors, one per state and their lengths",
                fix="start from new_state",
            )
        if sequence_lengths is None:
            sequence_lengths = torch.full_like(state["lengths"], input_ids.shape[1])
        present: State = {"lengths": state["lengths"] + sequence_lengths}
        x = self.model(input_ids, state, sequence_lengths, present)
        if logits_indices is not None:
            x = x.gather(1, logits_indices[..., None].expand(-1, -1, x.shape[-1]))
        tied = self.model.embed_tokens.weight
        logits = self.lm_head(x) if self.lm_head is not None else nn.functional.linear(x, tied)
        return logits.to(torch.promote_types(x.dtype, torch.float32)), present

    def new_state(self, batch: int, capacity: int) -> State:
        """An empty state: zeros, with room for `capacity` tokens where a layer has a latent cache."""
        weight = self.model.embed_tokens.weight
        state = {}
        # the table's dtypes are the exported ones; a float64 model, an oracle, keeps all of its state in float64
        for s in state_table(self.config, "float32"):
            dtype = torch.promote_types(weight.dtype, torch.float32) if s.kind == "recurrent_state" else weight.dtype
            state[f"{s.layer}.{s.kind}"] = torch.zeros(s.shape(batch, capacity), dtype=dtype, device=weight.device)
        return state | {"lengths": torch.zeros(batch, dtype=torch.int32, device=weight.device)}


class _Decoder(nn.Module):
    def __init__(self, config: KimiLinearConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, i, dtype) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, input_ids: torch.Tensor, past: State, lengths: torch.Tensor, present: State) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, past, lengths, present)
        return self.norm(x)


def load_model(folder: str | Path, dtype: Dtype = "float32", device: str = "cpu") -> KimiLinearForCausalLM:
    """The source model with the weights of a checkpoint folder.

    Raises ConfigError or CheckpointError as `Checkpoint` does.
    """
    checkpoint = Checkpoint.open(folder)
    resolved = checkpoint.resolve()
    model = KimiLinearForCausalLM(checkpoint.config, getattr(torch, dtype), "meta").eval()
    values = {}
    for item in resolved:
        array = checkpoint.load(item.weight.name, dtype)
        # torch cannot take numpy's extension type; the bits are the same
        tensor = (
            torch.from_numpy(array.view("int16")).view(torch.bfloat16)
            if array.dtype.name == "bfloat16"
            else torch.from_numpy(array)
        )
        values[item.weight.name] = tensor.to(device)
    model.load_state_dict(values, strict=True, assign=True)
    return model.requires_grad_(False)
