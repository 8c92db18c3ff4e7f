"""Two small models that read no texts, each with a data loader of its own, and without `args`:

tuple_diffusion  a diffusion transformer: latents `[batch, 4, 8, 8]` with noise, classes and times
tiny_codes       a masked model of 4 codebooks: codes `[batch, seq, 4]`
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from tiny_diffusion import Rows, parallelize

from torchtitan.components import build_lr_scheduler, build_optimizer
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed.pipeline_parallel import build_pipeline
from torchtitan.protocols import BaseModelArgs, ModelProtocol, TrainSpec, register_train_spec


@dataclass
class Args(BaseModelArgs):
    dim: int = 32
    n_layers: int = 4
    n_heads: int = 4

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        with torch.device("meta"):
            n = sum(p.numel() for p in self.model().parameters())
        return n, 6 * n + 12 * self.n_layers * self.dim * seq_len


@dataclass
class DiffusionArgs(Args):
    channels: int = 4
    size: int = 8
    patch: int = 2
    n_classes: int = 10

    def model(self) -> nn.Module:
        return Diffusion(self)

    @property
    def places(self) -> int:
        return (self.size // self.patch) ** 2

    @property
    def patch_dim(self) -> int:
        return self.channels * self.patch**2

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """`[batch, channels, size, size]` -> `[batch, places, patch_dim]`."""
        p, n = self.patch, self.size // self.patch
        parts = images.view(len(images), self.channels, n, p, n, p)
        return parts.permute(0, 2, 4, 1, 3, 5).reshape(len(images), n * n, -1)


class Block(nn.Module):
    """Sees all places; with a condition `[batch, dim]`, scaled and shifted by it."""

    def __init__(self, args: Args, conditional: bool) -> None:
        super().__init__()
        self.head_dim = args.dim // args.n_heads
        self.norm1, self.norm2 = nn.RMSNorm(args.dim), nn.RMSNorm(args.dim)
        self.wq, self.wk, self.wv, self.wo = (
            nn.Linear(args.dim, args.dim, bias=False) for _ in range(4)
        )
        self.w1 = nn.Linear(args.dim, 2 * args.dim, bias=False)
        self.w2 = nn.Linear(2 * args.dim, args.dim, bias=False)
        self.modulation = nn.Linear(args.dim, 2 * args.dim) if conditional else None

    def forward(self, x: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        h = self.norm1(x)
        if self.modulation is not None:
            scale, shift = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
            h = h * (1 + scale) + shift
        q, k, v = (
            w(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        x = x + self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.w2(F.gelu(self.w1(self.norm2(x))))


class Embed(nn.Module):
    def __init__(self, args: DiffusionArgs) -> None:
        super().__init__()
        self.args = args
        self.patches = nn.Linear(args.patch_dim, args.dim)
        self.places = nn.Embedding(args.places, args.dim)
        self.times = nn.Linear(16, args.dim)
        self.classes = nn.Embedding(args.n_classes, args.dim)

    def forward(self, latents, classes, times):
        rates = torch.exp(-math.log(1e3) * torch.arange(8, device=times.device) / 8)
        angles = times[:, None].float() * rates
        waves = torch.cat([angles.sin(), angles.cos()], -1).to(latents.dtype)
        hidden = self.patches(self.args.patches(latents)) + self.places.weight
        return hidden, self.times(waves) + self.classes(classes)


class OwnModel(ModelProtocol):
    sees_later_tokens = True

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)


class Diffusion(OwnModel):
    def __init__(self, args: DiffusionArgs) -> None:
        super().__init__()
        self.embed = Embed(args)
        self.layers = nn.ModuleDict({str(i): Block(args, True) for i in range(args.n_layers)})
        self.final = nn.Linear(args.dim, args.patch_dim)

    def forward(self, tokens, condition=None, classes=None, times=None):
        hidden = tokens
        if self.embed is not None:
            hidden, condition = self.embed(tokens, classes, times)
        for layer in self.layers.values():
            hidden = layer(hidden, condition)
        return (hidden, condition) if self.final is None else self.final(hidden)


@dataclass
class CodesArgs(Args):
    codebooks: int = 4
    vocab_size: int = 17

    def model(self) -> nn.Module:
        return Codes(self)


class SumOfEmbeddings(nn.ModuleList):
    def forward(self, codes):
        return sum(embedding(codes[..., i]) for i, embedding in enumerate(self))


class Heads(nn.ModuleList):
    def forward(self, hidden):
        return torch.stack([head(hidden) for head in self], 2)


class Codes(OwnModel):
    def __init__(self, args: CodesArgs) -> None:
        super().__init__()
        books, size = range(args.codebooks), (args.vocab_size, args.dim)
        self.embeddings = SumOfEmbeddings(nn.Embedding(*size) for _ in books)
        self.layers = nn.ModuleDict({str(i): Block(args, False) for i in range(args.n_layers)})
        self.heads = Heads(nn.Linear(args.dim, args.vocab_size, bias=False) for _ in books)

    def forward(self, tokens):
        hidden = self.embeddings(tokens) if self.embeddings is not None else tokens
        for layer in self.layers.values():
            hidden = layer(hidden)
        return hidden if self.heads is None else self.heads(hidden)


class Loader(Rows):
    def __init__(self, make_row, job_config, tokenizer, dp_rank, dp_world_size):
        super().__init__(job_config, dp_rank, dp_world_size)
        self.make_row = partial(make_row, job_config)

    def sample(self, step, row):
        return self.make_row(torch.Generator().manual_seed(1_000_003 * step + row))


def noisy_latents(job_config, generator):
    args = DiffusionArgs()
    kind = int(torch.randint(args.n_classes, (), generator=generator))
    image = torch.full((args.channels, args.size, args.size), kind / 5 - 1)
    noise = torch.randn(image.shape, generator=generator)
    time = int(torch.randint(1000, (), generator=generator))
    share = time / 1000
    return {
        "tokens": (1 - share) * image + share * noise,
        "labels": args.patches((noise - image)[None])[0],
        "classes": torch.tensor(kind),
        "times": torch.tensor(time),
    }


def masked_codes(job_config, generator):
    seq_len, start = job_config.training.seq_len, torch.randint(16, (), generator=generator)
    codes = (torch.arange(seq_len)[:, None] * torch.tensor([1, 2, 3, 5]) + start) % 16
    hidden = torch.rand(codes.shape, generator=generator) < 0.5
    return {"tokens": codes.masked_fill(hidden, 16), "labels": codes.where(hidden, IGNORE_INDEX)}


def squared_error(pred, labels):
    return (pred.float() - labels.float()).square().sum()


def cross_entropy(pred, labels):
    logits = pred.flatten(0, -2).float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def spec(model, args, first, last, make_row, loss):
    return TrainSpec(
        model_cls=model,
        model_args=args,
        parallelize_fn=parallelize,
        pipeline_fn=partial(build_pipeline, first_modules=(first,), last_modules=(last,)),
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=partial(Loader, make_row),
        build_tokenizer_fn=None,
        build_loss_fn=lambda job_config: loss,
    )


MODEL_CONFIGS = {"debugmodel": DiffusionArgs()}


def diffusion(model=Diffusion, make_row=noisy_latents):
    args = MODEL_CONFIGS["debugmodel"]
    return spec(model, args, "embed", "final", make_row, squared_error)


def codes():
    return spec(Codes, CodesArgs(), "embeddings", "heads", masked_codes, cross_entropy)


register_train_spec("tuple_diffusion", lambda flavor: diffusion())
register_train_spec("tiny_codes", lambda flavor: codes())
