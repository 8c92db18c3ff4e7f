"""A diffusion transformer ("Scalable Diffusion Models with Transformers", arXiv:2212.09748) of
images that it makes up: a model whose batches are no texts. `--job.custom_import tiny_diffusion`.

It predicts the noise in latents `[batch, channels, size, size]`, told how much there is
(`times`) and what is to be seen (`classes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from torchtitan.components import build_lr_scheduler, build_optimizer
from torchtitan.components.loss import count_labels
from torchtitan.components.validator import sum_over_data
from torchtitan.config.batch import batch_sizes
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.fsdp import apply_fsdp
from torchtitan.distributed.pipeline_parallel import build_pipeline
from torchtitan.errors import CheckpointError
from torchtitan.protocols import (
    BaseModelArgs,
    BaseStateDictAdapter,
    ModelProtocol,
    TrainSpec,
    register_train_spec,
)


@dataclass
class DiffusionArgs(BaseModelArgs):
    dim: int = 32
    n_layers: int = 4
    n_heads: int = 4
    channels: int = 2
    size: int = 8
    patch: int = 2
    n_classes: int = 10
    n_times: int = 100

    @property
    def n_patches(self) -> int:
        return (self.size // self.patch) ** 2

    @property
    def patch_dim(self) -> int:
        return self.channels * self.patch**2

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        linear = 12 * self.dim**2 * self.n_layers + 2 * self.dim * self.patch_dim
        biases_and_norms = self.n_layers * (9 * self.dim) + 3 * self.dim + self.patch_dim
        embeddings = (self.n_patches + self.n_times + self.n_classes) * self.dim
        attention = 12 * self.n_layers * self.dim * (seq_len + 1)
        return linear + biases_and_norms + embeddings, 6 * linear + attention


class Block(nn.Module):
    def __init__(self, args: DiffusionArgs) -> None:
        super().__init__()
        self.head_dim = args.dim // args.n_heads
        self.norm1, self.norm2 = nn.LayerNorm(args.dim), nn.LayerNorm(args.dim)
        # No biases: that of a key changes no output, so its gradient is what rounding leaves.
        self.wq, self.wk, self.wv, self.wo = (
            nn.Linear(args.dim, args.dim, bias=False) for _ in range(4)
        )
        self.w1, self.w2 = nn.Linear(args.dim, 4 * args.dim), nn.Linear(4 * args.dim, args.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`."""
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.wo(out.transpose(1, 2).flatten(2))
        return x + self.w2(F.gelu(self.w1(self.norm2(x))))


