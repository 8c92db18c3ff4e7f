"""Checkpoints do not depend on the number of ranks or on the kind of parallelism."""

import copy
import json
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from harness import checkpoints_in, on_ranks
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from torchtitan.components.checkpoint import CheckpointManager, RunState
from torchtitan.components.checkpoint.writer import CheckpointWriter
from torchtitan.components.lr_scheduler import build_lr_scheduler
from torchtitan.components.optimizer import build_optimizer
from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import CheckpointError
from torchtitan.protocols import (
    BaseModelArgs,
    BaseStateDictAdapter,
    ModelProtocol,
    TrainSpec,
    register_train_spec,
)
from torchtitan.runtime.ranks import RanksFailedError

GLOBAL_BATCH_SIZE = 8
FULL = StateDictOptions(full_state_dict=True)

# name -> dp_replicate, dp_shard, tp
LAYOUTS = {
    "one": (1, 1, 1),
    "ddp2": (2, 1, 1),
    "fsdp2": (1, 2, 1),
    "tp2": (1, 1, 2),
    "fsdp4": (1, 4, 1),
    "hsdp2x2": (2, 2, 1),
    "fsdp2_tp2": (1, 2, 2),
}


@dataclass
class NetArgs(BaseModelArgs):
    dim: int = 6  # does not divide by 4: shards are uneven
    hidden: int = 12


