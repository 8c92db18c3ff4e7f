"""Mixture-of-experts layers: each token is processed by the few experts that a router chooses.

The layer has three parts. The router (`router.py`) chooses experts; the experts are one module with
the weights of all of them, which processes tokens sorted by expert; the layer sorts tokens and sums
results. Expert parallelism replaces the experts' `forward`, and moves the sorted tokens to the
ranks that have their experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from torchtitan.distributed.select_rows import inverse_permutation, select_rows

from .feed_forward import FeedForward
from .ranges import Count, NonNegativeFloat, PositiveFloat, Size
from .router import TopKRouter

ALIGNMENT = 8
"""Sizes of experts are multiples of this: rows of 16 bytes in bfloat16, as `grouped_mm` needs."""


@dataclass(frozen=True)
class MoEArgs:
    """Sizes and choices of a mixture-of-experts layer."""

    num_experts: int = 8
    top_k: int = 2
    """Number of experts per token."""
    hidden_dim: int = 256
    """Hidden features of each expert."""
    num_shared_experts: Count = 0
    """Number of additional experts that process every token; in effect one expert that is this many
    times as wide."""
    score_func: Literal["softmax", "sigmoid"] = "softmax"
    """Function from the gate's logits to the scores by which experts are chosen and weighted."""
    gate_bias: bool = False
    """Add a learned bias to the gate's logits."""
    normalize_weights: bool = True
    """Divide the weights of a token's experts by their sum."""
    route_scale: PositiveFloat = 1.0
    """Factor applied to these weights."""
    weight_inputs: bool = False
    """Multiply the inputs of experts by these weights, not their outputs (Llama 4)."""
    n_groups: Size = 1
    """Number of groups of consecutive experts (the experts of one node, say)."""
    top_groups: int = 1
    """Number of groups that a token's experts come from."""
    group_score_experts: Size = 2
    """A group's score is the sum of this many of its best experts' (DeepSeek-V2: 1, V3: 2)."""
    use_bias: bool = False
    """Balance the load by a bias that is added to the scores when experts are chosen."""
    bias_update_rate: NonNegativeFloat = 1e-3
    """Change of the bias after each step (DeepSeek-V3: 0.001)."""
    aux_loss_weight: NonNegativeFloat = 0.0
    """Weight of the auxiliary loss for balance; the logged loss does not contain it."""
    aux_loss_per_sequence: bool = False
    """Balance within each sequence, a row of the batch, not over the batch (DeepSeek-V3, beside its
    bias)."""
    z_loss_weight: NonNegativeFloat = 0.0
    """Weight of the z-loss, which keeps the gate's logits small (ST-MoE: 0.001); the logged loss
    does not contain it."""

    def __post_init__(self) -> None:
        problem = ""
        if not 1 <= self.top_k <= self.num_experts:
            problem = f"top_k ({self.top_k}) must be from 1 to num_experts ({self.num_experts})"
        elif self.hidden_dim < 1 or self.hidden_dim % ALIGNMENT:
            multiple = f"a multiple of {ALIGNMENT}, at least {ALIGNMENT}"
            problem = f"hidden_dim ({self.hidden_dim}) must be {multiple}"
        elif self.num_experts % self.n_groups or not 1 <= self.top_groups <= self.n_groups:
            problem = (
                f"n_groups ({self.n_groups}) must divide num_experts ({self.num_experts}), and "
                f"top_groups ({self.top_groups}) be from 1 to n_groups"
            )
        elif self.n_groups > 1:
            size = self.num_experts // self.n_groups
            if size < self.group_score_experts or self.top_groups * size < self.top_k:
                problem = (
                    f"groups of {size} experts are too small: a group needs at least "
                    f"group_score_experts ({self.group_score_experts}), and top_groups "
                    f"({self.top_groups}) groups together at least top_k ({self.top_k})"
                )
        if problem:
            raise ValueError(problem)

    @property
    def has_losses(self) -> bool:
        """Whether the router adds a loss of its own, for which it needs the load of each step."""
        return self.aux_loss_weight > 0 or self.z_loss_weight > 0

    def count_parameters(self, dim: int) -> tuple[int, int]:
        """Return the number of parameters, and of matrix parameters that process each token."""
        expert = 3 * dim * self.hidden_dim
        always = dim * self.num_experts + self.num_shared_experts * expert
        held = always + self.num_experts * (expert + self.gate_bias)
        return held, always + self.top_k * expert


