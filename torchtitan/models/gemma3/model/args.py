"""Hyperparameters of Gemma 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torchtitan.models.common.decoder_args import DecoderArgs
from torchtitan.models.common.hf_config import (
    HuggingFaceConfig,
    hf_fields,
    require_in_range,
    require_numbers,
    unsupported,
)
from torchtitan.models.common.ranges import NonNegativeFloat, PositiveFloat, RopeTheta, Size
from torchtitan.models.common.scaled_rope import LinearScaling, scaling_from_hf, scaling_to_hf


@dataclass
class Gemma3ModelArgs(DecoderArgs):
    """Sizes and choices; the defaults are those of the text model of Gemma 3 4B."""

    dim: Size = 2560
    n_layers: Size = 34
    n_heads: Size = 8
    n_kv_heads: Size = 4
    """Key and value heads; each serves `n_heads / n_kv_heads` query heads."""
    head_dim: Size = 256
    """Features of a head."""
    query_pre_attn_scalar: Size = 256
    """Scores are divided by the square root of this."""
    ffn_dim: Size = 10240
    """Hidden features of the feed-forward layer."""
    sliding_window: Size = 1024
    """Number of keys that a query sees in layers with a window, the last being its own."""
    full_attention_every: Size = 6
    """One layer in this many attends without a window."""
    vocab_size: Size = 262208
    norm_eps: NonNegativeFloat = 1e-6
    rope_theta: RopeTheta = 1000000.0
    """Base of the rotation frequencies in layers without a window."""
    rope_factor: PositiveFloat = 8.0
    """Factor by which rotations are slower in layers without a window (linear scaling)."""
    window_rope_theta: RopeTheta = 10000.0
    """Base of the rotation frequencies in layers with a window."""
    tie_word_embeddings: bool = True

    def has_window(self, layer: int) -> bool:
        """Return whether this layer, counted from 0, attends in a sliding window."""
        return (layer + 1) % self.full_attention_every != 0

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        """Count as Llama 3 does; in a window, a query sees `min(seq_len, sliding_window)` keys."""
        q_dim, kv_dim = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = 2 * self.dim * q_dim + 2 * self.dim * kv_dim
        matrices = self.n_layers * (attention + 3 * self.dim * self.ffn_dim)
        norms = (4 * self.n_layers + 1) * self.dim + 2 * self.n_layers * self.head_dim
        vocabulary = self.vocab_size * self.dim
        embeddings = vocabulary if self.tie_word_embeddings else 2 * vocabulary

        windowed = sum(self.has_window(i) for i in range(self.n_layers))
        keys = windowed * min(seq_len, self.sliding_window) + (self.n_layers - windowed) * seq_len
        return matrices + norms + embeddings, 6 * (matrices + vocabulary) + 12 * q_dim * keys

    def to_hf_config(self) -> dict[str, Any]:
        """Return the `config.json` of `Gemma3ForCausalLM` for these args; see `BaseModelArgs`."""
        scaling = None if self.rope_factor == 1.0 else LinearScaling(self.rope_factor)
        windows = [self.has_window(layer) for layer in range(self.n_layers)]
        return hf_fields(self, "gemma3_text", "Gemma3ForCausalLM") | {
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "query_pre_attn_scalar": self.query_pre_attn_scalar,
            "intermediate_size": self.ffn_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": self.sliding_window,
            "sliding_window_pattern": self.full_attention_every,
            "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
            "rope_local_base_freq": self.window_rope_theta,
            "rope_scaling": scaling_to_hf(scaling),
        }

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Self:
        """Return the args for a `config.json` (`Gemma3ForCausalLM`)."""
        with HuggingFaceConfig(config, "gemma3_text") as hf:
            hf.require("hidden_activation", "gelu_pytorch_tanh")
            hf.require("attention_bias", False)
            decoder = hf.take_decoder(tied=True)
            hf.require("attn_logit_softcapping", None)
            hf.require("final_logit_softcapping", None)
            hf.require("use_bidirectional_attention", False, None)
            hf.ignore("cache_implementation")
            rope_theta, rope_factor, window_rope_theta = _take_rope(hf)
            return cls(
                **decoder,
                n_kv_heads=hf.take("num_key_value_heads", kind=Size),
                head_dim=hf.take("head_dim", kind=Size),
                query_pre_attn_scalar=hf.take("query_pre_attn_scalar", kind=Size),
                ffn_dim=hf.take("intermediate_size", kind=Size),
                sliding_window=hf.take("sliding_window", kind=Size),
                full_attention_every=_take_pattern(hf, decoder["n_layers"]),
                rope_theta=rope_theta,
                rope_factor=rope_factor,
                window_rope_theta=window_rope_theta,
            )


def _take_pattern(hf: HuggingFaceConfig, n_layers: int) -> int:
    """Return `full_attention_every`, from the types of the layers."""
    every = hf.take("sliding_window_pattern", "_sliding_window_pattern", kind=Size, default=6)
    kinds = hf.take("layer_types", kind=list, default=None)
    if kinds is None:
        return every
    if "full_attention" in kinds:
        every = kinds.index("full_attention") + 1
    cycle = ["sliding_attention"] * (every - 1) + ["full_attention"]
    if kinds != (cycle * n_layers)[:n_layers]:
        raise unsupported("layer_types", kinds)
    return every


def _take_rope(hf: HuggingFaceConfig) -> tuple[float, float, float]:
    """Return `rope_theta`, `rope_factor` and `window_rope_theta`.

    Since transformers 5, `rope_parameters` holds the values for both kinds of layers.
    """
    both = hf.take("rope_parameters", kind=dict, default=None)
    if both is None:
        theta, scaling = hf.take_rope()
        window_theta = hf.take("rope_local_base_freq", kind=RopeTheta)
    else:
        full, window = (dict(both.get(f"{kind}_attention", {})) for kind in ("full", "sliding"))
        theta, window_theta = full.pop("rope_theta", None), window.pop("rope_theta", None)
        scaling = None if full == {"rope_type": "default"} else full
        kinds = {"full_attention", "sliding_attention"}
        if both.keys() != kinds or window != {"rope_type": "default"} or not theta:
            raise unsupported("rope_parameters", both)
        bases = {"rope_theta": theta, "rope_theta of windows": window_theta}
        require_numbers("rope_parameters", bases, *bases)
        for name, base in bases.items():
            require_in_range(f"rope_parameters: {name}", base, RopeTheta)
    linear = scaling_from_hf(scaling, LinearScaling)
    return float(theta), float(linear.factor if linear else 1), float(window_theta)
