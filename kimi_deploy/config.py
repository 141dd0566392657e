"""The model's configuration: Hugging Face `config.json` parsed once into a frozen dataclass.

Both spellings in circulation are read: the one Moonshot released and the one transformers 5.23 writes
(`attribute_map` of its `KimiLinearConfig`). Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kimi_deploy.errors import ConfigError
from kimi_deploy.folder_kind import CONFIG_NAME, MANIFEST_NAME, no_model
from kimi_deploy.model_folder import file_in_folder, require_folder
from kimi_deploy.strict_json import read_json_object

LayerType = Literal["linear_attention", "full_attention"]
MlpType = Literal["dense", "sparse"]
Gate = Literal["softplus", "bounded"]

# RMSNorm of the latent and of the low-rank query keep the module default of transformers, not rms_norm_eps.
LATENT_NORM_EPS = 1e-6

_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class KimiLinearConfig:
    """One Kimi Linear model: every size that a weight, a state or an op depends on.

    Layer indices are 0-based everywhere in this package; only the released `linear_attn_config` lists are
    1-based, and they are converted here. `gate` is "bounded" when the config names a `gate_lower_bound`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    layer_types: tuple[LayerType, ...]
    mlp_types: tuple[MlpType, ...]
    # Kimi Delta Attention
    linear_num_heads: int
    linear_head_dim: int
    linear_conv_kernel: int
    gate: Gate
    gate_lower_bound: float
    # multi-head latent attention
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    # mixture of experts
    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    moe_intermediate_size: int
    num_expert_group: int
    topk_group: int
    renormalize: bool
    routed_scaling_factor: float
    # tokens
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str

    @property
    def linear_dim(self) -> int:
        """Width of one of KDA's q, k, v: heads times head size."""
        return self.linear_num_heads * self.linear_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Width of one MLA query head: the part without position and the part RoPE would turn."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one cached MLA token: compressed key-value and the shared key part."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_kda(self, layer: int) -> bool:
        """Whether the token mixer of 0-based `layer` is KDA."""
        return self.layer_types[layer] == "linear_attention"

    def is_moe(self, layer: int) -> bool:
        """Whether the MLP of 0-based `layer` is a mixture of experts."""
        return self.mlp_types[layer] == "sparse"

    def to_released_dict(self) -> dict[str, Any]:
        """`config.json` in the released spelling; `from_dict` reads it back to an equal config."""
        linear: dict[str, Any] = {
            "full_attn_layers": [i + 1 for i, t in enumerate(self.layer_types) if t == "full_attention"],
            "kda_layers": [i + 1 for i, t in enumerate(self.layer_types) if t == "linear_attention"],
            "head_dim": self.linear_head_dim,
            "num_heads": self.linear_num_heads,
            "short_conv_kernel_size": self.linear_conv_kernel,
        }
        if self.gate == "bounded":
            linear["gate_lower_bound"] = self.gate_lower_bound
        dense = [i for i, t in enumerate(self.mlp_types) if t == "dense"]
        regular = dense == list(range(len(dense)))
        result: dict[str, Any] = {
            "architectures": ["KimiLinearForCausalLM"],
            "model_type": "kimi_linear",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "kv_lora_rank": self.kv_lora_rank,
            "q_lora_rank": self.q_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "mla_use_nope": True,
            "linear_attn_config": linear,
            "first_k_dense_replace": len(dense) if regular else 0,
            "moe_layer_freq": 1,
            "num_experts": self.num_experts,
            "num_experts_per_token": self.num_experts_per_token,
            "num_shared_experts": self.num_shared_experts,
            "moe_intermediate_size": self.moe_intermediate_size,
            "moe_renormalize": self.renormalize,
            "moe_router_activation_func": "sigmoid",
            "num_expert_group": self.num_expert_group,
            "topk_group": self.topk_group,
            "use_grouped_topk": True,
            "routed_scaling_factor": self.routed_scaling_factor,
            "num_nextn_predict_layers": 0,
            "rms_norm_eps": self.rms_norm_eps,
            "model_max_length": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) if len(self.eos_token_ids) != 1 else self.eos_token_ids[0],
            "pad_token_id": self.pad_token_id,
            "dtype": self.dtype,
        }
        if not regular:
            result["mlp_layer_types"] = list(self.mlp_types)
        return result

    @classmethod
    def from_folder(cls, folder: str | Path) -> KimiLinearConfig:
        """Read `folder/config.json`.

        Raises UsageError when there is no such folder, WrongArtefactError when no model is in it, ConfigError when the
        file alone is missing, is not a JSON object, or `from_dict` refuses it, and CheckpointError when it is a link
        out of the folder.
        """
        folder = Path(folder)
        try:
            path = file_in_folder(folder, CONFIG_NAME)
        except FileNotFoundError:
            if (folder / MANIFEST_NAME).is_file():
                raise ConfigError(
                    "no config.json in the folder",
                    seen=str(folder),
                    fix="copy the whole folder again, or make it again",
                ) from None
            expected = "a checkpoint folder with config.json and safetensors files"
            require_folder(folder, expected)
            raise no_model(folder, expected, "give the folder of a Kimi Linear checkpoint", ("checkpoint",)) from None
        return cls.from_dict(read_json_object(path, _MAX_BYTES, ConfigError))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> KimiLinearConfig:
        """Parse a `config.json` object in either spelling.

        Raises ConfigError for a model this toolkit does not run, a missing, contradictory, non-finite or
        out-of-range value, and layer lists that do not cover every layer exactly once.
        """
        from kimi_deploy.config_parser import ConfigParser

        return ConfigParser(raw).parse()
