"""A right model of selective state spaces, as Mamba. Its kernel would take whole chunks only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from mutants import base

from torchtitan.config import JobConfig
from torchtitan.config.load import fail

CHUNK, RANK, STATE = 64, 4, 16


@dataclass
class Args(base.Args):
    n_layers: int = 2

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        with torch.device("meta"):
            nparams = sum(p.numel() for p in Model(self).parameters())
        return nparams, 6 * nparams

    def update_from_config(self, job_config: JobConfig) -> Args:
        if job_config.training.seq_len % CHUNK:
            fail(job_config, "training.seq_len", f"must be a multiple of {CHUNK}")
        return replace(self)


class Block(nn.Module):
    def __init__(self, args: Args) -> None:
        super().__init__()
        inner = 2 * args.dim
        self.norm = nn.RMSNorm(args.dim)
        self.w_in = nn.Linear(args.dim, 2 * inner, bias=False)
        self.w_step = nn.Linear(inner, RANK, bias=False)
        self.w_ends = nn.Linear(inner, 2 * STATE, bias=False)
        self.step = nn.Linear(RANK, inner)
        self.log_rates = nn.Parameter(torch.empty(inner, STATE))
        self.w_out = nn.Linear(inner, args.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, gate = self.w_in(self.norm(x)).chunk(2, dim=-1)
        into, out_of = self.w_ends(u).float().chunk(2, dim=-1)  # [batch, seq, STATE]
        step = F.softplus(self.step(self.w_step(u))).float()[..., None]  # [batch, seq, inner, 1]
        kept = (-step * self.log_rates.float().exp()).exp()
        added = step * u.float()[..., None] * into[:, :, None]
        state, states = torch.zeros_like(added[:, 0]), []
        for keep, add in zip(kept.unbind(1), added.unbind(1), strict=True):
            state = keep * state + add
            states.append(state)
        y = torch.stack(states, dim=1) @ out_of[..., None]  # [batch, seq, inner, 1]
        return x + self.w_out(y.squeeze(-1).to(x.dtype) * F.silu(gate))


class Model(base.Model):
    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.layers = nn.ModuleDict({str(i): Block(args) for i in range(args.n_layers)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h)
        return self.output(self.norm(h))

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, Block):
                nn.init.constant_(module.step.bias, -4.6)  # a step of 0.01
                rates = torch.arange(1, STATE + 1).log()
                module.log_rates.copy_(rates.expand_as(module.log_rates))


base.register(
    __name__, model_cls=Model, model_args=Args(), pipeline_fn=None, state_dict_adapter=None
)
