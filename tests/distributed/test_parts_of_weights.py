"""Parts of sharded parameters are set as on one process, also with the values of other ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn as nn
from harness import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from torchtitan.distributed.dtensor import whole_tensor
from torchtitan.distributed.init import initialize_weights
from torchtitan.protocols.model import ModelProtocol
from torchtitan.runtime.process_group import init_distributed


class Model(ModelProtocol):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.empty(5, 4)) for _ in range(2))
        self.filter = nn.Parameter(torch.empty(4, 4, 3))
        self.gain = nn.Parameter(torch.empty(4))

    def init_weights(self) -> None:
        for weight in (self.first, self.second):
            nn.init.orthogonal_(weight)
        self.first[0] = self.second[1]  # of two parameters, of which neither is whole now
        top, bottom = self.second.split(3)  # these outlive the whole of the next parameter
        nn.init.dirac_(self.filter)
        top.add_(1)
        self.second.mul_(2)
        self.second.add_(self.first)
        bottom[0] = self.second.sum()
        nn.init.ones_(self.gain)[1:] = self.first.norm()


def weights_of(*layouts: str) -> list[dict[str, torch.Tensor]]:
    init_distributed(timeout_seconds=60)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for layout in layouts:
        with torch.device("meta"):
            model = Model()
        if layout == "fsdp":
            fully_shard(model, mesh=mesh)
        if layout == "columns":
            for name, param in list(model.named_parameters(recurse=False)):
                place = Shard(1) if param.ndim > 1 else Replicate()
                setattr(model, name, nn.Parameter(distribute_tensor(param, mesh, [place])))
        initialize_weights(model, 0, torch.device("cpu"))
        found.append({name: whole_tensor(p.detach()) for name, p in model.named_parameters()})
    dist.destroy_process_group()
    return found


def test_any_layout_has_the_weights_of_one_process() -> None:
    [[expected]] = run_ranks(weights_of, 1, "whole")
    for of_rank in run_ranks(weights_of, 2, "fsdp", "columns"):
        for weights in of_rank:
            torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)
