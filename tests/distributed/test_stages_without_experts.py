"""Tensor and pipeline parallelism of a model whose first layers have no experts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from harness import run_ranks, train

from torchtitan.config.load import load_config
from torchtitan.train import Trainer

OPTIONS = (
    *("--model.name=deepseek_v3", "--model.flavor=debugmodel", "--model.args.n_dense_layers=2"),
    *("--training.steps=2", "--training.seq_len=64", "--training.local_batch_size=4"),
    *("--metrics.log_freq=1", "--activation_checkpoint.mode=none"),
)
LAYOUT = ("--parallelism.pipeline_parallel_degree=2", "--parallelism.tensor_parallel_degree=2")
INTERLEAVED = "--parallelism.pipeline_parallel_schedule=Interleaved1F1B"


@pytest.mark.long
@pytest.mark.parametrize("further_tokens", [0, 1])
def test_they_train_like_one_process(further_tokens: int, tmp_path: Path) -> None:
    """To predict further tokens, the last stage has a copy of the embedding, and FSDP."""
    options = (*OPTIONS, f"--model.args.mtp_depth={further_tokens}")
    float32 = "--training.mixed_precision_param=float32"
    alone = train(tmp_path / "alone", *options, float32)
    spread = train(tmp_path / "spread", *options, *LAYOUT, float32, ranks=4)
    for line, expected in zip(spread, alone, strict=True):
        for key in ("loss", "grad_norm", "expert_imbalance"):
            assert math.isclose(line[key], expected[key], rel_tol=1e-4), (key, line, expected)


@pytest.mark.long
def test_all_stages_of_a_rank_compute_in_bfloat16(tmp_path: Path) -> None:
    """Only those with experts have FSDP, which casts weights."""
    options = [*OPTIONS, *LAYOUT, INTERLEAVED, f"--job.dump_folder={tmp_path}"]
    for dtypes in run_ranks(_dtypes, 4, options):
        assert dtypes == {torch.bfloat16}


def _dtypes(options: list[str]) -> set[torch.dtype]:
    """Train, and return the dtypes of what attention writes to the residual stream."""
    trainer, found = Trainer(load_config(options)), set()
    for part in trainer.model_parts:
        for layer in part.layers.values():
            layer.attention.wo.register_forward_hook(lambda *call: found.add(call[-1].dtype))
    trainer.train()
    return found
