"""Expert parallelism: the experts of each mixture-of-experts layer are spread over ranks.

The router runs on each rank for that rank's tokens, under tensor parallelism for its part of the
sequence. Rows of tokens, sorted by expert, travel to the ranks that have their experts and back
(GShard, arXiv:2006.16668). If each expert's matrices are split too (expert tensor parallelism), the
ranks that share an expert first exchange their rows, and sum their results afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import (
    all_gather_tensor,
    all_to_all_single_autograd,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel

from torchtitan.distributed.parallel_dims import CONFIG_KEYS, ParallelDims
from torchtitan.distributed.parallel_styles import OwnTokens
from torchtitan.distributed.select_rows import inverse_permutation, select_rows
from torchtitan.distributed.tensor_parallel import Plan, feed_forward_plan
from torchtitan.errors import ConfigError

if TYPE_CHECKING:
    from torchtitan.models.common.moe import MoE

_SPLIT_DIMS = {"w1": 1, "w2": 2, "w3": 1}
"""Parameter of `GroupedExperts` -> dimension of the hidden features of an expert."""

_STAY = "_rows_stay"
"""Attribute of experts whose rows must not travel, see `without_exchange`."""

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def moe_plan(moe: MoE) -> Plan:
    """Return the part of a block's tensor-parallel plan for its experts, which it names `moe`.

    Each rank routes its own tokens, its part of the sequence. Shared experts are split.
    """
    plan: Plan = {
        "moe": OwnTokens(),
        "moe.router.gate": SequenceParallel(sequence_dim=0, use_local_output=True),
    }
    return plan if moe.shared_experts is None else plan | feed_forward_plan("moe.shared_experts")


def apply_expert_parallel(
    model: nn.Module, parallel_dims: ParallelDims
) -> dict[nn.Module, DeviceMesh]:
    """Give each rank its part of the experts of every `MoE` in `model`, in place.

    Routers that balance whole sequences are told which ranks share them.

    Returns:
        Experts -> the mesh that `apply_fsdp` must shard them over. Empty if they need no mesh of
        their own, because the same ranks hold them and the rest of their block.

    Raises:
        ConfigError: the ranks cannot share the parameters of an author's own experts.
    """
    layers, mesh = moe_layers(model), mesh_of_experts(model, parallel_dims)
    sharing = [name for name in ("cp", "tp") if getattr(parallel_dims, name) > 1]
    for layer in layers:
        groups = (parallel_dims.world_mesh[name].get_group() for name in sharing)
        layer.router.sequence_groups = tuple(groups)
    if mesh is None:
        return {}
    dims = tuple(name for name in ("ep", "etp") if name in (mesh.mesh_dim_names or ()))
    if dims:
        exchanging = {name: mesh[name].get_group() for name in dims}
        for layer in layers:
            _shard_experts(layer, mesh[dims])
            layer.experts.forward = _dispatched(layer.experts, **exchanging)
    if not parallel_dims.dp_enabled and parallel_dims.expert_dp == 1:
        return {}
    replicas = ("dp_replicate",) if parallel_dims.dp_replicate_enabled else ()
    return {layer.experts: mesh[*replicas, "expert_dp"] for layer in layers}


def mesh_of_experts(model: nn.Module, parallel_dims: ParallelDims) -> DeviceMesh | None:
    """Return `parallel_dims.expert_mesh` if `model` needs it. Its first use needs all ranks."""
    spread = parallel_dims.ep_enabled or parallel_dims.tp_enabled
    return parallel_dims.expert_mesh if spread and moe_layers(model) else None


def moe_layers(model: nn.Module) -> list[MoE]:
    # Imported here because torchtitan.models imports this module.
    from torchtitan.models.common.moe import MoE

    return [module for module in model.modules() if isinstance(module, MoE)]


def _shard_experts(layer: MoE, mesh: DeviceMesh) -> None:
    experts, dims = layer.experts, mesh.mesh_dim_names or ()
    for name, param in list(experts.named_parameters()):
        problem = ""
        if "." in name or param.shape[:1] != (layer.args.num_experts,):
            problem = (
                f"{list(param.shape)} cannot be given to the ranks expert by expert: parameters "
                f"must be the module's own, and [{layer.args.num_experts}, ...]"
            )
        elif "etp" in dims and name not in _SPLIT_DIMS:
            problem = (
                f"cannot be split: parallelism.{CONFIG_KEYS['etp']} knows only "
                f"{', '.join(_SPLIT_DIMS)}, those of GroupedExperts. Set it to 1"
            )
        if problem:
            raise ConfigError(f"the parameter {name} of {type(experts).__name__} {problem}")
        placements = [Shard(0 if dim == "ep" else _SPLIT_DIMS[name]) for dim in dims]
        sharded = distribute_tensor(param, mesh, placements)
        experts.register_parameter(name, nn.Parameter(sharded))


def _dispatched(
    experts: nn.Module, ep: dist.ProcessGroup | None = None, etp: dist.ProcessGroup | None = None
) -> Forward:
    """Return a forward of `experts` that takes rows for all experts, wherever they are."""
    forward = experts.forward

    @wraps(forward)
    @torch.compiler.disable  # the number of rows that travel is known only at run time
    def dispatched_forward(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if getattr(experts, _STAY, False):
            return torch.zeros_like(rows)
        exchange = RowExchange(counts, len(rows), ep, etp)
        rows = exchange.send(rows)
        with _local_parameters(experts):
            rows = forward(rows, exchange.counts)
        return exchange.send_back(rows)

    return dispatched_forward


@contextmanager
def without_exchange(model: nn.Module) -> Iterator[None]:
    """Move no rows within this context; experts return zeros.

    For passes that only determine shapes. Their tokens may all be equal, and would all go to the
    same few ranks, which lack the memory for so many.
    """
    experts = [layer.experts for layer in moe_layers(model)]
    for module in experts:
        setattr(module, _STAY, True)
    try:
        yield
    finally:
        for module in experts:
            delattr(module, _STAY)


@contextmanager
def _local_parameters(module: nn.Module) -> Iterator[None]:
    """Use this rank's parts of the parameters, as plain tensors, within this context."""
    whole: dict[str, Any] = dict(module._parameters)
    module._parameters.update({name: param.to_local() for name, param in whole.items()})
    try:
        yield
    finally:
        module._parameters.update(whole)


