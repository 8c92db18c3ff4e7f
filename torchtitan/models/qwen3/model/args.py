"""Hyperparameters of Qwen3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torchtitan.config import JobConfig
from torchtitan.models.common.decoder_args import DecoderArgs
from torchtitan.models.common.divisibility import require_splittable_experts
from torchtitan.models.common.hf_config import HuggingFaceConfig, hf_fields
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.ranges import NonNegativeFloat, RopeTheta, Size
from torchtitan.models.common.scaled_rope import AnyScaling, scaling_from_hf, scaling_to_hf


@dataclass
class Qwen3ModelArgs(DecoderArgs):
    """Sizes and choices; the defaults are those of Qwen3 8B."""

    dim: Size = 4096
    n_layers: Size = 36
    n_heads: Size = 32
    n_kv_heads: Size = 8
    """Key and value heads; each serves `n_heads / n_kv_heads` query heads."""
    head_dim: Size = 128
    """Features of a head."""
    ffn_dim: Size = 12288
    """Hidden features of the feed-forward layers of a dense model."""
    moe: MoEArgs | None = None
    """A mixture of experts in place of each feed-forward layer; None: a dense model."""
    vocab_size: Size = 151936
    norm_eps: NonNegativeFloat = 1e-6
    rope_theta: RopeTheta = 1000000.0
    rope_scaling: AnyScaling | None = None
    """For contexts longer than those trained on (32,768 tokens); None: no scaling."""

    @property
    def num_experts(self) -> int:
        return self.moe.num_experts if self.moe else 0

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        """Count as Llama 3 does; of experts, only those that a token uses cost FLOPs."""
        q_dim, kv_dim = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = 2 * self.dim * q_dim + 2 * self.dim * kv_dim
        dense = 3 * self.dim * self.ffn_dim
        held, used = self.moe.count_parameters(self.dim) if self.moe else (dense, dense)
        norms = (2 * self.n_layers + 1) * self.dim + 2 * self.n_layers * self.head_dim
        vocabulary = self.vocab_size * self.dim
        embeddings = vocabulary if self.tie_word_embeddings else 2 * vocabulary

        nparams = self.n_layers * (attention + held) + norms + embeddings
        matrices = self.n_layers * (attention + used) + vocabulary
        return nparams, 6 * matrices + 12 * self.n_layers * q_dim * seq_len

    def to_hf_config(self) -> dict[str, Any]:
        """Return the `config.json` of `Qwen3ForCausalLM` or of `Qwen3MoeForCausalLM`."""
        kind = ("qwen3_moe", "Qwen3MoeForCausalLM") if self.moe else ("qwen3", "Qwen3ForCausalLM")
        fields = hf_fields(self, *kind) | {
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_scaling": scaling_to_hf(self.rope_scaling),
            "use_sliding_window": False,
        }
        if self.moe:
            fields |= {
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "num_experts": self.moe.num_experts,
                "num_experts_per_tok": self.moe.top_k,
                "moe_intermediate_size": self.moe.hidden_dim,
                "norm_topk_prob": self.moe.normalize_weights,
            }
        return fields

    def split_by_tp(self) -> dict[str, int]:
        sizes = super().split_by_tp()
        if self.moe:
            del sizes["ffn_dim"]  # used by no layer
        return sizes

    def update_from_config(self, job_config: JobConfig) -> Self:
        if self.moe:
            require_splittable_experts(job_config, self.moe.hidden_dim)
        return super().update_from_config(job_config)

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Self:
        """Return the args for a `config.json` (`Qwen3ForCausalLM`, `Qwen3MoeForCausalLM`)."""
        with HuggingFaceConfig(config, "qwen3", "qwen3_moe") as hf:
            hf.require("hidden_act", "silu")
            hf.require("attention_bias", False)
            decoder = hf.take_decoder()
            hf.require("use_sliding_window", False)
            hf.ignore("sliding_window", "max_window_layers")
            hf.require("layer_types", ["full_attention"] * decoder["n_layers"])
            rope_theta, rope_scaling = hf.take_rope()
            return cls(
                **decoder,
                n_kv_heads=hf.take("num_key_value_heads", kind=Size),
                head_dim=hf.take("head_dim", kind=Size),
                ffn_dim=hf.take("intermediate_size", kind=Size),
                moe=_moe_from_hf(hf) if hf.model_type == "qwen3_moe" else None,
                rope_theta=rope_theta,
                rope_scaling=scaling_from_hf(rope_scaling),
            )


def _moe_from_hf(hf: HuggingFaceConfig) -> MoEArgs:
    hf.require("decoder_sparse_step", 1)
    hf.require("mlp_only_layers", [], None)
    return MoEArgs(
        num_experts=hf.take("num_experts", "num_local_experts", kind=Size),
        top_k=hf.take("num_experts_per_tok", kind=Size),
        hidden_dim=hf.take("moe_intermediate_size", kind=Size),
        normalize_weights=hf.take("norm_topk_prob", kind=bool, default=False),
    )
