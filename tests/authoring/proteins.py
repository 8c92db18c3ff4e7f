"""A right masked language model of proteins, which Hugging Face calls `EsmForMaskedLM`
("Evolutionary-scale prediction of atomic-level protein structure with a language model", 2023).

Its loader gives token ids, and which of them are no padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from mutants.base import parallelize, rope
from tiny_diffusion import Rows

from torchtitan.components import build_loss, build_lr_scheduler, build_optimizer
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.protocols import (
    BaseModelArgs,
    BaseStateDictAdapter,
    ModelProtocol,
    TrainSpec,
    register_train_spec,
)

PADDING, MASK = 1, 32


@dataclass
class Args(BaseModelArgs):
    dim: int = 32
    n_layers: int = 2
    n_heads: int = 2
    vocab_size: int = 33
    tie_word_embeddings: bool = True


HF_CONFIG: dict[str, Any] = {
    "model_type": "esm",
    "architectures": ["EsmForMaskedLM"],
    "hidden_size": Args.dim,
    "num_hidden_layers": Args.n_layers,
    "num_attention_heads": Args.n_heads,
    "intermediate_size": 4 * Args.dim,
    "vocab_size": Args.vocab_size,
    "position_embedding_type": "rotary",
    "token_dropout": False,
    "pad_token_id": PADDING,
    "mask_token_id": MASK,
}


class Block(nn.Module):
    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-12)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim) for _ in range(4))
        self.w1, self.w2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        h, places = self.norm1(x), torch.arange(x.shape[1], device=x.device)[None]
        q, k, v = (w(h).unflatten(-1, (self.n_heads, -1)) for w in (self.wq, self.wk, self.wv))
        q, k = rope(q, places, 1e4), rope(k, places, 1e4)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        x = x + self.wo(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.w2(F.gelu(self.w1(self.norm2(x))))


class Proteins(ModelProtocol):
    sees_later_tokens = True

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict(
            {str(i): Block(args.dim, args.n_heads) for i in range(args.n_layers)}
        )
        self.norm = nn.LayerNorm(args.dim, eps=1e-12)
        self.dense, self.head_norm = nn.Linear(args.dim, args.dim), nn.LayerNorm(args.dim, 1e-12)
        self.output = nn.Linear(args.dim, args.vocab_size)
        self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
        h, mask = self.tok_embeddings(tokens), None if real is None else real[:, None, None]
        for layer in self.layers.values():
            h = layer(h, mask)
        return self.output(self.head_norm(F.gelu(self.dense(self.norm(h)))))

    def init_weights(self) -> None:
        nn.init.normal_(self.tok_embeddings.weight, std=0.02)


class Adapter(BaseStateDictAdapter):
    """Files of transformers 5 have the old names of the parts of norms: gamma and beta."""

    modules = {  # noqa: RUF012
        "norm1": "attention.LayerNorm",
        "norm2": "LayerNorm",
        "wq": "attention.self.query",
        "wk": "attention.self.key",
        "wv": "attention.self.value",
        "wo": "attention.output.dense",
        "w1": "intermediate.dense",
        "w2": "output.dense",
    }
    others = {  # noqa: RUF012
        "norm": "esm.encoder.emb_layer_norm_after",
        "dense": "lm_head.dense",
        "head_norm": "lm_head.layer_norm",
    }

    def name(self, key: str) -> str:
        if key in ("tok_embeddings.weight", "output.weight"):
            return "esm.embeddings.word_embeddings.weight"
        module, _, kind = key.rpartition(".")
        if module == "output":
            return "lm_head.bias"
        if not module.startswith("layers."):
            return f"{self.others[module]}.{kind}"
        _, number, part = module.split(".")
        if part.startswith("norm"):
            kind = {"weight": "gamma", "bias": "beta"}[kind]
        return f"esm.encoder.layer.{number}.{self.modules[part]}.{kind}"

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {self.name(key): value for key, value in state_dict.items()}

    def from_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        with torch.device("meta"):
            names = {key: self.name(key) for key in Proteins(self.model_args).state_dict()}
        return {key: state_dict[name] for key, name in names.items() if name in state_dict}


class Masked(Rows):
    def sample(self, step: int, row: int) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(1_000_003 * step + row)
        letters = 4 + (row + 3 * torch.arange(64)) % 20
        real = torch.arange(64) < 32 + 4 * row
        hidden = real & (torch.rand(64, generator=random) < 0.15)
        tokens = letters.masked_fill(hidden, MASK).masked_fill(~real, PADDING)
        return {"tokens": tokens, "labels": letters.where(hidden, IGNORE_INDEX), "real": real}


def get_train_spec(flavor: str) -> TrainSpec:
    return TrainSpec(
        model_cls=Proteins,
        model_args=Args(),
        parallelize_fn=parallelize,
        pipeline_fn=None,
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=lambda config, tokenizer, *ranks: Masked(config, *ranks),
        build_tokenizer_fn=None,
        build_loss_fn=build_loss,
        state_dict_adapter=Adapter,
    )


register_train_spec("proteins", get_train_spec)
