"""The router of a mixture-of-experts layer, and two ways to balance the load of its experts.

Both ways need the load of the whole batch, that is of all ranks and micro-batches of a step, which
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
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F

if TYPE_CHECKING:
    from .moe import MoEArgs


class TopKRouter(nn.Module):
    """Chooses the experts of each token, and their weights in its output.

    Three buffers of shape `[num_experts]`, float32, none of them trained:

    * `load`: number of tokens per expert in the last step, on all ranks;
    * `tally`: the same in the current step so far, on this rank;
    * `selection_bias`: added to the scores when experts are chosen; None without `args.use_bias`.

    Args:
        dim: features of the hidden states.
        args: sizes and choices.
        float32_gate: multiply by the gate in float32, even if the model is in bfloat16.
    """

    load: torch.Tensor
    tally: torch.Tensor
    selection_bias: torch.Tensor | None
    takes_turns = False
    """Whether tokens go to all experts in turn (`debug.moe_force_load_balance`)."""

    def __init__(self, dim: int, args: MoEArgs, float32_gate: bool = False) -> None:
        super().__init__()
        self.args = args
        linear = Float32Linear if float32_gate else nn.Linear
        self.gate = linear(dim, args.num_experts, bias=args.gate_bias)
        # Only the auxiliary loss needs the last load, so only then does it go into checkpoints.
        load, tally = torch.zeros(args.num_experts), torch.zeros(args.num_experts)
        self.register_buffer("load", load, persistent=args.aux_loss_weight > 0)
        self.register_buffer("tally", tally, persistent=False)
        self.register_buffer(
            "selection_bias", torch.zeros(args.num_experts) if args.use_bias else None
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route `x` `[tokens, dim]`.

        Returns:
            weights: of the chosen experts, `[tokens, top_k]` float32.
            experts: their numbers, `[tokens, top_k]` int64.
            counts: number of tokens per expert, `[num_experts]` int64.
        """
        args = self.args
        logits = self.gate(x).float()  # [tokens, num_experts]
        scores = logits.softmax(dim=-1) if args.score_func == "softmax" else logits.sigmoid()

        experts = self._in_turn(scores) if self.takes_turns else self._best(logits, scores)
        weights = scores.gather(-1, experts)
        if args.normalize_weights:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        weights = weights * args.route_scale

        chosen = experts.flatten()
        counts = chosen.new_zeros(args.num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))
        if self.training:
            loss = self._auxiliary_loss(scores)
            weights = _OnBackward.apply(weights, loss, self.tally, counts)
        return weights, experts, counts

    def _in_turn(self, scores: torch.Tensor) -> torch.Tensor:
        """Return `top_k` experts for each token, `[tokens, top_k]`: each the one after the last."""
        turns = torch.arange(len(scores) * self.args.top_k, device=scores.device)
        return turns.remainder(self.args.num_experts).view(-1, self.args.top_k)

    def _best(self, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the `top_k` best experts of each token, `[tokens, top_k]`."""
        args = self.args
        # Both scores grow with the logit, but the logit itself distinguishes more: in float32 the
        # sigmoids of large logits are equal, all 1 from about 17 on.
        alone = self.selection_bias is None and args.n_groups == 1
        ranking = (logits if alone else scores).detach()
        if self.selection_bias is not None:
            ranking = ranking + self.selection_bias
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

    def _auxiliary_loss(self, scores: torch.Tensor) -> torch.Tensor | None:
        """Return this rank's share of the auxiliary loss, a scalar; a step's shares sum to it."""
        args = self.args
        if args.aux_loss_weight == 0:
            return None
        probabilities = scores
        if args.score_func == "sigmoid":
            probabilities = scores / scores.sum(dim=-1, keepdim=True)
        total = self.load.sum().clamp(min=1)  # the load is 0 before the first step
        tokens = total / args.top_k
        share = self.load / total
        return args.aux_loss_weight * args.num_experts * (probabilities * share).sum() / tokens

    @torch.no_grad()
    def end_step(self, load: torch.Tensor) -> None:
        """End a step: `load` `[num_experts]`, the tally of all ranks, becomes the last step's load.

        The bias of a frozen router does not change.
        """
        self.load.copy_(load)
        self.tally.zero_()
        if self.selection_bias is not None and self.gate.weight.requires_grad:
            self.selection_bias += self.args.bias_update_rate * (load.mean() - load).sign()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the buffers to their values before the first step."""
        for buffer in (self.load, self.tally, self.selection_bias):
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

    It counts the tokens, and gives the auxiliary loss the gradient 1, as if the loss were a term of
    the training loss. The forward pass would be the wrong place: activation checkpointing runs it
    twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights: torch.Tensor,
        loss: torch.Tensor | None,
        tally: torch.Tensor,
        counts: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(counts)
        ctx.tally = tally
        ctx.has_loss = loss is not None
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (counts,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            # Adds 0, but makes the sum depend on the gradient. Else the compiler may compute it in
            # the forward pass, from a tally that lacks the micro-batches in flight (torch 2.13).
            counts = counts + grad.flatten()[:0].sum()
        ctx.tally.add_(counts)
        loss_grad = torch.ones((), device=grad.device) if ctx.has_loss else None
        return grad, loss_grad, None, None
