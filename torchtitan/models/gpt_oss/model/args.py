"""Hyperparameters of gpt-oss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from torchtitan.config import JobConfig
from torchtitan.models.common.decoder_args import DecoderArgs
from torchtitan.models.common.divisibility import require_whole_experts
from torchtitan.models.common.hf_config import HuggingFaceConfig, hf_fields, unsupported
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.ranges import PositiveFloat, RopeTheta, Size
from torchtitan.models.common.scaled_rope import scaling_from_hf, scaling_to_hf
from torchtitan.models.common.yarn import YarnScaling

from .experts import ALPHA

YARN = YarnScaling(factor=32.0, original_max_seq_len=4096, truncate=False)


@dataclass
class GptOssModelArgs(DecoderArgs):
    """Sizes and choices; the defaults are those of gpt-oss-20b."""

    dim: Size = 2880
    n_layers: Size = 24
    n_heads: Size = 64
    n_kv_heads: Size = 8
    """Key and value heads; each serves `n_heads / n_kv_heads` query heads."""
    head_dim: Size = 64
    """Features of a head."""
    sliding_window: Size = 128
    """Number of keys that a query sees in the layers 0, 2, 4, ..., the last being its own."""
    moe: MoEArgs = field(
        default_factory=lambda: MoEArgs(num_experts=32, top_k=4, hidden_dim=2880, gate_bias=True)
    )
    swiglu_limit: PositiveFloat = 7.0
    """Bound of an expert's hidden features."""
    vocab_size: Size = 201088
    rope_theta: RopeTheta = 150000.0
    rope_scaling: YarnScaling = YARN

    @property
    def num_experts(self) -> int:
        return self.moe.num_experts

    def has_window(self, layer: int) -> bool:
        """Return whether this layer, counted from 0, attends in a sliding window."""
        return layer % 2 == 0

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        """Count as Llama 3 does; of experts, only those that a token uses cost FLOPs.

        In a window, a query sees `min(seq_len, sliding_window)` keys.
        """
        q_dim, kv_dim = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = 2 * self.dim * q_dim + 2 * self.dim * kv_dim
        held, used = self.moe.count_parameters(self.dim)
        vocabulary = self.vocab_size * self.dim
        embeddings = vocabulary if self.tie_word_embeddings else 2 * vocabulary

        biases = q_dim + 2 * kv_dim + self.dim  # of attention
        biases += self.num_experts * (2 * self.moe.hidden_dim + self.dim)
        vectors = biases + self.n_heads + 2 * self.dim  # with sinks and norms
        nparams = self.n_layers * (attention + held + vectors) + self.dim + embeddings

        matrices = self.n_layers * (attention + used) + vocabulary
        windowed = sum(self.has_window(i) for i in range(self.n_layers))
        keys = windowed * min(seq_len, self.sliding_window) + (self.n_layers - windowed) * seq_len
        return nparams, 6 * matrices + 12 * q_dim * keys

    def to_hf_config(self) -> dict[str, Any]:
        """Return the `config.json` of `GptOssForCausalLM` for these args; see `BaseModelArgs`."""
        windows = [self.has_window(layer) for layer in range(self.n_layers)]
        return hf_fields(self, "gpt_oss", "GptOssForCausalLM") | {
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.moe.hidden_dim,
            "hidden_act": "silu",
            "attention_bias": True,
            "sliding_window": self.sliding_window,
            "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
            "num_local_experts": self.moe.num_experts,
            "num_experts_per_tok": self.moe.top_k,
            "swiglu_limit": self.swiglu_limit,
            "rope_scaling": scaling_to_hf(self.rope_scaling),
        }

    def update_from_config(self, job_config: JobConfig) -> Self:
        require_whole_experts(job_config, "each rank that shares one would add its output biases")
        return super().update_from_config(job_config)

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Self:
        """Return the args for a `config.json` (`GptOssForCausalLM`)."""
        with HuggingFaceConfig(config, "gpt_oss") as hf:
            hf.require("hidden_act", "silu")
            hf.require("attention_bias", True)
            decoder = hf.take_decoder()
            hf.require("swiglu_alpha", ALPHA)
            hf.ignore("initial_context_length", "experts_per_token")  # repeated by other fields
            alternating = ["sliding_attention", "full_attention"] * decoder["n_layers"]
            hf.require("layer_types", alternating[: decoder["n_layers"]])
            rope_theta, rope_scaling = hf.take_rope()
            if rope_scaling is None:
                raise unsupported("rope_scaling", None)
            return cls(
                **decoder,
                n_kv_heads=hf.take("num_key_value_heads", kind=Size),
                head_dim=hf.take("head_dim", kind=Size),
                sliding_window=hf.take("sliding_window", kind=Size),
                moe=MoEArgs(
                    num_experts=hf.take("num_local_experts", kind=Size),
                    top_k=hf.take("num_experts_per_tok", kind=Size),
                    hidden_dim=hf.take("intermediate_size", kind=Size),
                    gate_bias=True,
                ),
                swiglu_limit=hf.take("swiglu_limit", kind=PositiveFloat, default=7.0),
                rope_theta=rope_theta,
                rope_scaling=scaling_from_hf(rope_scaling, YarnScaling),
            )