class MoE(nn.Module):
    """A feed-forward layer of experts, of which each token uses `top_k`.

    Args:
        dim: features of the hidden states, a multiple of 8.
        args: sizes and choices.
        experts: replaces `GroupedExperts`; has the same `forward` and `init_weights`, and the first
            dimension of every parameter is the expert's number.
        float32_gate: see `TopKRouter`.
    """

    def __init__(
        self,
        dim: int,
        args: MoEArgs,
        experts: nn.Module | None = None,
        float32_gate: bool = False,
    ) -> None:
        super().__init__()
        if dim % ALIGNMENT:
            raise ValueError(f"dim ({dim}) must be a multiple of {ALIGNMENT}")
        self.args = args
        self.router = TopKRouter(dim, args, float32_gate)
        self.experts: Any = experts or GroupedExperts(args.num_experts, dim, args.hidden_dim)
        cast(Any, self.experts).token_share = args.top_k / args.num_experts
        self.shared_experts = None
        if args.num_shared_experts > 0:
            self.shared_experts = FeedForward(dim, args.num_shared_experts * args.hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`."""
        tokens = x.flatten(end_dim=-2)  # [tokens, dim]
        # A router of an author's own need not have `places`.
        by_sequence = self.args.aux_loss_per_sequence or getattr(self.router, "places", None)
        sequences = (len(x),) if by_sequence else ()
        weights, experts, counts = self.router(tokens, *sequences)

        order = experts.flatten().argsort(stable=True)  # rows by expert: [tokens * top_k]
        place = inverse_permutation(order)
        top_k = experts.size(-1)
        rows = select_rows(tokens, order, place, copies=top_k)  # [tokens * top_k, dim]
        if self.args.weight_inputs:
            rows = rows * select_rows(weights.view(-1, 1), order, place).to(rows.dtype)
        rows = self.experts(rows, counts)
        outputs = select_rows(rows, place, order)  # by token again
        outputs = outputs.view(len(tokens), top_k, x.size(-1))
        if self.args.weight_inputs:
            out = outputs.sum(dim=1).view_as(x)
        else:
            out = torch.bmm(weights[:, None].to(outputs.dtype), outputs).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw normal weights; `output_std` is for w2, which writes to the residual stream."""
        self.router.init_weights(std)
        self.experts.init_weights(std, output_std)
        if self.shared_experts is not None:
            self.shared_experts.init_weights(std, output_std)


class GroupedExperts(nn.Module):
    """Gated feed-forward experts (SwiGLU); each matrix is one tensor for all experts.

    The first dimension of every parameter is the expert's number; expert parallelism relies on it.
    """

    stacks_of_matrices = ("w1", "w2", "w3")
    """Parameters `[num_experts, out, in]`, whose matrices Muon updates one by one."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.product = grouped_linear  # converters may replace it

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Process rows that are sorted by expert.

        Args:
            rows: `[rows, dim]`.
            counts: number of rows per expert, `[num_experts]` int64.

        Returns:
            `[rows, dim]`.
        """
        ends = counts.cumsum(0, dtype=torch.int32)
        hidden = F.silu(self.product(rows, self.w1, ends)) * self.product(rows, self.w3, ends)
        return self.product(hidden, self.w2, ends)

    def init_weights(self, std: float, output_std: float) -> None:
        nn.init.normal_(self.w1, std=std)
        nn.init.normal_(self.w3, std=std)
        nn.init.normal_(self.w2, std=output_std)


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each expert's rows by its matrix.

    Args:
        rows: `[rows, in]`, sorted by expert.
        weight: `[num_experts, out, in]`.
        ends: where each expert's rows end, `[num_experts]` int32.

    Returns:
        `[rows, out]`.
    """
    device = rows.device.type
    if torch.is_autocast_enabled(device):  # autocast does not support grouped_mm
        dtype = torch.get_autocast_dtype(device)
        rows, weight = rows.to(dtype), weight.to(dtype)
    return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
