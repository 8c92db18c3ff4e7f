"""A decoder that attends to an encoder of another text, whose ranks have parts of both texts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
from tiny_diffusion import Rows

from torchtitan.components import build_lr_scheduler, build_optimizer
from torchtitan.components.loss import build_loss
from torchtitan.distributed.context_parallel import apply_cp
from torchtitan.distributed.fsdp import apply_fsdp
from torchtitan.models.common.attention import CausalMask, ScaledDotProductAttention
from torchtitan.protocols import BaseModelArgs, ModelProtocol, TrainSpec, register_train_spec

VOCAB = 64
SOURCE_LEN = 72


@dataclass
class Args(BaseModelArgs):
    dim: int = 32
    n_layers: int = 2
    vocab_size: int = VOCAB

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        # Encoder and decoder layers, the latter with cross attention; tables; output.
        params = self.n_layers * 12 * self.dim**2 + (3 * VOCAB + 2 * SOURCE_LEN) * self.dim
        return params, 6 * params


class Attention(nn.Module):
    def __init__(self, dim: int, causal: bool) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.inner_attention = ScaledDotProductAttention(causal=causal)

    def forward(self, x: torch.Tensor, seen: torch.Tensor, mask: object = None) -> torch.Tensor:
        """`[batch, seq, dim]`, `[batch, keys, dim]` -> `[batch, seq, dim]`, added to `x`."""
        inputs = ((self.wq, x), (self.wk, seen), (self.wv, seen))
        q, k, v = (w(h).unflatten(-1, (-1, 8)).transpose(1, 2) for w, h in inputs)
        return x + self.wo(self.inner_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.encode = Attention(dim, causal=False)
        self.decode, self.cross = Attention(dim, causal=True), Attention(dim, causal=False)

    def forward(
        self, h: torch.Tensor, source: torch.Tensor, mask: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, seq, dim]`, `[batch, source, dim]` -> the same."""
        source = self.encode(source, source)
        return self.cross(self.decode(h, h, mask), source), source


class Translation(ModelProtocol):
    sequence_inputs = ("source", "source_positions")

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.args = args
        self.source_embeddings, self.tok_embeddings = (
            nn.Embedding(VOCAB, args.dim) for _ in range(2)
        )
        self.source_places, self.places = (nn.Embedding(SOURCE_LEN, args.dim) for _ in range(2))
        self.mask = CausalMask()
        self.layers = nn.ModuleDict({str(i): Layer(args.dim) for i in range(args.n_layers)})
        self.output = nn.Linear(args.dim, VOCAB, bias=False)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        source: torch.Tensor,
        source_positions: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[batch, seq]` and twice `[batch, source]` -> `[batch, seq, vocab]`."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        h = self.tok_embeddings(tokens) + self.places(positions)
        texts = self.source_embeddings(source) + self.source_places(source_positions)
        mask = self.mask(tokens.shape[1], None, tokens.device)
        for layer in self.layers.values():
            h, texts = layer(h, texts, mask)
        return self.output(h)

    def init_weights(self) -> None:
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.1)


class Pairs(Rows):
    """The target is the end of the source, backwards."""

    def __init__(self, job_config, tokenizer, dp_rank, dp_world_size) -> None:
        super().__init__(job_config, dp_rank, dp_world_size)
        self.seq_len = job_config.training.seq_len

    def sample(self, step: int, row: int) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(1_000_003 * step + row)
        source = torch.randint(VOCAB, (SOURCE_LEN,), generator=random)
        text = source.flip(0)[: self.seq_len + 1]
        return {
            **{"tokens": text[:-1], "labels": text[1:]},
            **{"source": source, "source_positions": torch.arange(SOURCE_LEN)},
        }


def parallelize(model, world_mesh, parallel_dims, job_config):
    if parallel_dims.cp_enabled:
        lengths = [job_config.training.seq_len, SOURCE_LEN]
        apply_cp(model, world_mesh["cp"], job_config, lengths)
    if parallel_dims.dp_enabled:
        apply_fsdp(model, world_mesh["dp"], job_config)
    return model


def get_train_spec(flavor: str) -> TrainSpec:
    return TrainSpec(
        model_cls=Translation,
        model_args={"tiny": Args()}[flavor],
        parallelize_fn=parallelize,
        pipeline_fn=None,
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=Pairs,
        build_tokenizer_fn=None,
        build_loss_fn=build_loss,
    )


register_train_spec("translation", get_train_spec)