class Net(ModelProtocol):
    def __init__(self, args: NetArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(10, args.dim)
        self.layers = nn.ModuleDict(
            {"0": nn.Sequential(nn.Linear(args.dim, args.hidden), nn.Linear(args.hidden, args.dim))}
        )
        self.output = nn.Linear(args.dim, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(torch.tanh(self.layers["0"](self.tok_embeddings(tokens))))

    def init_weights(self) -> None:
        for param in self.parameters():
            nn.init.normal_(param)


class NetAdapter(BaseStateDictAdapter):
    """Transposes a matrix, so that its sharded dimensions differ on the two sides."""

    def to_hf(self, state_dict):
        return {f"hf.{k}": v.t() if k == "output.weight" else v for k, v in state_dict.items()}

    def from_hf(self, state_dict):
        return {k[3:]: v.t() if k == "hf.output.weight" else v for k, v in state_dict.items()}


MODEL_CONFIGS = {"tiny": NetArgs()}


def get_train_spec(flavor):
    builders = dict.fromkeys(["optimizer", "lr_scheduler", "dataloader", "tokenizer", "loss"])
    return TrainSpec(
        model_cls=Net,
        model_args=MODEL_CONFIGS[flavor],
        parallelize_fn=None,
        pipeline_fn=None,
        state_dict_adapter=NetAdapter,
        **{f"build_{name}_fn": None for name in builders},
    )


class Rows:
    """The loader of one data rank: each row counts its batches."""

    global_batch_size = GLOBAL_BATCH_SIZE

    def __init__(self, mesh) -> None:
        self.rows = torch.arange(GLOBAL_BATCH_SIZE).view(-1, 1).repeat(1, 2)
        self.rows = self.rows.chunk(mesh.size())[mesh.get_local_rank()].clone()

    def __next__(self) -> torch.Tensor:
        self.rows[:, 1] += 1
        return (self.rows @ torch.tensor([[3], [7]]) + torch.arange(6)) % 10  # [rows, 6]

    def state_dict(self):
        return {"rows": self.rows.clone()}

    def load_state_dict(self, state) -> None:
        self.rows = state["rows"].clone()


class Counter:
    step = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def full(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


class Run:
    def __init__(self, layout: str, dump_folder: Path, seed: int = 0, **checkpoint) -> None:
        degrees = LAYOUTS[layout]
        parallel_dims = ParallelDims(
            dp_replicate=degrees[0],
            dp_shard=degrees[1],
            tp=degrees[2],
            world_size=dist.get_world_size(),
        )
        mesh = parallel_dims.world_mesh
        self.dp_mesh = mesh["dp"]
        torch.manual_seed(seed)
        self.model = Net(NetArgs())
        if degrees[2] > 1:
            plan = {"layers.0.0": ColwiseParallel(), "layers.0.1": RowwiseParallel()}
            parallelize_module(self.model, mesh["tp"], plan)
        sharding = ("dp_replicate", "dp_shard") if degrees[0] > 1 else ("dp_shard",)
        fully_shard(self.model.layers["0"], mesh=mesh[sharding])
        fully_shard(self.model, mesh=mesh[sharding])
        config = JobConfig()
        config.job.dump_folder = str(dump_folder)
        config.checkpoint.enable, config.checkpoint.interval = True, 2
        for key, value in checkpoint.items():
            setattr(config.checkpoint, key, value)
        config.training.steps, config.optimizer.lr, config.lr_scheduler.warmup_steps = 10, 1e-2, 1
        self.optimizers = build_optimizer([self.model], config, parallel_dims)
        self.schedule = build_lr_scheduler(self.optimizers, config)
        self.loader, self.counter = Rows(self.dp_mesh), Counter()
        run_state = RunState(
            config,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedule,
            dataloader=self.loader,
            train_state=self.counter,
            dp_mesh=self.dp_mesh,
        )
        self.manager = CheckpointManager(run_state)

    def train(self, until: int, last: bool = False) -> list[float]:
        """The losses over the global batch."""
        losses = []
        while self.counter.step < until:
            tokens = next(self.loader)
            loss = F.cross_entropy(
                self.model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            )
            loss.backward()
            self.optimizers.step()
            self.optimizers.zero_grad()
            self.schedule.step()
            self.counter.step += 1
            mean = loss.detach().clone()
            dist.all_reduce(mean, group=self.dp_mesh.get_group())
            losses.append(mean.item() / self.dp_mesh.size())
            self.manager.save(self.counter.step, last=last and self.counter.step == until)
        return losses

    def everything(self) -> dict:
        """A copy of the state of the run, as full tensors."""
        rows = [torch.empty_like(self.loader.rows) for _ in range(self.dp_mesh.size())]
        dist.all_gather(rows, self.loader.rows, group=self.dp_mesh.get_group())
        state = {
            "model": get_model_state_dict(self.model, options=FULL),
            "optimizer": {k: full(v) for k, v in self.optimizers.state_dict().items()},
            "rows": torch.cat(rows),
            "lr": self.schedule.last_lr,
            "step": self.counter.step,
        }
        return copy.deepcopy(state)


def world_size_of(layout: str) -> int:
    replicate, shard, tp = LAYOUTS[layout]
    return replicate * shard * tp


def save(folder: Path, layout: str, async_mode: str) -> None:
    training_went_on = threading.Event()
    write_data = CheckpointWriter.write_data

    def write_late(self, plan, planner):
        assert training_went_on.wait(timeout=60)
        return write_data(self, plan, planner)

    run = Run(layout, folder, async_mode=async_mode)
    if async_mode == "async":
        CheckpointWriter.write_data = write_late
    run.train(2)
    state = run.everything()
    losses = run.train(3)
    training_went_on.set()
    losses += run.train(5)
    run.manager.close()
    if dist.get_rank() == 0:
        torch.save((state, losses), folder / "expected.pt")


def resume(folder: Path, layout: str) -> None:
    run = Run(layout, folder, seed=1, load_step=2)
    assert run.manager.load() == 2
    state, losses = torch.load(folder / "expected.pt")
    torch.testing.assert_close(run.everything(), state, rtol=0, atol=0)
    torch.testing.assert_close(run.train(5), losses, rtol=1e-5, atol=0)
    run.manager.close()


@pytest.mark.parametrize(
    ("saved_on", "resumed_on", "async_mode"),
    [
        ("fsdp2", "one", "disabled"),
        ("one", "fsdp2_tp2", "async"),
        pytest.param("fsdp2_tp2", "fsdp4", "async", marks=pytest.mark.long),
        ("fsdp4", "tp2", "disabled"),
        pytest.param("tp2", "hsdp2x2", "disabled", marks=pytest.mark.long),
        ("hsdp2x2", "fsdp2", "async"),
    ],
)
def test_a_run_resumes_on_another_layout(tmp_path, saved_on, resumed_on, async_mode):
    on_ranks(world_size_of(saved_on), save, tmp_path, saved_on, async_mode)
    on_ranks(world_size_of(resumed_on), resume, tmp_path, resumed_on)


def save_by_url(folder: Path) -> None:
    run = Run("fsdp2", folder, async_mode="async", folder=f"local://{folder}/bucket")
    losses = run.train(5)
    state = run.everything()
    run.manager.save(5, last=True)
    run.manager.close()
    if dist.get_rank() == 0:
        torch.save((state, losses), folder / "expected.pt")


def resume_by_url(folder: Path) -> None:
    run = Run("fsdp2_tp2", folder, seed=1, folder=f"local://{folder}/bucket")
    assert run.manager.load() == 5
    torch.testing.assert_close(
        run.everything(), torch.load(folder / "expected.pt")[0], rtol=0, atol=0
    )
    run.manager.close()
    if dist.get_rank() == 0:
        flip_bit(folder / "bucket" / "step-5" / "__1_0.distcp")
    dist.barrier()
    damaged = Run("fsdp2_tp2", folder, seed=1, folder=f"local://{folder}/bucket")
    assert damaged.manager.load() == 4
    assert damaged.manager.newest().name == "step-4"
    damaged.manager.close()


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_ranks_save_to_a_storage_of_fsspec_and_resume_from_it(tmp_path):
    """Also past a file with one flipped bit, which only one of the ranks reads."""
    on_ranks(2, save_by_url, tmp_path)
    on_ranks(4, resume_by_url, tmp_path)


def load_huggingface(folder: Path) -> None:
    register_train_spec("net", get_train_spec)
    expected = torch.load(folder / "expected.pt")
    for layout in "fsdp4", "fsdp2_tp2", "hsdp2x2":
        run = Run(layout, folder, seed=1)
        assert run.model.load_checkpoint(folder) is run.model
        torch.testing.assert_close(run.everything()["model"], expected, rtol=0, atol=0)
        start = Run(layout, folder / layout, seed=1, initial_load_path=str(folder))
        assert start.manager.load() == 0
        torch.testing.assert_close(start.everything()["model"], expected, rtol=0, atol=0)


def test_sharded_models_load_huggingface_weights(tmp_path):
    state = Net(NetArgs()).state_dict()
    torch.save(state, tmp_path / "expected.pt")
    hf_state = NetAdapter(NetArgs()).to_hf(state)
    hf_state = {key: value.contiguous() for key, value in hf_state.items()}
    save_file(hf_state, tmp_path / "model.safetensors")
    on_ranks(4, load_huggingface, tmp_path)


def fail_on_one_rank(folder: Path) -> None:
    run = Run("fsdp2", folder)
    run.train(2)
    write_data = CheckpointWriter.write_data

    def disk_full_on_rank_1(self, plan, planner):
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return write_data(self, plan, planner)

    CheckpointWriter.write_data = disk_full_on_rank_1
    run.train(5)  # goes on after step 4 was not saved
    with pytest.raises(CheckpointError, match=r"step 6 could not be saved.*No space.*step-2"):
        run.train(6, last=True)
    dist.barrier()  # rank 0 has cleaned up
    assert checkpoints_in(folder / "checkpoint") == ["step-2"]

    CheckpointWriter.write_data = write_data
    if dist.get_rank() == 0:
        os.truncate(folder / "checkpoint" / "step-2" / "__1_0.distcp", 10)
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp is damaged"):
        Run("fsdp2", folder).manager.load()
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        run.model.load_checkpoint(folder / "nowhere")


def test_all_ranks_see_the_failure_of_one(tmp_path):
    on_ranks(2, fail_on_one_rank, tmp_path)


def die_while_saving(folder: Path) -> None:
    run = Run("fsdp2", folder)
    run.train(2)
    write_data = CheckpointWriter.write_data

    def die_on_rank_1(self, plan, planner):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_data(self, plan, planner)

    CheckpointWriter.write_data = die_on_rank_1
    run.train(4)


def resume_after_death(folder: Path) -> None:
    run = Run("fsdp2", folder, seed=1)
    assert run.manager.load() == 2
    run.train(4)
    if dist.get_rank() == 0:
        assert checkpoints_in(folder / "checkpoint") == ["step-2", "step-4"]


def test_a_killed_save_is_invisible(tmp_path):
    with pytest.raises(RanksFailedError, match="rank 1: killed by SIGKILL"):
        on_ranks(2, die_while_saving, tmp_path)
    assert checkpoints_in(tmp_path / "checkpoint") == ["step-2", "step-4.partial"]
    on_ranks(2, resume_after_death, tmp_path)
    manifest = json.loads((tmp_path / "checkpoint" / "step-4" / "manifest.json").read_text())
    data = {"__0_0.distcp", "__1_0.distcp"}
    assert manifest["files"].keys() == {".metadata", "config.resolved.toml", *data}
