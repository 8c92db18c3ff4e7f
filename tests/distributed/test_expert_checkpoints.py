"""Experts travel between layouts, and to and from Hugging Face's files, in every layout."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import on_ranks
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor

from torchtitan.config import JobConfig
from torchtitan.distributed.init import initialize_weights
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.qwen3 import (
    Qwen3Model,
    Qwen3ModelArgs,
    Qwen3StateDictAdapter,
    parallelize_qwen3,
)

ARGS = Qwen3ModelArgs(
    dim=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    vocab_size=32,
    moe=MoEArgs(num_experts=4, top_k=2, hidden_dim=16, aux_loss_weight=0.1, use_bias=True),
)
LAYOUTS = {
    "fsdp4": {"dp_shard": 4},
    "ep4": {"dp_shard": 4, "ep": 4},
    "ep2": {"dp_shard": 4, "ep": 2},
    "hsdp_ep2": {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
    "tp2": {"dp_shard": 2, "tp": 2},
    "ep2_tp2": {"dp_shard": 2, "tp": 2, "ep": 2},
    "ep2_tp2_etp2": {"dp_shard": 2, "tp": 2, "ep": 2, "etp": 2},
    "tp2_etp2": {"dp_shard": 2, "tp": 2, "etp": 2},
}
FULL = StateDictOptions(full_state_dict=True)


def build(layout: str, args: Qwen3ModelArgs = ARGS, seed: int = 0) -> Qwen3Model:
    dims = ParallelDims(**LAYOUTS[layout], world_size=dist.get_world_size())
    config = JobConfig()
    config.training.mixed_precision_param = "float32"
    with torch.device("meta"):
        model = Qwen3Model(args)
    model = parallelize_qwen3(model, dims.world_mesh, dims, config)
    initialize_weights(model, seed, torch.device("cpu"))
    return model


def one_process(args: Qwen3ModelArgs = ARGS) -> Qwen3Model:
    with torch.device("meta"):
        model = Qwen3Model(args)
    initialize_weights(model, 0, torch.device("cpu"))
    return model


def assert_equal(model: Qwen3Model, expected: dict[str, torch.Tensor]) -> None:
    state = get_model_state_dict(model, options=FULL)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)


def reshard(folder: Path) -> None:
    expected = one_process().state_dict()
    names = list(LAYOUTS)
    models = {layout: build(layout) for layout in names}
    for layout, model in models.items():
        assert_equal(model, expected)
        dcp.save(get_model_state_dict(model), checkpoint_id=folder / layout)
    for layout, other in zip(names, names[1:] + names[:1], strict=True):
        loaded = models[other]
        with torch.no_grad():
            for tensor in (*loaded.parameters(), *loaded.buffers()):
                tensor.zero_()
        state = get_model_state_dict(loaded)
        dcp.load(state, checkpoint_id=folder / layout)
        set_model_state_dict(loaded, state)
        assert_equal(loaded, expected)


def test_initial_weights_and_checkpoints_do_not_depend_on_the_layout(tmp_path):
    on_ranks(4, reshard, tmp_path)


def exchange(folder: Path, args: Qwen3ModelArgs) -> None:
    expected = one_process(args).state_dict()
    hf_expected = Qwen3StateDictAdapter(args).to_hf(expected)
    for layout in LAYOUTS:
        model = build(layout, args, seed=1)
        assert model.load_checkpoint(folder) is model
        assert_equal(model, expected)
        seen = set()
        adapter = Qwen3StateDictAdapter(args)
        state = get_model_state_dict(model)
        hf_state = adapter.to_hf(state)
        for name, tensor in hf_state.items():
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            assert torch.equal(tensor, hf_expected[name]), (layout, name)
            seen.add(name)
        of_ranks = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, seen)
        assert set().union(*of_ranks) == hf_expected.keys()
        for name, tensor in adapter.from_hf(hf_state).items():
            assert tensor.placements == state[name].placements
            assert torch.equal(tensor.to_local(), state[name].to_local()), (layout, name)


def test_sharded_experts_load_and_become_huggingface_tensors(tmp_path):
    state = Qwen3StateDictAdapter(ARGS).to_hf(one_process().state_dict())
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    on_ranks(4, exchange, tmp_path, ARGS)
