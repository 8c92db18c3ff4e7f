"""A run of a few parameters that saves and resumes as the trainer does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from torchtitan.components.checkpoint import CheckpointManager, RunState
from torchtitan.components.lr_scheduler import build_lr_scheduler
from torchtitan.components.optimizer import build_optimizer
from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.protocols import BaseModelArgs, ModelProtocol


@dataclass
class TinyArgs(BaseModelArgs):
    vocab_size: int = 16
    dim: int = 4
    n_layers: int = 2
    tied: bool = False


class TinyModel(ModelProtocol):
    def __init__(self, args: TinyArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict(
            {str(i): nn.Linear(args.dim, args.dim) for i in range(args.n_layers)}
        )
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tied:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("scale", torch.ones(args.dim), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.tok_embeddings(tokens) * self.scale
        for layer in self.layers.values():
            h = torch.tanh(layer(h))
        return self.output(h)

    def init_weights(self) -> None:
        for param in self.parameters():
            nn.init.normal_(param)
        nn.init.ones_(self.scale)


class CountingLoader:
    """Row `b` of the global batch counts its own batches; tokens depend on nothing else."""

    def __init__(self, global_batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        rows = torch.arange(global_batch_size).chunk(world_size)[rank]
        self.global_batch_size = global_batch_size
        self._rows = torch.stack([rows, torch.zeros_like(rows)], dim=1)

    def __next__(self) -> torch.Tensor:
        self._rows[:, 1] += 1
        return (self._rows @ torch.tensor([[3], [5]]) + torch.arange(8)) % 16  # [rows, 8]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"rows": self._rows.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        assert state["rows"].shape == self._rows.shape
        self._rows = state["rows"].clone()


class TrainState:
    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Run:
    """Builds everything anew, as another process would."""

    def __init__(
        self,
        dump_folder: Path,
        *,
        seed: int = 0,
        args: TinyArgs | None = None,
        global_batch_size: int = 4,
        steps: int = 10,
        model: nn.Module | None = None,
        optimizer: str = "AdamW",
        state_dtype: str = "float32",
        tokenizer: Any = None,
        **checkpoint: Any,
    ) -> None:
        self.config = config = JobConfig()
        config.job.dump_folder = str(dump_folder)
        config.training.steps = steps
        config.optimizer.name, config.optimizer.lr = optimizer, 1e-2
        config.optimizer.state_dtype = state_dtype
        config.lr_scheduler.warmup_steps = 1
        for key, value in ({"enable": True, "interval": 2} | checkpoint).items():
            setattr(config.checkpoint, key, value)
        torch.manual_seed(seed)
        self.model = model if model is not None else TinyModel(args or TinyArgs())
        parallel_dims = ParallelDims(dp_replicate=1, dp_shard=1, tp=1, world_size=1)
        self.optimizers = build_optimizer([self.model], config, parallel_dims)
        self.schedule = build_lr_scheduler(self.optimizers, config)
        self.loader = CountingLoader(global_batch_size)
        self.state = TrainState()
        run_state = RunState(
            config,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedule,
            dataloader=self.loader,
            train_state=self.state,
            dp_mesh=parallel_dims.world_mesh["dp"],
        )
        self.manager = CheckpointManager(run_state, tokenizer)

    def loaded_parts(self) -> dict[str, bool]:
        """Which parts of the state of step 2 this run has, by their names in the config."""
        return {
            "optimizer": bool(next(iter(self.optimizers)).state),
            "lr_scheduler": self.schedule.state_dict() == {"step": 2},
            "dataloader": bool(self.loader.state_dict()["rows"][:, 1].any()),
            "train_state": self.state.step == 2,
        }

    def train(self, until: int, last: bool = False) -> list[float]:
        """The losses of the steps up to `until`, saving on the way."""
        losses = []
        while self.state.step < until:
            tokens = next(self.loader)
            logits = self.model(tokens)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            self.optimizers.step()
            self.optimizers.zero_grad()
            self.schedule.step()
            self.state.step += 1
            losses.append(loss.item())
            self.manager.save(self.state.step, last=last and self.state.step == until)
        return losses


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    """The process group that the trainer has when it runs without torchrun."""
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    if started:
        dist.destroy_process_group()
