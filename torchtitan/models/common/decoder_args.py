"""The hyperparameters that all decoders have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torchtitan.config import JobConfig
from torchtitan.protocols.model import BaseModelArgs

from .attention import AttentionKernel
from .divisibility import require_divisible_by_tp, require_heads_divisible_by_cp, require_sizes
from .ranges import NonNegativeFloat, RopeTheta, Size


@dataclass
class DecoderArgs(BaseModelArgs):
    """Hyperparameters of a `Decoder`. A model gives the sizes, and redefines other defaults."""

    dim: Size
    """Features of the hidden states."""
    n_layers: Size
    n_heads: Size
    """Query heads."""
    vocab_size: Size
    norm_eps: NonNegativeFloat = 1e-5
    rope_theta: RopeTheta = 10000.0
    """Base of the rotation frequencies."""
    tie_word_embeddings: bool = False
    """The output layer shares the embedding's weight."""
    attention: AttentionKernel = "auto"
    """Attention kernel, see `model.attention`."""

    def __post_init__(self) -> None:
        kv_heads = getattr(self, "n_kv_heads", self.n_heads)
        if self.n_heads % kv_heads:
            raise ValueError(f"n_kv_heads ({kv_heads}) must divide n_heads ({self.n_heads})")

    @property
    def rotated_dim(self) -> int:
        """Features of a head that rotary positions turn."""
        return getattr(self, "head_dim", self.dim // self.n_heads)

    def split_by_tp(self) -> dict[str, int]:
        """Return name -> value of the sizes that tensor parallelism divides."""
        names = ("n_heads", "vocab_size", "n_kv_heads", "ffn_dim")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def update_from_config(self, job_config: JobConfig) -> Self:
        """Return a copy with the attention kernel that the job asks for.

        Raises:
            ConfigError: a size is impossible, or the heads or matrices do not divide over the ranks
                that share them.
        """
        sizes = {"dim": self.dim, "n_layers": self.n_layers}
        if hasattr(self, "head_dim"):
            sizes["head_dim"] = self.head_dim
        require_sizes(job_config, self.rotated_dim, **sizes, **self.split_by_tp())
        require_divisible_by_tp(job_config, **self.split_by_tp())
        require_heads_divisible_by_cp(job_config, self.n_heads)
        return replace(self, attention=job_config.model.attention)
