"""The router of a mixture-of-experts layer, its z-loss, and ways to balance the experts' load.

Two ways need the load of the whole batch, that is of all ranks and micro-batches of a step, which
is known only when the step is over. So each step is balanced by the load of the previous one. As
nothing depends on how the batch was divided, every layout trains alike.

* The bias of loss-free balancing (DeepSeek-V3, arXiv:2412.19437, section 2.1.2) is added to the
  scores when experts are chosen. After each step it changes by a fixed amount: up if the load was
  below the mean, down if it was above.
* The auxiliary loss (GShard, arXiv:2006.16668; Switch, arXiv:2101.03961) is
  `weight * num_experts * sum_e f_e P_e`, where f_e is expert e's share of the load, and P_e its
  mean probability. It equals `weight` if the load is even. f has no gradient, so the load of the
  previous step serves as well. The loss covers the global batch: per rank, it would keep experts
  from specialising (arXiv:2501.11873; Qwen3 uses the global batch, too).

With `aux_loss_per_sequence`, the auxiliary loss is the mean of each sequence's own (DeepSeek-V3,
equation 17): f is its share of the experts that the scores alone choose, without the bias. Ranks
that have parts of a sequence add up these loads.

The z-loss (ST-MoE, arXiv:2202.08906, equation 5) keeps the logits small. It is `weight` times the
mean over tokens of the squared log-partition. Their number is that of the previous step for all
losses. So the first step has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_reduce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .moe import MoEArgs


class TopKRouter(nn.Module):
    """Chooses the experts of each token, and their weights in its output.

    Buffers, float32, none of them trained:

    * `load` `[num_experts]`: number of tokens per expert in the last step, on all ranks;
    * `tally` `[num_experts]`: the same in the current step so far, on this rank;
    * `losses` `[2]`: the auxiliary loss and the z-loss of the last step, with their weights; None
      without either of them;
    * `loss_tally` `[2]`: this rank's share of them in the current step so far, or None;
    * `selection_bias` `[num_experts]`: added to the scores when experts are chosen; None without
      `args.use_bias`.

    Args:
        dim: features of the hidden states.
        args: sizes and choices.
        float32_gate: multiply by the gate in float32, even if the model is in bfloat16.
    """

    load: torch.Tensor
    tally: torch.Tensor
    losses: torch.Tensor | None
    loss_tally: torch.Tensor | None
    selection_bias: torch.Tensor | None
    places: Callable[[int], torch.Tensor] | None = None
    """Number of tokens that this rank has of each sequence -> their places in it. If set, tokens go
    to all experts in turn (`debug.moe_force_load_balance`)."""
    counts: bool = True
    """Whether a backward pass counts the tokens, and adds up the losses."""
    sequence_groups: tuple[ProcessGroup, ...] = ()
    """Groups of ranks that have different parts of the same sequences."""

    def __init__(self, dim: int, args: MoEArgs, float32_gate: bool = False) -> None:
        super().__init__()
        self.args = args
        linear = Float32Linear if float32_gate else nn.Linear
        self.gate = linear(dim, args.num_experts, bias=args.gate_bias)
        # Only the losses need the last load, so only then does it go into checkpoints.
        load, tally = torch.zeros(args.num_experts), torch.zeros(args.num_experts)
        self.register_buffer("load", load, persistent=args.has_losses)
        self.register_buffer("tally", tally, persistent=False)
        for name in ("losses", "loss_tally"):
            losses = torch.zeros(2) if args.has_losses else None
            self.register_buffer(name, losses, persistent=False)
        self.register_buffer(
            "selection_bias", torch.zeros(args.num_experts) if args.use_bias else None
        )

    def forward(
        self, x: torch.Tensor, sequences: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route `x` `[tokens, dim]`, equally many tokens of each of `sequences` sequences.

        Returns:
            weights: of the chosen experts, `[tokens, top_k]` float32.
            experts: their numbers, `[tokens, top_k]` int64.
            counts: number of tokens per expert, `[num_experts]` int64.
        """
        args = self.args
        logits = self.gate(x).float()  # [tokens, num_experts]
        scores = logits.softmax(dim=-1) if args.score_func == "softmax" else logits.sigmoid()

        bias = self.selection_bias
        if self.places:
            experts = self._in_turn(self.places(len(x) // sequences)).repeat(sequences, 1)
        else:
            experts = self._best(logits, scores, bias)
        weights = scores.gather(-1, experts)
        if args.normalize_weights:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        weights = weights * args.route_scale

        chosen = experts.flatten()
        counts = chosen.new_zeros(args.num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))
        if self.training and self.counts:
            losses = self._losses(logits, scores, sequences) if args.has_losses else None
            weights = _OnBackward.apply(weights, losses, self.loss_tally, counts, self.tally)
        return weights, experts, counts

    def _in_turn(self, places: torch.Tensor) -> torch.Tensor:
        """Return experts for tokens of a sequence, `[tokens, top_k]`, the next ones in turn."""
        top_k = self.args.top_k
        turns = places[:, None] * top_k + torch.arange(top_k, device=places.device)
        return turns.remainder(self.args.num_experts)

    def _best(
        self, logits: torch.Tensor, scores: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the `top_k` best experts of each token, `[tokens, top_k]`."""
        args = self.args
        # Both scores grow with the logit, but the logit itself distinguishes more: in float32 the
        # sigmoids of large logits are equal, all 1 from about 17 on.
        alone = bias is None and args.n_groups == 1
        ranking = (logits if alone else scores).detach()
        if bias is not None:
            ranking = ranking + bias
        if args.n_groups > 1:
            ranking = self._within_best_groups(ranking)
        return ranking.topk(args.top_k, dim=-1).indices

    def _within_best_groups(self, ranking: torch.Tensor) -> torch.Tensor:
        """Rule out the experts of all but the best groups (node-limited routing, DeepSeek-V3)."""
        args = self.args
        groups = ranking.unflatten(-1, (args.n_groups, -1))  # [tokens, groups, experts]
        best_experts = groups.topk(args.group_score_experts, dim=-1).values
        best = best_experts.sum(dim=-1).topk(args.top_groups, dim=-1).indices
        ruled_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, False)
        return groups.masked_fill(ruled_out[..., None], float("-inf")).flatten(start_dim=-2)

    def _losses(self, logits: torch.Tensor, scores: torch.Tensor, sequences: int) -> torch.Tensor:
        """Return this rank's shares of the auxiliary loss and the z-loss, which add up, `[2]`."""
        args = self.args
        total = self.load.sum()
        total = total.masked_fill(total == 0, torch.inf)  # the first step has no load before it
        tokens = total / args.top_k
        auxiliary = z_loss = total.new_zeros(())
        if args.aux_loss_weight:
            probabilities = scores
            if args.score_func == "sigmoid":
                probabilities = scores / scores.sum(dim=-1, keepdim=True)
            share = self.load / total
            if args.aux_loss_per_sequence:
                probabilities = probabilities.unflatten(0, (sequences, -1))
                share = self._shares_in_sequences(logits, scores, sequences)[:, None]
            weight = args.aux_loss_weight * args.num_experts
            auxiliary = weight * (probabilities * share).sum() / tokens
        if args.z_loss_weight:
            z_loss = args.z_loss_weight * logits.logsumexp(dim=-1).square().sum() / tokens
        return torch.stack([auxiliary, z_loss])

    def _shares_in_sequences(
        self, logits: torch.Tensor, scores: torch.Tensor, sequences: int
    ) -> torch.Tensor:
        """Return the experts' shares of each whole sequence's load, `[sequences, num_experts]`."""
        chosen = self._best(logits, scores, None).view(sequences, -1)
        loads = scores.new_zeros(sequences, self.args.num_experts)
        loads = loads.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=loads.dtype))
        for group in self.sequence_groups:
            loads = all_reduce(loads, "sum", group)
        return loads / loads.sum(dim=-1, keepdim=True)

    @property
    def tallies(self) -> list[torch.Tensor]:
        """What this rank has counted in the current step; `end_step` takes the sums over ranks."""
        return [self.tally] if self.loss_tally is None else [self.tally, self.loss_tally]

    @torch.no_grad()
    def end_step(self, load: torch.Tensor, losses: torch.Tensor | None = None) -> None:
        """End a step: the sums over ranks of its `tallies` become the last step's load and losses.

        The bias of a frozen router does not change.
        """
        self.load.copy_(load)
        if self.losses is not None and losses is not None:
            self.losses.copy_(losses)
        for tally in self.tallies:
            tally.zero_()
        if self.selection_bias is not None and self.gate.weight.requires_grad:
            self.selection_bias += self.args.bias_update_rate * (load.mean() - load).sign()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the buffers to their values before the first step."""
        for buffer in (*self.tallies, self.load, self.losses, self.selection_bias):
            if buffer is not None:
                buffer.zero_()

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.gate.weight, std=std)
        if self.gate.bias is not None:
            nn.init.zeros_(self.gate.bias)
        self.reset_parameters()


class Float32Linear(nn.Linear):
    """`nn.Linear` whose product is in float32, whatever the dtypes of input and weight.

    It is a separate module, so that tensor parallelism can pass it DTensors. Converters to 8 bits
    skip it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]` float32."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), bias)


class _OnBackward(torch.autograd.Function):
    """Passes its first argument through. Its backward pass does what must happen once per token.

    It counts the tokens and adds up the losses. It gives the losses the gradient 1, as if they were
    terms of the training loss. The forward pass would be the wrong place: activation checkpointing
    runs it twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights: torch.Tensor,
        losses: torch.Tensor | None,
        loss_tally: torch.Tensor | None,
        counts: torch.Tensor,
        tally: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(losses, counts)
        ctx.loss_tally, ctx.tally = loss_tally, tally
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        losses, counts = ctx.saved_tensors
        ctx.tally.add_(_once_known(grad, counts))
        if losses is None:
            return grad, None, None, None, None
        ctx.loss_tally.add_(_once_known(grad, losses))
        return grad, torch.ones_like(losses), None, None, None


def _once_known(grad: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return `value`; compiled code computes what is made of it after `grad`, not before.

    Else the compiler may add it up in the forward pass, to a tally that lacks the micro-batches in
    flight (torch 2.13).
    """
    return value + grad.flatten()[:0].sum() if torch.compiler.is_compiling() else value
