"""Which collectives the compiler joins with products, by its own pass over our graphs."""

import copy

import pytest
import torch
import torch.nn as nn
from functorch.compile import make_boxed_func
from torch._dynamo.utils import detect_fake_mode
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    compile_fx,
    view_to_reshape,
)
from torch._inductor.virtualized import V
from torch.distributed import _functional_collectives, _symmetric_memory
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from torchtitan.distributed.tensor_parallel import _overlap_with_matmuls, feed_forward_plan
from torchtitan.runtime.fake_world import fake_world


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feed_forward = nn.Sequential()
        self.feed_forward.add_module("w1", nn.Linear(16, 32, bias=False))
        self.feed_forward.add_module("relu", nn.ReLU())
        self.feed_forward.add_module("w2", nn.Linear(32, 16, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.feed_forward(x)


@pytest.mark.parametrize("batch", [1, 2])
def test_gathers_and_scatters_are_joined_with_products(batch, monkeypatch):
    name = "_maybe_view_chunk_cat"
    monkeypatch.setattr(_functional_collectives, name, getattr(_functional_collectives, name))
    monkeypatch.setattr(_symmetric_memory, "enable_symm_mem_for_group", lambda group: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)  # asked for by it
    joined: list[list[str]] = []

    def count(module: torch.fx.GraphModule, inputs: object, **options: object) -> object:
        ours = copy.deepcopy(module)
        for node, original in zip(ours.graph.nodes, module.graph.nodes, strict=True):
            node.meta = dict(original.meta)
        view_to_reshape(ours)
        with V.set_fake_mode(detect_fake_mode(inputs)):
            _recursive_post_grad_passes(ours)
        names = (str(node.target) for node in ours.graph.nodes)
        joined.append([name for name in names if "symm_mem" in name or "c10d" in name])
        return make_boxed_func(module.forward)

    def through_inductor(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        return compile_fx(module, inputs, inner_compile=count)

    torch._dynamo.reset()
    with (
        fake_world(4, rank=0),
        _symmetric_memory._test_mode(),
        torch._inductor.config.patch(_micro_pipeline_tp=False),
    ):
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
        _overlap_with_matmuls(mesh)
        block = Block()
        parallelize_module(block, mesh, feed_forward_plan(gated=False))
        compiled = torch.compile(block, backend=through_inductor, fullgraph=True)
        compiled(torch.randn(batch, 8, 16, requires_grad=True)).sum().backward()
    both = [
        "symm_mem.fused_all_gather_matmul.default",
        "symm_mem.fused_matmul_reduce_scatter.default",
    ]
    assert joined == [both, both]  # forward and backward
