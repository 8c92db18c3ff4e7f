"""Hyperparameters of Llama 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torchtitan.models.common.decoder_args import DecoderArgs
from torchtitan.models.common.hf_config import HuggingFaceConfig, hf_fields
from torchtitan.models.common.ranges import RopeTheta, Size
from torchtitan.models.common.scaled_rope import AnyScaling, scaling_from_hf, scaling_to_hf


@dataclass
class Llama3ModelArgs(DecoderArgs):
    """Sizes and choices; the defaults are those of Llama 3 8B."""

    dim: Size = 4096
    n_layers: Size = 32
    n_heads: Size = 32
    """Query heads, of `dim / n_heads` features each."""
    n_kv_heads: Size = 8
    """Key and value heads; each serves `n_heads / n_kv_heads` query heads."""
    ffn_dim: Size = 14336
    """Hidden features of the feed-forward layer."""
    vocab_size: Size = 128256
    rope_theta: RopeTheta = 500000.0
    rope_scaling: AnyScaling | None = None
    """For contexts longer than those trained on, as in Llama 3.1 and later; None: no scaling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must divide dim ({self.dim})")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        """Return the exact number of parameters, and FLOPs per token, forward and backward.

        FLOPs are those of matrix products. A weight costs 6 per token: a multiplication and an
        addition in the forward pass, twice that in the backward pass. The embedding is a look-up
        and costs nothing; the output layer counts, tied or not. Attention over `seq_len` tokens
        counts in full, though a causal kernel skips half of it: the convention of PaLM
        (arXiv:2204.02311, appendix B) for MFU.
        """
        kv_dim = self.n_kv_heads * self.head_dim
        attention = 2 * self.dim * self.dim + 2 * self.dim * kv_dim
        matrices = self.n_layers * (attention + 3 * self.dim * self.ffn_dim)
        norms = (2 * self.n_layers + 1) * self.dim
        vocabulary = self.vocab_size * self.dim
        embeddings = vocabulary if self.tie_word_embeddings else 2 * vocabulary

        flops = 6 * (matrices + vocabulary) + 12 * self.n_layers * self.dim * seq_len
        return matrices + norms + embeddings, flops

    def to_hf_config(self) -> dict[str, Any]:
        """Return the `config.json` of `LlamaForCausalLM` for these args; see `BaseModelArgs`."""
        return hf_fields(self, "llama", "LlamaForCausalLM") | {
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": scaling_to_hf(self.rope_scaling),
        }

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Self:
        """Return the args for a `config.json` (`LlamaForCausalLM`: Llama 3, SmolLM2, ...).

        Raises:
            CheckpointError: a field is missing, unknown, or has a value that is not supported.
        """
        with HuggingFaceConfig(config, "llama") as hf:
            hf.require("hidden_act", "silu")
            hf.require("attention_bias", False)
            decoder = hf.take_decoder()
            hf.require("mlp_bias", False)
            hf.require("rope_interleaved", False)
            hf.ignore("pretraining_tp", "is_llama_config")
            hf.require("head_dim", decoder["dim"] // decoder["n_heads"], None)
            rope_theta, rope_scaling = hf.take_rope()
            return cls(
                **decoder,
                n_kv_heads=hf.take("num_key_value_heads", kind=Size, default=decoder["n_heads"]),
                ffn_dim=hf.take("intermediate_size", kind=Size),
                rope_theta=rope_theta,
                rope_scaling=scaling_from_hf(rope_scaling),
            )
