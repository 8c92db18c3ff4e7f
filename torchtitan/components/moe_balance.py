"""Balance the load of experts after each step, and report how uneven it is."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
import torch.distributed as dist
import torch.nn as nn

from torchtitan.config import JobConfig
from torchtitan.config.load import fail, origin
from torchtitan.distributed.context_parallel import sequence_shards
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.common.router import TopKRouter
from torchtitan.runtime.device import device
from torchtitan.runtime.host_sum import sum_over_ranks
from torchtitan.tools.logging import rank0

_MEANS = ("expert_imbalance", "router_aux_loss", "router_z_loss")
"""Metrics that are means over layers."""
_LEAST = 1e-6
"""Lower bound of a mean load in tokens; any nonzero load is larger."""


def force_balance(model: nn.Module, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
    """Make the experts of a whole model take turns if `debug.moe_force_load_balance` is set.

    The turns begin anew in each sequence, so they do not depend on the layout.

    Raises:
        ConfigError: it is, and the model has no `TopKRouter`.
    """
    key = "debug.moe_force_load_balance"
    if not job_config.debug.moe_force_load_balance:
        return
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    if not routers:
        problem = f"{job_config.model} has no experts of torchtitan.models.common.moe"
        fail(job_config, key, problem)
    for router in routers:
        router.places = _places(job_config, parallel_dims)
    problem = "tokens do not go to the experts that suit them; only speed and memory tell something"
    rank0.warning("%s: %s", origin(job_config, key), problem)


def _places(job_config: JobConfig, parallel_dims: ParallelDims) -> Callable[[int], torch.Tensor]:
    """Return `TopKRouter.places` of this rank: tensor-parallel ranks divide what it has, too."""
    dims = parallel_dims
    shards = sequence_shards(dims.world_mesh["cp"], job_config) if dims.cp_enabled else None
    tp_rank = dims.world_mesh["tp"].get_local_rank() if dims.tp_enabled else 0

    def places(own: int) -> torch.Tensor:
        of_all = torch.arange(own * dims.tp * dims.cp, device=device())
        of_rank = shards.shard(of_all, 0) if shards else of_all
        return of_rank.chunk(dims.tp)[tp_rank]

    return places


def leave_out_unreached(model: nn.Module) -> None:
    """Let the routers below all trained weights of a pipeline count nothing.

    In one process the backward pass does not reach them. In a pipeline it does, since stages send
    back gradients whatever is frozen.

    Args:
        model: the whole model, whose modules are in the order of their use.
    """
    for module in model.modules():
        whole = isinstance(module, TopKRouter)
        if any(param.requires_grad for param in module.parameters(recurse=whole)):
            return
        if isinstance(module, TopKRouter):
            module.counts = False


class ExpertBalance:
    """Balances all `TopKRouter`s of this rank's model parts; does nothing without any.

    Each router tallies the tokens of its experts, and its losses. After a step the tallies are
    summed over all ranks and passed to each router, so that it can balance the next step.

    Args:
        model_parts: parts of this rank, parallelized and initialized.
        parallel_dims: the layout; all ranks of a pipeline stage route different tokens, including
            tensor-parallel ranks.
    """

    def __init__(self, model_parts: list[nn.Module], parallel_dims: ParallelDims) -> None:
        modules = [module for part in model_parts for module in part.modules()]
        self._routers = [module for module in modules if isinstance(module, TopKRouter)]
        groups = parallel_dims.groups()
        # Not over dp_cp: on GPUs, a group takes memory once it is used, and these are in use.
        names = ("fsdp", "dp_replicate", "tp")
        self._groups = [groups[name] for name in names if name in groups]
        # Other pipeline stages may have experts even if this one has none.
        number = torch.tensor(len(self._routers))
        sum_over_ranks(number)
        self._enabled = bool(number)

    def add_up(self, over_replicas: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sum the tallies over all ranks. All ranks call this after each backward pass.

        Args:
            over_replicas: returns the sum of a tensor over the replica groups.
        """
        if not self._routers:
            return
        sums = torch.cat([tally for router in self._routers for tally in router.tallies])
        for group in self._groups:
            dist.all_reduce(sums, group=group)
        self._sums = over_replicas(sums)

    def step(self) -> None:
        """Pass the sums to the routers. Call after each optimizer step and `add_up`."""
        if not self._routers:
            return
        tallies = [tally for router in self._routers for tally in router.tallies]
        parts = iter(self._sums.split([len(tally) for tally in tallies]))
        for router in self._routers:
            router.end_step(*islice(parts, len(router.tallies)))

    def discard(self) -> None:
        """Clear the tallies. Call instead of `step` if the optimizer step was not taken."""
        for router in self._routers:
            for tally in router.tallies:
                tally.zero_()

    def metrics(self) -> dict[str, float]:
        """Return how uneven the last step was, and its losses; empty if no token was counted in it.

        All ranks call this. Those without a value are left out.

        * `expert_imbalance`: tokens of a layer's busiest expert over the mean of its experts (1 is
          even), averaged over layers;
        * `expert_imbalance_max`: the same ratio of the most uneven layer;
        * `router_aux_loss`, `router_z_loss`: the losses without their weights, averaged over
          layers.
        """
        if not self._enabled:
            return {}
        layers = torch.zeros(len(_MEANS), 1 + len(self._routers), device=device())
        for i, router in enumerate(self._routers, start=1):
            # 0 if no token was counted: the backward pass does not reach frozen bottom layers.
            layers[0, i] = router.load.max() / router.load.mean().clamp(min=_LEAST)
            if router.losses is not None:
                layers[1, i] = router.losses[0] / (router.args.aux_loss_weight or 1)
                layers[2, i] = router.losses[1] / (router.args.z_loss_weight or 1)
        layers = layers.cpu()
        total = torch.stack([layers.sum(dim=1), (layers > 0).sum(dim=1, dtype=layers.dtype)])
        worst = layers[0].max()
        sum_over_ranks(total)
        sum_over_ranks(worst, dist.ReduceOp.MAX)
        found = zip(_MEANS, *total.tolist(), strict=True)
        means = {key: value / counted for key, value, counted in found if counted}
        if not means:  # as where the first step of a process was skipped
            return {}
        return means | {"expert_imbalance_max": worst.item()}
