"""Right, and no text: pairs of token ids with one label, by contrastive.py of the docs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tiny_diffusion import Rows, parallelize

from torchtitan.components import build_lr_scheduler, build_optimizer
from torchtitan.protocols import BaseModelArgs, ModelProtocol, TrainSpec, register_train_spec

_PAGE = (Path(__file__).parents[2] / "docs" / "own_data.md").read_text()
_SHOWN: dict = {}
exec(_PAGE.partition("# contrastive.py\n")[2].partition("```")[0], _SHOWN)


@dataclass
class Args(BaseModelArgs):
    dim: int = 16
    n_layers: int = 2
    vocab_size: int = 32

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        n = self.vocab_size * self.dim + 4 * self.n_layers * self.dim**2 + 1
        return n, 6 * n


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`."""
        return x + self.w2(F.gelu(self.w1(x)))


class Model(ModelProtocol):
    sees_later_tokens = compares_samples = True

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers, self.others = (
            nn.ModuleDict({str(i): Block(args.dim) for i in range(args.n_layers)}) for _ in range(2)
        )
        self.temperature = nn.Parameter(torch.empty(1))

    def forward(self, tokens: torch.Tensor, *, other: torch.Tensor) -> torch.Tensor:
        """Two texts `[batch, any]` -> their features `[batch, 1, 2, dim]`."""
        features = []
        for text, tower in ((tokens, self.layers), (other, self.others)):
            x = self.tok_embeddings(text)
            for block in tower.values():
                x = block(x)
            features.append(F.normalize(x.mean(1), dim=-1))
        return torch.stack([features[0] * self.temperature.exp(), features[1]], 1)[:, None]

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        nn.init.ones_(self.temperature)


class Pairs(Rows):
    def sample(self, step: int, row: int) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(1_000_003 * step + row)
        topic = 4 * int(torch.randint(7, (), generator=random))
        tokens = topic + torch.randint(5, (18,), generator=random)
        return {"tokens": tokens[:8], "other": tokens[8:], "labels": torch.ones(1).long()}


MODEL_CONFIGS = {"debugmodel": Args()}


def get_train_spec(flavor: str) -> TrainSpec:
    def parallelize_fn(*layout):
        _SHOWN["share_samples"](*layout)
        return parallelize(*layout)

    return TrainSpec(
        model_cls=Model,
        model_args=MODEL_CONFIGS[flavor],
        parallelize_fn=parallelize_fn,
        pipeline_fn=None,
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=lambda config, tokenizer, *ranks: Pairs(config, *ranks),
        build_tokenizer_fn=None,
        build_loss_fn=lambda config: _SHOWN["Contrastive"](),
        state_dict_adapter=None,
    )


register_train_spec("two_towers", get_train_spec)