class Diffusion(ModelProtocol):
    sees_later_tokens = True

    def __init__(self, args: DiffusionArgs) -> None:
        super().__init__()
        self.args = args
        self.patches = nn.Linear(args.patch_dim, args.dim)
        self.places = nn.Embedding(args.n_patches, args.dim)
        self.times = nn.Embedding(args.n_times, args.dim)
        self.classes = nn.Embedding(args.n_classes, args.dim)
        self.layers = nn.ModuleDict({str(i): Block(args) for i in range(args.n_layers)})
        self.norm = nn.LayerNorm(args.dim)
        self.output = nn.Linear(args.dim, args.patch_dim)

    def forward(
        self, x: torch.Tensor, *, times: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        """Latents `[batch, channels, size, size]` -> noise `[batch, patches, patch_dim]`.

        What a later stage of a pipeline gets, and an earlier one returns, is hidden states, with
        the condition as the first one of each sequence.
        """
        if self.patches is not None:
            condition = self.times(times) + self.classes(classes)
            x = self.patches(cut(x, self.args.patch)) + self.places.weight
            x = torch.cat([condition[:, None], x], dim=1)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.output is None else self.output(self.norm(x))[:, 1:]

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()


def cut(x: torch.Tensor, patch: int) -> torch.Tensor:
    """`[batch, channels, size, size]` -> `[batch, patches, channels * patch * patch]`."""
    return F.unfold(x, patch, stride=patch).transpose(1, 2)


class Rows:
    """Samples of (step, row) alone, so that every layout trains on the same."""

    def __init__(self, job_config, dp_rank: int, dp_world_size: int) -> None:
        sizes = batch_sizes(job_config, dp_world_size)
        self.passes = sizes.most_passes
        share = sizes.largest // dp_world_size
        self.rows = torch.arange(dp_rank * share, (dp_rank + 1) * share)
        self.taken = 0  # micro-batches

    def __next__(self) -> dict[str, torch.Tensor]:
        step, number = divmod(self.taken, self.passes)
        self.taken += 1
        rows = self.rows.chunk(self.passes)[number].tolist()
        samples = [self.sample(step, row) for row in rows]
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def sample(self, step: int, row: int) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, torch.Tensor]:
        steps = torch.full_like(self.rows, self.taken // self.passes)
        return {"rows": torch.stack([self.rows, steps], dim=1)}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        self.taken = int(state_dict["rows"][0, 1]) * self.passes

    def close(self) -> None:
        pass


class NoisyImages(Rows):
    """Waves, of another length in each class, and noise."""

    def __init__(self, args: DiffusionArgs, job_config, dp_rank: int, dp_world_size: int) -> None:
        super().__init__(job_config, dp_rank, dp_world_size)
        self.args = args

    def sample(self, step: int, row: int) -> dict[str, torch.Tensor]:
        args, random = self.args, torch.Generator().manual_seed(1_000_003 * step + row)
        class_ = torch.randint(args.n_classes, (), generator=random)
        time = torch.randint(args.n_times, (), generator=random)
        image = self.image(class_, random)  # [channels, size, size]
        noise = torch.randn(image.shape, generator=random)
        share = time / args.n_times
        noisy = (1 - share).sqrt() * image + share.sqrt() * noise
        labels = cut(noise[None], args.patch)[0]  # [patches, patch_dim]
        return {"tokens": noisy, "times": time, "classes": class_, "labels": labels}

    def image(self, class_: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        start = torch.rand(self.args.channels, self.args.size, 1, generator=random)
        return torch.sin((start + torch.arange(self.args.size)) * (1 + class_) / 3)


def build_loss(job_config):
    return lambda pred, labels: (pred.float() - labels).square().sum()


class Validation:
    """The loss of two global batches that no step of training has."""

    def __init__(self, parallel_dims, loader: NoisyImages) -> None:
        self.parallel_dims, self.loader = parallel_dims, loader

    def validate(self, model_parts, evaluate) -> float:
        self.loader.taken = 1_000_000 * self.loader.passes
        sums = torch.zeros(2, dtype=torch.float64)
        for _ in range(2 * self.loader.passes):
            batch = next(self.loader)
            loss = evaluate(batch)
            assert not (loss.requires_grad or any(part.training for part in model_parts))
            sums += torch.stack([loss.double(), count_labels(batch["labels"])])
        loss_sum, count = sum_over_data(sums, self.parallel_dims).tolist()
        return loss_sum / count

    def close(self) -> None:
        pass


def parallelize(model, world_mesh, parallel_dims, job_config):
    if parallel_dims.tp_enabled:
        plan = {name: ColwiseParallel() for name in ("wq", "wk", "wv", "w1")}
        plan |= {name: RowwiseParallel() for name in ("wo", "w2")}
        for layer in model.layers.values():
            parallelize_module(layer, world_mesh["tp"], plan)
    apply_ac(model, job_config)
    model = apply_compile(model, job_config)
    if parallel_dims.dp_enabled:
        apply_fsdp(model, world_mesh["dp"], job_config)
    return model


class Adapter(BaseStateDictAdapter):
    """Names begin with `diffusion.` in Hugging Face folders."""

    def to_hf(self, state_dict):
        return {f"diffusion.{name}": tensor for name, tensor in state_dict.items()}

    def from_hf(self, state_dict):
        for name in state_dict:
            if not name.startswith("diffusion."):
                raise CheckpointError(f"unknown tensor {name}")
        return {name.removeprefix("diffusion."): t for name, t in state_dict.items()}


MODEL_CONFIGS = {"tiny": DiffusionArgs()}


def get_train_spec(flavor: str) -> TrainSpec:
    args = MODEL_CONFIGS[flavor]

    def build_loader(job_config, tokenizer, dp_rank, dp_world_size):
        return NoisyImages(args, job_config, dp_rank, dp_world_size)

    def build_validator(job_config, tokenizer, loss_fn, parallel_dims, dp_rank, dp_world_size):
        loader = build_loader(job_config, tokenizer, dp_rank, dp_world_size)
        return Validation(parallel_dims, loader)

    return TrainSpec(
        model_cls=Diffusion,
        model_args=args,
        parallelize_fn=parallelize,
        pipeline_fn=partial(
            build_pipeline, first_modules=("patches", "places", "times", "classes")
        ),
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=build_loader,
        build_tokenizer_fn=None,
        build_loss_fn=build_loss,
        state_dict_adapter=Adapter,
        build_validator_fn=build_validator,
    )


register_train_spec("tiny_diffusion", get_train_spec)

OPTIONS = (
    *("--job.custom_import=tiny_diffusion", "--model.name=tiny_diffusion", "--model.flavor=tiny"),
    *(f"--training.seq_len={MODEL_CONFIGS['tiny'].n_patches}", "--training.global_batch_size=8"),
    *("--training.steps=8", "--metrics.log_freq=1", "--optimizer.lr=3e-3"),
    *("--lr_scheduler.warmup_steps=2", "--activation_checkpoint.mode=none"),
    *("--validation.enable", "--validation.freq=4", "--validation.local_batch_size=4"),
)
"""Of a short run, for 1 or 2 data ranks and micro-batches of 4."""
