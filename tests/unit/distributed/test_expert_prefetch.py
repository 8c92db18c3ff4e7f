"""In which order FSDP gathers blocks with experts, and rows travel."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torchtitan.config import load_config
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.planning.collectives import CollectiveRecorder
from torchtitan.planning.trace import meta_model
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.runtime.fake_world import fake_world


def test_the_next_block_s_experts_are_gathered_before_rows_of_this_one_travel() -> None:
    options = ["--model.name=qwen3", "--model.flavor=debugmodel_moe"]
    options += ["--parallelism.expert_parallel_degree=2", "--activation_checkpoint.mode=none"]
    options += ["--parallelism.fsdp_reshard_after_forward=always"]
    config = load_config(options)
    with fake_world(4, rank=0):
        dims = ParallelDims.from_config(config.parallelism, 4)
        spec = get_train_spec("qwen3", "debugmodel_moe")
        model = spec.parallelize(meta_model(config), dims.world_mesh, dims, config)
        recorder = CollectiveRecorder(dims.groups())
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            with recorder:
                out = model(torch.zeros(1, 16, dtype=torch.int64))
                forward = len(recorder.collectives)
                out.sum().backward()
    told = [
        {("all_gather", "expert_dp"): "G", ("all_to_all", "ep"): "a"}.get((c.kind, c.group), "")
        for c in recorder.collectives
    ]
    layers = len(model.layers)
    # Both passes: experts of two blocks are gathered first, those of the last come with the last
    # but one. Rows and their counts go there in the forward pass, and rows back in both.
    assert "".join(told[:forward]) == "GG" + "aaaG" * (layers - 2) + "aaa" * 2
    assert "".join(told[forward:]) == "GG" + "aaG" * (layers - 2) + "aa" * 2
