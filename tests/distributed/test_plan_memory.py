"""The planned peak memory of a run is the real one's, within 10%."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from harness import run_ranks

from torchtitan.config import load_config
from torchtitan.distributed.parallel_dims import CONFIG_KEYS
from torchtitan.models import llama3, qwen3
from torchtitan.models.common.moe import MoEArgs
from torchtitan.planning.cuda_kernels import norm_of_cuda
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run
from torchtitan.planning.memory import PeakMemory

FLAVOR = "plan_memory"
DENSE = llama3.Llama3ModelArgs(
    dim=128, n_layers=8, n_heads=8, n_kv_heads=4, ffn_dim=384, vocab_size=1024
)
MOE = qwen3.Qwen3ModelArgs(
    dim=128,
    n_layers=4,
    n_heads=8,
    n_kv_heads=4,
    head_dim=16,
    vocab_size=1024,
    moe=MoEArgs(num_experts=4, top_k=2, hidden_dim=128),
)


@dataclass
class Run:
    ranks: int
    degrees: dict[str, int] = field(default_factory=dict)
    ac: str = "none"
    options: tuple[str, ...] = ()
    batch: int = 2
    dtype: str = "bfloat16"
    frozen: str = ""
    """Pattern of parameters."""

    def arguments(self) -> list[str]:
        model = "qwen3" if self.degrees.get("ep") else "llama3"
        return [
            f"--model.name={model}",
            f"--model.flavor={FLAVOR}",
            "--training.seq_len=256",
            f"--training.local_batch_size={self.batch}",
            f"--training.mixed_precision_param={self.dtype}",
            f"--activation_checkpoint.mode={self.ac}",
            *(f"--parallelism.{CONFIG_KEYS[name]}={size}" for name, size in self.degrees.items()),
            *self.options,
        ]


def schedule(name: str) -> str:
    return f"--parallelism.pipeline_parallel_schedule={name}"


FOUR_STAGES = "--parallelism.pipeline_parallel_stages_per_rank=4"
RING = "--parallelism.context_parallel_method=ring"
RUNS = {
    "one": Run(1),
    "fsdp": Run(2),
    "fsdp_selective": Run(2, ac="selective"),
    "fsdp_full": Run(2, ac="full"),
    "fsdp_fp32": Run(2, dtype="float32"),
    "fsdp_accumulation": Run(2, options=("--training.global_batch_size=12",)),
    "ddp": Run(2, {"dp_replicate": 2}),
    "hsdp_accumulation": Run(4, {"dp_replicate": 2}, options=("--training.global_batch_size=24",)),
    "tp": Run(2, {"tp": 2}),
    "tp_fp32": Run(2, {"tp": 2}, dtype="float32"),
    "cp": Run(2, {"cp": 2}),
    "ring_selective": Run(2, {"cp": 2}, ac="selective", options=(RING,)),
    "pp_1f1b": Run(2, {"pp": 2}, batch=4, options=(schedule("1F1B"),)),
    "pp_gpipe": Run(2, {"pp": 2}, batch=8, options=(schedule("GPipe"),)),
    "pp_gpipe_full": Run(2, {"pp": 2}, batch=8, ac="full", options=(schedule("GPipe"),)),
    "pp_interleaved": Run(2, {"pp": 2}, batch=4, options=(schedule("Interleaved1F1B"),)),
    "pp_zero_bubble": Run(2, {"pp": 2}, batch=4, options=(schedule("ZBVZeroBubble"),)),
    "pp_zero_bubble_full": Run(
        2, {"pp": 2}, batch=8, ac="full", options=(schedule("ZBVZeroBubble"),)
    ),
    "pp4_looped_zero_bubble": Run(
        4, {"pp": 4}, batch=12, options=(schedule("InterleavedZeroBubble"),)
    ),
    "pp_dual_pipe_v": Run(2, {"pp": 2}, batch=8, options=(schedule("DualPipeV"),)),
    "pp_fsdp_accumulation": Run(
        4, {"pp": 2}, batch=4, options=("--training.global_batch_size=16",)
    ),
    "pp_fsdp_four_stages": Run(
        4, {"pp": 2}, batch=8, options=(schedule("InterleavedZeroBubble"), FOUR_STAGES)
    ),
    "pp_fsdp": Run(4, {"pp": 2}, batch=4),
    "pp_fsdp_interleaved": Run(4, {"pp": 2}, batch=4, options=(schedule("Interleaved1F1B"),)),
    "ep": Run(2, {"ep": 2}),
    "fsdp_tp_selective": Run(4, {"tp": 2}, ac="selective"),
    "chunked_loss": Run(2, options=("--loss.name=chunked_cross_entropy",)),
    "muon": Run(4, {"dp_replicate": 2}, options=("--optimizer.name=Muon",)),
    "rounded_state": Run(2, options=("--optimizer.state_dtype=bfloat16",)),
    "rounded_muon": Run(2, options=("--optimizer.name=Muon", "--optimizer.state_dtype=bfloat16")),
    "frozen": Run(2, frozen=r"tok_embeddings|layers\.[0-5]\."),
    "pp_frozen": Run(2, {"pp": 2}, batch=4, frozen=r"layers\.[0-5]\."),
}
QUICK = ("fsdp_selective", "pp_1f1b")


def register() -> None:
    """Make the models known, on whichever rank."""
    llama3.MODEL_CONFIGS[FLAVOR] = DENSE
    qwen3.MODEL_CONFIGS[FLAVOR] = MOE


def real_peak(arguments: list[str]) -> int:
    """On a rank: of the third step, when everything that stays is there."""
    from torchtitan.runtime.stop_request import StopRequest
    from torchtitan.train import Trainer

    register()
    trainer, stop, memory = Trainer(load_config(arguments)), StopRequest(), PeakMemory()
    memory.add(*_state(trainer))
    with norm_of_cuda(), memory:
        for step in (1, 2, 3):
            memory.reset_peak()
            trainer.state.step = step
            trainer.train_step(stop)
    trainer.close()
    return memory.peak


def _state(trainer) -> Iterator[torch.Tensor]:
    for part in trainer.model_parts:
        yield from (*part.parameters(), *part.buffers())


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.long]) for n in RUNS],
)
def test_planned_memory_is_the_real_one(name: str, tmp_path) -> None:
    run = RUNS[name]
    config = tmp_path / "job.toml"
    rule = f"[[optimizer.rules]]\npattern = '{run.frozen}'\nlr_scale = 0.0\n"
    config.write_text(rule if run.frozen else "[optimizer]\n")
    arguments = [f"--job.config_file={config}", *run.arguments(), f"--job.dump_folder={tmp_path}"]
    register()
    planned = plan_run(load_config(arguments), run.ranks, DEVICES["h100"])
    real = run_ranks(real_peak, run.ranks, arguments)
    print({k: round(v / 2**20, 2) for k, v in vars(planned.ranks[0].memory).items()})
    print([round(r.peak / 2**20, 2) for r in planned.ranks], [round(r / 2**20, 2) for r in real])
    assert planned.peak == pytest.approx(max(real), rel=0.1)
