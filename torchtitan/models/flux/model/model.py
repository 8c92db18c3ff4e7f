"""FLUX.1 (Black Forest Labs, 2024), a transformer that turns noise into images.

Rectified flow ("Scaling Rectified Flow Transformers", arXiv:2403.03206): at a time t from 0 to 1,
between an image x and noise e lies (1 - t) x + t e, and the model predicts the velocity e - x. What
is unusual:

* tokens are patches of a latent image after the states of its text; all of them see each other;
* in the first blocks, text and image have weights of their own ("double"); in the others, attention
  and the feed-forward layer run side by side, and their results are added ("single");
* norms have no weights: time, guidance and the pooled text scale and shift what they give, and
  scale what a block adds (adaptive norm, arXiv:2212.09748); those of queries and keys do;
* rotary positions in two dimensions, row and column of a patch; text is at row 0 and column 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.norm import RMSNorm
from torchtitan.models.common.rope import Rotation, rope_frequencies, rotation
from torchtitan.protocols.model import ModelProtocol

from .args import TIME_FEATURES, FluxModelArgs

EPS = 1e-6
TIME_UNITS = 1_000_000
"""Times are integers, parts of this, as floating-point inputs are rounded to bfloat16."""
GUIDANCE_UNITS = 1000
"""The same for guidance; to the model, 1 is 1000 of both."""


class FluxModel(ModelProtocol):
    """In a pipeline stage, layers may be deleted and other parts may be None."""

    sees_later_tokens = True
    sequence_inputs = ("text",)

    def __init__(self, args: FluxModelArgs) -> None:
        super().__init__()
        self.args = args
        self.image_in = nn.Linear(args.channels, args.dim)
        self.text_in = nn.Linear(args.text_dim, args.dim)
        self.condition = Condition(args)
        kinds = [DoubleBlock] * args.n_double_layers + [SingleBlock] * args.n_single_layers
        self.layers = nn.ModuleDict({str(i): kind(args) for i, kind in enumerate(kinds)})
        self.output = Output(args)

    def forward(
        self,
        tokens: torch.Tensor,
        condition: torch.Tensor | None = None,
        *,
        text: torch.Tensor,
        pooled: torch.Tensor,
        times: torch.Tensor,
        widths: torch.Tensor,
        guidance: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the velocity of each patch.

        Args:
            tokens: noisy patches `[batch, patches, channels]`, row by row; in a later stage of a
                pipeline, hidden states `[batch, text + patches, dim]`.
            condition: in a later stage, what the first one has computed, `[batch, dim]`.
            text: T5 states `[batch, text, text_dim]`.
            pooled: CLIP vectors `[batch, pooled_dim]`.
            times: share of noise, `[batch]` int64 of `TIME_UNITS`.
            widths: patches in a row of the image, `[batch]` int64.
            guidance: strength of the text, `[batch]` int64 of `GUIDANCE_UNITS`, if the model is
                told it.
            positions: number of each patch, `[batch, patches]`; None counts from 0.

        Returns:
            `[batch, patches, channels]`; without `output`, hidden states and condition.
        """
        n_text, h = text.shape[1], tokens
        if self.image_in is not None:
            condition = self.condition(times, guidance, pooled)
            h = torch.cat([self.text_in(text), self.image_in(tokens)], dim=1)
        if positions is None:
            positions = torch.arange(h.shape[1] - n_text, device=h.device)[None]
        rotate = self.rotation(F.pad(positions, (n_text, 0)), widths)
        for layer in self.layers.values():
            h = layer(h, condition, rotate, n_text)
        return (h, condition) if self.output is None else self.output(h[:, n_text:], condition)

    def rotation(self, positions: torch.Tensor, widths: torch.Tensor) -> Rotation:
        """Return the rotation of queries and keys.

        Args:
            positions: `[batch or 1, seq]`, row by row.
            widths: `[batch]`.
        """
        rows, columns = positions // widths[:, None], positions % widths[:, None]
        axes = zip((torch.zeros_like(rows), rows, columns), self.args.axes_dim, strict=True)
        parts = [
            rotation(places, rope_frequencies(dim, 10000.0, device=places.device), interleaved=True)
            for places, dim in axes
        ]
        cos, sin = (
            torch.cat(t, dim=-1) for t in zip(*((p.cos, p.sin) for p in parts), strict=True)
        )
        return Rotation(cos, sin, interleaved=True)

    def init_weights(self) -> None:
        """Draw weights as DiT does: at first, blocks change nothing, and the output is zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.RMSNorm):
                module.reset_parameters()
            if not isinstance(module, nn.Linear):
                continue
            if name.endswith("modulation") or name.startswith("output."):
                nn.init.zeros_(module.weight)
            elif name.startswith("condition."):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Condition(nn.Module):
    """What is told of an image as a whole, in one vector."""

    def __init__(self, args: FluxModelArgs) -> None:
        super().__init__()
        self.time = Embedder(TIME_FEATURES, args.dim)
        self.guidance = Embedder(TIME_FEATURES, args.dim) if args.guidance else None
        self.pooled = Embedder(args.pooled_dim, args.dim)

    def forward(
        self, times: torch.Tensor, guidance: torch.Tensor | None, pooled: torch.Tensor
    ) -> torch.Tensor:
        """`[batch]` int64, twice, and `[batch, pooled_dim]` -> `[batch, dim]`."""
        h = self.time(waves(times.float() * (1000 / TIME_UNITS)).to(pooled.dtype))
        if self.guidance is not None:
            assert guidance is not None  # the loader gives it to such a model
            h = h + self.guidance(
                waves(guidance.float() * (1000 / GUIDANCE_UNITS)).to(pooled.dtype)
            )
        return F.silu(h + self.pooled(pooled))


def waves(x: torch.Tensor) -> torch.Tensor:
    """Return cosines and sines of `x` `[batch]` at wavelengths up to 10,000: `[batch, _]`."""
    half = TIME_FEATURES // 2
    rates = torch.exp(-math.log(10000) / half * torch.arange(half, device=x.device))
    angles = x[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedder(nn.Module):
    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(in_dim, dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, in_dim]` -> `[batch, dim]`."""
        return self.w2(F.silu(self.w1(x)))


