"""Hyperparameters of Llama 4's text model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

from torchtitan.config import JobConfig
from torchtitan.models.common.decoder_args import DecoderArgs
from torchtitan.models.common.divisibility import require_whole_experts
from torchtitan.models.common.hf_config import HuggingFaceConfig, hf_fields
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.ranges import NonNegativeFloat, RopeTheta, Size
from torchtitan.models.common.rope import RopeScaling
from torchtitan.models.common.scaled_rope import scaling_from_hf, scaling_to_hf

MOE = MoEArgs(
    num_experts=16,
    top_k=1,
    hidden_dim=8192,
    num_shared_experts=1,
    score_func="sigmoid",
    normalize_weights=False,
    weight_inputs=True,
)


@dataclass
class Llama4ModelArgs(DecoderArgs):
    """Sizes and choices; the defaults are those of Scout, 109B-A17B, before long contexts."""

    dim: Size = 5120
    n_layers: Size = 48
    n_heads: Size = 40
    n_kv_heads: Size = 8
    """Key and value heads; each serves `n_heads / n_kv_heads` query heads."""
    head_dim: Size = 128
    """Features of a head."""
    ffn_dim: Size = 16384
    """Hidden features of the feed-forward layers of layers without experts."""
    moe: MoEArgs = field(default_factory=lambda: MOE)
    moe_interval: Size = 1
    """Layers whose number, counted from 1, is a multiple of this have experts."""
    nope_interval: Size = 4
    """Layers whose number, counted from 1, is a multiple of this have no positions."""
    chunk: Size = 8192
    """Number of tokens within which layers with positions attend."""
    qk_norm: bool = True
    """Divide rotated queries and keys by their root mean square."""
    temperature_floor: Size = 8192
    """In layers without positions, queries grow at multiples of this many tokens."""
    temperature_scale: NonNegativeFloat = 0.1
    """Amount by which they grow; 0: not at all."""
    vocab_size: Size = 202048
    rope_theta: RopeTheta = 500000.0
    rope_scaling: RopeScaling | None = None
    """For contexts longer than those trained on; None: no scaling."""

    @property
    def num_experts(self) -> int:
        return self.moe.num_experts

    def has_experts(self, layer: int) -> bool:
        """Return whether this layer, counted from 0, is a mixture of experts."""
        return (layer + 1) % self.moe_interval == 0

    def has_positions(self, layer: int) -> bool:
        """Return whether this layer, counted from 0, rotates, and attends in chunks."""
        return (layer + 1) % self.nope_interval != 0

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        """Count as Llama 3 does; of experts, only those that a token uses cost FLOPs.

        In a chunk, a query sees `min(seq_len, chunk)` keys.
        """
        layers = range(self.n_layers)
        q_dim, kv_dim = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = 2 * self.dim * q_dim + 2 * self.dim * kv_dim
        held, used = self.moe.count_parameters(self.dim)
        dense, n_moe = 3 * self.dim * self.ffn_dim, sum(map(self.has_experts, layers))
        vocabulary = self.vocab_size * self.dim
        embeddings = vocabulary if self.tie_word_embeddings else 2 * vocabulary

        everywhere = self.n_layers * attention + (self.n_layers - n_moe) * dense
        norms = (2 * self.n_layers + 1) * self.dim
        nparams = everywhere + n_moe * held + norms + embeddings
        matrices = everywhere + n_moe * used + vocabulary
        chunked = sum(map(self.has_positions, layers))
        keys = chunked * min(seq_len, self.chunk) + (self.n_layers - chunked) * seq_len
        return nparams, 6 * matrices + 12 * q_dim * keys

    def to_hf_config(self) -> dict[str, Any]:
        """Return the `config.json` of `Llama4ForCausalLM` for these args; see `BaseModelArgs`."""
        layers = range(self.n_layers)
        positions = [self.has_positions(layer) for layer in layers]
        return hf_fields(self, "llama4_text", "Llama4ForCausalLM") | {
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.moe.hidden_dim,
            "intermediate_size_mlp": self.ffn_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "use_qk_norm": self.qk_norm,
            "attention_chunk_size": self.chunk,
            "no_rope_layer_interval": self.nope_interval,
            "no_rope_layers": [int(has) for has in positions],
            "layer_types": ["chunked_attention" if p else "full_attention" for p in positions],
            "attn_temperature_tuning": self.temperature_scale != 0,
            "attn_scale": self.temperature_scale or 0.1,
            "floor_scale": self.temperature_floor,
            "num_local_experts": self.moe.num_experts,
            "num_experts_per_tok": self.moe.top_k,
            "interleave_moe_layer_step": self.moe_interval,
            "moe_layers": [layer for layer in layers if self.has_experts(layer)],
            "rope_scaling": scaling_to_hf(self.rope_scaling),
        }

    def update_from_config(self, job_config: JobConfig) -> Self:
        require_whole_experts(job_config, "their gate and input matrices are fused")
        return super().update_from_config(job_config)

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Self:
        """Return the args for a `config.json` (`Llama4ForCausalLM`)."""
        with HuggingFaceConfig(config, "llama4_text") as hf:
            hf.require("hidden_act", "silu")
            hf.require("attention_bias", False)
            decoder = hf.take_decoder()
            hf.require("router_jitter_noise", 0.0)
            hf.require("for_llm_compressor", False)
            tuned = bool(config.get("attn_temperature_tuning", True))
            hf.require("attn_temperature_tuning", True, False, 4)  # 4: in Meta's first files
            scale = hf.take("attn_scale", kind=NonNegativeFloat, default=0.1)
            rope_theta, rope_scaling = hf.take_rope()
            args = cls(
                **decoder,
                n_kv_heads=hf.take("num_key_value_heads", kind=Size),
                head_dim=hf.take("head_dim", kind=Size),
                ffn_dim=hf.take("intermediate_size_mlp", kind=Size),
                moe=replace(
                    MOE,
                    num_experts=hf.take("num_local_experts", kind=Size),
                    top_k=hf.take("num_experts_per_tok", kind=Size),
                    hidden_dim=hf.take("intermediate_size", kind=Size),
                ),
                moe_interval=hf.take("interleave_moe_layer_step", kind=Size),
                nope_interval=hf.take("no_rope_layer_interval", kind=Size, default=4),
                chunk=hf.take("attention_chunk_size", kind=Size),
                qk_norm=hf.take("use_qk_norm", kind=bool, default=True),
                temperature_floor=hf.take("floor_scale", kind=Size, default=8192),
                temperature_scale=scale if tuned else 0.0,
                rope_theta=rope_theta,
                rope_scaling=scaling_from_hf(rope_scaling, RopeScaling),
            )
            # These lists repeat the intervals.
            positions = [args.has_positions(layer) for layer in range(args.n_layers)]
            kinds = ["chunked_attention" if has else "full_attention" for has in positions]
            hf.require("no_rope_layers", [int(has) for has in positions], [], None)
            hf.require("layer_types", kinds, None)
            hf.require("moe_layers", list(filter(args.has_experts, range(args.n_layers))), None)
            return args
