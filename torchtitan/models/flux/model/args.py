"""Hyperparameters of FLUX.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torchtitan.config import JobConfig
from torchtitan.config.load import fail
from torchtitan.models.common.divisibility import (
    require_divisible_by_tp,
    require_heads_divisible_by_cp,
    require_sizes,
)
from torchtitan.models.common.hf_config import HuggingFaceConfig, require_in_range
from torchtitan.models.common.ranges import Count, Size
from torchtitan.protocols.model import BaseModelArgs

TIME_FEATURES = 256
"""Sines and cosines that describe a time."""


@dataclass
class FluxModelArgs(BaseModelArgs):
    """Sizes and choices; the defaults are those of FLUX.1 [schnell], except `text_len`."""

    n_double_layers: Count = 19
    """Blocks in which text and image have weights of their own. They come first."""
    n_single_layers: Count = 38
    """Blocks with the same weights for both."""
    n_heads: Size = 24
    axes_dim: tuple[Size, Size, Size] = (16, 56, 56)
    """Features of a head that are rotated by each coordinate: one unused, the row, the column."""
    channels: Size = 64
    """Numbers of a patch: 2 x 2 places of a latent image of 16 channels."""
    text_dim: Size = 4096
    """Features of a token's T5 state."""
    pooled_dim: Size = 768
    """Features of the CLIP vector of a whole caption."""
    guidance: bool = False
    """The model is told how strongly to follow the caption, as [dev] is."""
    text_len: Size = 512
    """T5 states of a caption, with padding."""

    @property
    def head_dim(self) -> int:
        return sum(self.axes_dim)

    @property
    def dim(self) -> int:
        """Features of the hidden states."""
        return self.n_heads * self.head_dim

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        """Return the exact number of parameters, and FLOPs per patch, forward and backward.

        `seq_len` is the number of patches of an image, among which the FLOPs of its text and of
        what is computed once per image are divided. A weight costs 6 FLOPs for each token that it
        multiplies. Attention to n tokens costs 12 n per feature.
        """
        dim, double, single = self.dim, self.n_double_layers, self.n_single_layers
        layers = double + single
        per_patch = 2 * self.channels * dim
        per_token = 12 * dim**2 * layers  # attention's four matrices, and two of 4 dim x dim
        per_text_token = self.text_dim * dim
        embedders = 1 + self.guidance
        per_image = (12 * double + 3 * single + 2 + 1 + embedders) * dim**2
        per_image += (embedders * TIME_FEATURES + self.pooled_dim) * dim

        weights = per_patch + per_token + 12 * dim**2 * double + per_text_token + per_image
        biases = (2 * 15 * double + 11 * single + 2 + 2 + 2 * (1 + embedders)) * dim + self.channels
        norms = 2 * self.head_dim * (2 * double + single)

        tokens = self.text_len + seq_len
        flops = 6 * (per_patch * seq_len + per_token * tokens + per_text_token * self.text_len)
        flops += 6 * per_image + 12 * layers * dim * tokens**2
        return weights + biases + norms, flops // seq_len

    def update_from_config(self, job_config: JobConfig) -> Self:
        """Return the args unchanged.

        Raises:
            ConfigError: a size is impossible, the heads or the text do not divide over the ranks
                that share them, or the job asks for async tensor parallelism.
        """
        odd = next((size for size in self.axes_dim if size % 2), 0)
        require_sizes(job_config, odd, n_heads=self.n_heads, head_dim=self.head_dim)
        require_divisible_by_tp(job_config, n_heads=self.n_heads)
        require_heads_divisible_by_cp(job_config, self.n_heads)
        cp = job_config.parallelism.context_parallel_degree
        if cp > 1 and self.text_len % (2 * cp):
            problem = (
                f"cuts the text, too, into {2 * cp} chunks, but its text_len is {self.text_len}"
            )
            fail(job_config, "parallelism.context_parallel_degree", problem)
        if job_config.parallelism.enable_async_tensor_parallel:
            problem = "the sequence is not divided between matrices, so nothing can overlap"
            fail(job_config, "parallelism.enable_async_tensor_parallel", problem)
        return self

    def to_hf_config(self) -> dict[str, Any]:
        """Return the `config.json` of diffusers' `FluxTransformer2DModel`; see `BaseModelArgs`."""
        return {
            "_class_name": "FluxTransformer2DModel",
            "attention_head_dim": self.head_dim,
            "axes_dims_rope": list(self.axes_dim),
            "guidance_embeds": self.guidance,
            "in_channels": self.channels,
            "joint_attention_dim": self.text_dim,
            "num_attention_heads": self.n_heads,
            "num_layers": self.n_double_layers,
            "num_single_layers": self.n_single_layers,
            "out_channels": None,
            "patch_size": 1,
            "pooled_projection_dim": self.pooled_dim,
        }

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Self:
        """Return the args for a `config.json` of `FluxTransformer2DModel`.

        Raises:
            CheckpointError: a field is missing, unknown, or has a value that is not supported.
        """
        with HuggingFaceConfig(config, "FluxTransformer2DModel", key="_class_name") as hf:
            hf.require("patch_size", 1)
            channels = hf.take("in_channels", kind=Size)
            hf.require("out_channels", None, channels)
            axes = tuple(hf.take("axes_dims_rope", kind=list, default=[16, 56, 56]))
            hf.require("attention_head_dim", sum(axes))
            for size in axes:
                require_in_range("axes_dims_rope", size, Size)
            return cls(
                n_double_layers=hf.take("num_layers", kind=Count),
                n_single_layers=hf.take("num_single_layers", kind=Count),
                n_heads=hf.take("num_attention_heads", kind=Size),
                axes_dim=axes,
                channels=channels,
                text_dim=hf.take("joint_attention_dim", kind=Size),
                pooled_dim=hf.take("pooled_projection_dim", kind=Size),
                guidance=hf.take("guidance_embeds", kind=bool),
            )
