"""A training step never waits for the device, but where it is said in docs/performance.md.

On a CPU by what the host looks at (tests/host_sync.py); on CUDA by PyTorch's own detector.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import z_loss_qwen3
from harness import run_ranks
from host_sync import HostSyncError, no_host_sync

from torchtitan.config import load_config
from torchtitan.runtime.stop_request import StopRequest
from torchtitan.train import Trainer

SMALL = [
    *["--training.seq_len=32", "--training.local_batch_size=4", "--training.steps=10"],
    "--activation_checkpoint.mode=none",
    *["--job.custom_import=tiny_llama", "--model.name=tiny_llama", "--model.flavor=tiny"],
]
MOE = z_loss_qwen3.OPTIONS
FP32 = "--training.mixed_precision_param=float32"
PP2 = ["--parallelism.pipeline_parallel_degree=2"]
TP2 = "--parallelism.tensor_parallel_degree=2"
RUNS = {
    "dense": (1, []),
    "dense, fsdp2 x accumulation": (2, ["--training.global_batch_size=16"]),
    "no autocast, selective checkpointing": (1, [FP32, "--activation_checkpoint.mode=selective"]),
    "chunked loss": (1, ["--loss.name=chunked_cross_entropy"]),
    "z-loss, norm only measured": (1, ["--loss.z_loss_weight=1e-4", "--training.max_norm=inf"]),
    "documents": (1, ["--training.document_mask"]),
    "float8": (1, ["--model.converters", "quantize.linear.float8"]),
    "Muon, fsdp2": (2, ["--optimizer.name=Muon"]),
    "AdamW in bfloat16": (1, ["--optimizer.state_dtype=bfloat16"]),
    "experts": (1, MOE),
    "experts, float8": (1, [*MOE, "--model.converters", "quantize.grouped_mm.float8"]),
    "tp2": (2, [TP2]),
    "cp2": (2, ["--parallelism.context_parallel_degree=2"]),
    "pipeline": (2, PP2),
    "pipeline, ZBVZeroBubble": (
        2,
        [*PP2, "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"],
    ),
}


def steps(options: list[str], folder: str) -> None:
    """On a rank: two steps, the second of which may not wait; the first builds what is kept."""
    trainer = Trainer(load_config([*SMALL, *options, f"--job.dump_folder={folder}"]))
    stop = StopRequest()
    trainer.state.step = 1
    trainer.train_step(stop)
    trainer.state.step = 2
    with no_host_sync(trainer):
        trainer.train_step(stop)
    stop.close()
    trainer.close()


@pytest.mark.parametrize("name", RUNS)
def test_a_step_does_not_wait_for_the_device(name: str, tmp_path) -> None:
    ranks, options = RUNS[name]
    run_ranks(steps, ranks, options, str(tmp_path))


def test_experts_on_other_ranks_are_the_exception(tmp_path) -> None:
    """How many rows travel, the host must know: once for each layer and pass."""
    with pytest.raises(Exception, match="HostSyncError") as caught:
        run_ranks(steps, 2, [*MOE, "--parallelism.expert_parallel_degree=2"], str(tmp_path))
    assert "expert_parallel.py" in str(caught.value)


class FakeTrainer:
    dataloader = itertools.repeat({"tokens": torch.ones(3)})

    def _to_device(self, batch):
        return batch


@pytest.mark.parametrize(
    "look",
    [
        lambda t: t.sum().item(),
        lambda t: t.tolist(),
        lambda t: float(t[0]),
        lambda t: bool((t > 0).any()),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: t.cpu(),
        lambda t: t.numpy(),
        lambda t: t.repeat_interleave(t.long()),
    ],
)
def test_the_detector_sees(look) -> None:
    """And it lets the host look at what is its own."""

    trainer = FakeTrainer()
    with no_host_sync(trainer):
        batch = next(trainer.dataloader)
        look(batch["tokens"])
        moved = trainer._to_device(batch)["tokens"]
        with pytest.raises(HostSyncError):
            look(moved * 2)


def test_tensors_made_without_a_device_are_the_hosts() -> None:
    with no_host_sync(FakeTrainer()):
        torch.tensor([1.0, 2.0]).sum().item()
        with pytest.raises(HostSyncError):
            torch.ones(2, device="cpu").sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the detector is CUDA's")
@pytest.mark.parametrize("name", [name for name, (ranks, _) in RUNS.items() if ranks == 1])
def test_a_step_does_not_wait_for_cuda(name: str, tmp_path) -> None:
    trainer = Trainer(load_config([*SMALL, *RUNS[name][1], f"--job.dump_folder={tmp_path}"]))
    stop = StopRequest()
    trainer.state.step = 1
    trainer.train_step(stop)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.state.step = 2
        trainer.train_step(stop)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        stop.close()
        trainer.close()