class RowExchange:
    """Moves the rows of one forward pass to the ranks that have their experts, and back.

    Args:
        counts: this rank's rows for each expert of all ranks, `[num_experts]` int64.
        rows: their sum.
        ep: the ranks that have different experts; None if every rank has all.
        etp: the ranks that have different parts of the same experts; None if experts are whole.
    """

    def __init__(
        self,
        counts: torch.Tensor,
        rows: int,
        ep: dist.ProcessGroup | None,
        etp: dist.ProcessGroup | None,
    ) -> None:
        self._ep, self._etp = ep, etp
        ep_size, etp_size = _size(ep), _size(etp)
        outgoing = counts.view(ep_size, -1)  # [rank, its expert]
        incoming = torch.empty_like(outgoing)  # [rank, this rank's expert]
        if ep is None:
            incoming.copy_(outgoing)
        else:
            dist.all_to_all_single(incoming, outgoing.contiguous(), group=ep)
        sources = incoming[None]  # [etp rank, ep rank, this rank's expert]
        if etp is not None:
            sources = all_gather_tensor(incoming, 0, etp).view(etp_size, *incoming.shape)
        self.counts = sources.sum(dim=(0, 1))
        """Rows for each expert of this rank, `[experts of a rank]` int64."""

        if isinstance(counts, FakeTensor):  # planning a run assumes an even load
            numbers = [rows // ep_size] * (2 * ep_size) + [rows] * etp_size
        else:
            numbers = torch.cat([outgoing.sum(1), incoming.sum(1), sources.sum((1, 2))]).tolist()
        self._sent = numbers[:ep_size]
        self._arrived = numbers[ep_size : 2 * ep_size]
        self._shown = numbers[2 * ep_size :]
        # Rows arrive sorted by source, then expert; experts take them sorted by expert.
        expert = torch.arange(len(self.counts), device=counts.device).repeat(etp_size * ep_size)
        expert = expert.repeat_interleave(sources.flatten(), output_size=sum(self._shown))
        self._order = expert.argsort(stable=True)
        self._place = inverse_permutation(self._order)

    def send(self, rows: torch.Tensor) -> torch.Tensor:
        """Send this rank's rows, sorted by expert; return all rows for this rank's experts.

        Args:
            rows: `[sum of counts, dim]`.

        Returns:
            `[sum of self.counts, dim]`, sorted by expert.
        """
        if self._ep is not None:
            rows = all_to_all_single_autograd(rows, self._arrived, self._sent, self._ep)
        if self._etp is not None:
            rows = all_to_all_single_autograd(
                rows.repeat(len(self._shown), 1), self._shown, self._own_copies, self._etp
            )
        return select_rows(rows, self._order, self._place)

    def send_back(self, rows: torch.Tensor) -> torch.Tensor:
        """Reverse `send`, summing the results of the `etp` ranks for each row.

        Args:
            rows: `[sum of self.counts, dim]`, sorted by expert.

        Returns:
            `[sum of counts, dim]`.
        """
        rows = select_rows(rows, self._place, self._order)
        if self._etp is not None:
            rows = all_to_all_single_autograd(rows, self._own_copies, self._shown, self._etp)
            rows = rows.view(len(self._shown), sum(self._arrived), rows.size(-1)).sum(dim=0)
        if self._ep is not None:
            rows = all_to_all_single_autograd(rows, self._sent, self._arrived, self._ep)
        return rows

    @property
    def _own_copies(self) -> list[int]:
        return [sum(self._arrived)] * len(self._shown)


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()
