"""A right model without attention: causal convolutions, dilated too, and chunks with a state.

As Mamba, GLA and WaveNet do. Its width is that of the checks' sequences, so sizes do not tell which
dimension is which.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from mutants import base

CHUNK = 32
TAPS = 4


@dataclass
class Args(base.Args):
    dim: int = 64

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        matrices = self.n_layers * 4 * self.dim**2
        convolutions = self.n_layers // 2 * TAPS * self.dim
        vocabulary = self.vocab_size * self.dim
        nparams = matrices + convolutions + (self.n_layers + 1) * self.dim + 2 * vocabulary
        chunks = self.n_layers // 2 * (2 * CHUNK * self.dim + 2 * self.dim**2)
        return nparams, 6 * (matrices + convolutions + chunks + vocabulary)


class Convolution(nn.Module):
    """Depthwise: a token sees itself and the three at distances of `dilation`."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            *(dim, dim, TAPS),
            padding=(TAPS - 1) * dilation,
            dilation=dilation,
            groups=dim,
            bias=False,
        )

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = self.conv((k * v).transpose(1, 2))
        return q * out[..., : v.shape[1]].transpose(1, 2)


class Chunks(nn.Module):
    """Linear attention: products within a chunk, and a sum of those before it."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seq = v.shape[1]
        q, k, v = (
            F.pad(t, (0, 0, 0, -seq % CHUNK)).unflatten(1, (-1, CHUNK)) for t in (q, k, v)
        )  # [batch, chunks, CHUNK, dim]
        own = (q @ k.transpose(-1, -2)).tril() @ v
        states = k.transpose(-1, -2) @ v
        before = states.cumsum(1) - states
        return (own + q @ before).flatten(1, 2)[:, :seq]


class Block(nn.Module):
    def __init__(self, number: int, args: Args) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(args.dim)
        self.wq, self.wk, self.wv, self.wo = (
            nn.Linear(args.dim, args.dim, bias=False) for _ in range(4)
        )
        half = args.n_layers // 2
        self.mix = Convolution(args.dim, 1 + number) if number < half else Chunks()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.wo(self.mix(self.wq(h), self.wk(h), self.wv(h)))


class Model(base.Model):
    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.layers = nn.ModuleDict({str(i): Block(i, args) for i in range(args.n_layers)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h)
        return self.output(self.norm(h))

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.05)
            elif isinstance(module, nn.Conv1d):
                nn.init.normal_(module.weight, std=0.3)


base.register(
    __name__, model_cls=Model, model_args=Args(), pipeline_fn=None, state_dict_adapter=None
)