class Heads(nn.Module):
    """Queries, keys and values."""

    def __init__(self, args: FluxModelArgs) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.wq, self.wk, self.wv = (nn.Linear(args.dim, args.dim) for _ in range(3))
        self.q_norm, self.k_norm = (RMSNorm(args.head_dim, eps=EPS) for _ in range(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[batch, seq, dim]` -> three `[batch, seq, heads, head_dim]`."""
        # The number of heads is left to unflatten(): under tensor parallel, a rank has its share.
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        return self.q_norm(q), self.k_norm(k), v


class JointAttention(nn.Module):
    """Attention of all tokens to all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner_attention = ScaledDotProductAttention(causal=False)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotate: Rotation
    ) -> torch.Tensor:
        """Three `[batch, seq, heads, head_dim]` -> `[batch, seq, heads * head_dim]`."""
        q, k, v = (t.transpose(1, 2) for t in (rotate(q), rotate(k), v))
        return self.inner_attention(q, k, v).transpose(1, 2).flatten(2)


class Modulation(nn.Linear):
    """From the condition of an image to `factors` for each feature of its tokens."""

    token_share = 0.0

    def __init__(self, dim: int, factors: int) -> None:
        super().__init__(dim, factors * dim)


class Stream(nn.Module):
    """The weights that a double block has for text or for patches."""

    token_share = 0.5  # each token uses those of one stream

    def __init__(self, args: FluxModelArgs) -> None:
        super().__init__()
        dim = args.dim
        self.modulation = Modulation(dim, 6)
        self.heads = Heads(args)
        self.wo = nn.Linear(dim, dim)
        self.w1, self.w2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def add(
        self, x: torch.Tensor, attended: torch.Tensor, factors: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Return `x` with the results of attention and the feed-forward layer added."""
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = factors
        x = x + gate * self.wo(attended)
        h = self.w1(modulated(x, ffn_shift, ffn_scale))
        return x + ffn_gate * self.w2(F.gelu(h, approximate="tanh"))


class DoubleBlock(nn.Module):
    """Attention, then feed-forward, with one set of weights for text and one for patches."""

    def __init__(self, args: FluxModelArgs) -> None:
        super().__init__()
        self.text, self.image = Stream(args), Stream(args)
        self.attention = JointAttention()

    def forward(
        self, h: torch.Tensor, condition: torch.Tensor, rotate: Rotation, n_text: int
    ) -> torch.Tensor:
        """`[batch, n_text + patches, dim]` -> the same; `condition` is `[batch, dim]`."""
        streams, sizes = (self.text, self.image), (n_text, h.shape[1] - n_text)
        inputs = h.split(sizes, dim=1)
        factors = [stream.modulation(condition)[:, None].chunk(6, dim=-1) for stream in streams]
        heads = [
            stream.heads(modulated(x, shift, scale))
            for stream, x, (shift, scale, *_) in zip(streams, inputs, factors, strict=True)
        ]
        q, k, v = (torch.cat(both, dim=1) for both in zip(*heads, strict=True))
        attended = self.attention(q, k, v, rotate).split(sizes, dim=1)
        every = zip(streams, inputs, attended, factors, strict=True)
        return torch.cat([stream.add(x, a, f) for stream, x, a, f in every], dim=1)


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side.

    Files have `wo` and `w2` as one matrix, which is applied to both results.
    """

    def __init__(self, args: FluxModelArgs) -> None:
        super().__init__()
        dim = args.dim
        self.modulation = Modulation(dim, 3)
        self.heads, self.attention = Heads(args), JointAttention()
        self.wo = nn.Linear(dim, dim, bias=False)
        self.w1, self.w2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(
        self, h: torch.Tensor, condition: torch.Tensor, rotate: Rotation, n_text: int
    ) -> torch.Tensor:
        """`[batch, n_text + patches, dim]` -> the same; `condition` is `[batch, dim]`."""
        shift, scale, gate = self.modulation(condition)[:, None].chunk(3, dim=-1)
        x = modulated(h, shift, scale)
        attended = self.wo(self.attention(*self.heads(x), rotate))
        return h + gate * (attended + self.w2(F.gelu(self.w1(x), approximate="tanh")))


class Output(nn.Module):
    """From hidden states to patches."""

    def __init__(self, args: FluxModelArgs) -> None:
        super().__init__()
        self.modulation = Modulation(args.dim, 2)
        self.linear = nn.Linear(args.dim, args.channels)

    def forward(self, h: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """`[batch, patches, dim]` -> `[batch, patches, channels]`."""
        scale, shift = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(h, shift, scale))


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`[batch, seq, dim]`, normalised, scaled and shifted by `[batch, 1, dim]`."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift
