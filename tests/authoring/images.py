"""A right vision-language model: the features of an image replace its placeholder tokens.

Its plan for tensor parallelism is the block of docs/own_data.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from mutants import base
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import PrepareModuleInputOutput, parallelize_module

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import JobConfig
from torchtitan.data import build_dataloader
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_parallel import build_pipeline

PLACEHOLDER = 7
START, PATCHES, PATCH_DIM = 14, 4, 48
PAGE = Path(__file__).parents[2] / "docs" / "own_data.md"
BLOCK = r"```python\n(# infra/parallelize.py, at the end of apply_tp\n.*?)```"


@dataclass
class Args(base.Args):
    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        n, flops = super().get_nparams_and_flops(seq_len)
        with torch.device("meta"):
            return n + sum(p.numel() for p in Vision(self.dim).parameters()), flops


class VisionBlock(nn.Module):
    """Sees all patches: `[batch, patches, dim]` -> the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.scaled_dot_product_attention(*self.qkv(self.norm(x)).chunk(3, dim=-1))


class Vision(nn.Module):
    """`[batch, patches, patch_dim]` -> `[batch, patches, dim]`."""

    init_weights = base.Block.init_weights

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH_DIM, dim, bias=False)
        self.layers = nn.ModuleList(VisionBlock(dim) for _ in range(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch(images)
        for layer in self.layers:
            x = layer(x)
        return x


class Scatter(nn.Module):
    def forward(
        self, h: torch.Tensor, places: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        """Replace the hidden states of tokens that have a place among the features."""
        index = places.clamp(min=0)[..., None].expand_as(h)
        return torch.where((places >= 0)[..., None], features.to(h.dtype).gather(1, index), h)


class Model(base.Model):
    sequence_inputs = ("places",)

    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.vision = Vision(args.dim)
        self.scatter = Scatter()

    def forward(
        self,
        tokens: torch.Tensor,
        images: torch.Tensor,
        places: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Takes `places`, the number of each token's patch; -1: none. A rank of context parallelism
        that has a part of the tokens could not count the placeholders before it.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask = self.mask(positions.shape[1], None, positions.device)
        h = tokens
        if self.tok_embeddings is not None:
            h = self.scatter(self.tok_embeddings(tokens), places, self.vision(images))
        for layer in self.layers.values():
            h = layer(h, positions, mask)
        h = self.norm(h) if self.norm is not None else h
        return self.output(h) if self.output is not None else h

    def init_weights(self) -> None:
        super().init_weights()
        if self.vision is not None:
            self.vision.init_weights()


class WithImages:
    """Each row has an image near its beginning, drawn by its text."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self.loader)
        tokens, labels = batch["tokens"].clone(), batch["labels"].clone()
        tokens[:, START : START + PATCHES] = PLACEHOLDER
        labels[:, START : START + PATCHES] = IGNORE_INDEX
        places = torch.full_like(tokens, -1)
        places[:, START : START + PATCHES] = torch.arange(PATCHES)
        seeds = [torch.Generator().manual_seed(int(row.sum())) for row in tokens]
        images = torch.stack([torch.randn(PATCHES, PATCH_DIM, generator=seed) for seed in seeds])
        return {"tokens": tokens, "labels": labels, "images": images, "places": places}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def parallelize(
    model: nn.Module, world_mesh: DeviceMesh, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    if parallel_dims.tp_enabled:
        names = {"model": model, "tp_mesh": world_mesh["tp"], "job_config": job_config}
        names |= {"Replicate": Replicate, "Shard": Shard, "parallelize_module": parallelize_module}
        names["PrepareModuleInputOutput"] = PrepareModuleInputOutput
        exec(re.search(BLOCK, PAGE.read_text(), re.S)[1], names)
    return base.parallelize(model, world_mesh, parallel_dims, job_config)


base.register(
    __name__,
    model_cls=Model,
    model_args=Args(),
    parallelize_fn=parallelize,
    pipeline_fn=partial(build_pipeline, first_modules=("tok_embeddings", "vision")),
    state_dict_adapter=None,
    build_dataloader_fn=lambda *args: WithImages(build_dataloader(*args)),
)
