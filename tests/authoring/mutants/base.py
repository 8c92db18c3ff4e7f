"""A small Llama-like model, written by the guide: right, and each mutant breaks a part of it.

It has its own code, and from torchtitan takes only what an author would: attention that context
parallelism knows, and the building blocks of `parallelize`. Hugging Face's `LlamaForCausalLM` with
`hf_config()` is the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)

from torchtitan.components import build_loss, build_lr_scheduler, build_optimizer, build_tokenizer
from torchtitan.config import JobConfig
from torchtitan.data import build_dataloader
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.context_parallel import apply_cp
from torchtitan.distributed.fsdp import apply_fsdp
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_parallel import build_pipeline
from torchtitan.distributed.tensor_parallel import apply_tensor_parallel
from torchtitan.models.common.attention import (
    AttentionMask,
    CausalMask,
    ScaledDotProductAttention,
)
from torchtitan.protocols import (
    BaseModelArgs,
    BaseStateDictAdapter,
    ModelProtocol,
    TrainSpec,
    register_train_spec,
)


@dataclass
class Args(BaseModelArgs):
    dim: int = 64
    n_layers: int = 4
    n_heads: int = 4
    ffn_dim: int = 128
    vocab_size: int = 264
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        matrices = self.n_layers * (4 * self.dim**2 + 3 * self.dim * self.ffn_dim)
        norms = (2 * self.n_layers + 1) * self.dim
        vocabulary = self.vocab_size * self.dim
        nparams = matrices + norms + (1 if self.tie_word_embeddings else 2) * vocabulary
        return nparams, 6 * (matrices + vocabulary) + 12 * self.n_layers * self.dim * seq_len

    def update_from_config(self, job_config: JobConfig) -> Args:
        return replace(self)


def rope(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate `x` `[batch, seq, heads, head_dim]`; features i and i + head_dim / 2 are a pair."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[..., None, None].float() * frequencies  # [batch or 1, seq, 1, half]
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, args: Args) -> None:
        super().__init__()
        self.head_dim = args.dim // args.n_heads
        self.theta = args.rope_theta
        self.wq = nn.Linear(args.dim, args.dim, bias=False)
        self.wk = nn.Linear(args.dim, args.dim, bias=False)
        self.wv = nn.Linear(args.dim, args.dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)
        self.inner_attention = ScaledDotProductAttention()

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, mask: AttentionMask
    ) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = self.inner_attention(q, k, v, mask)  # [batch, heads, seq, head_dim]
        return self.wo(out.transpose(1, 2).flatten(2))

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return rope(x, positions, self.theta)


class FeedForward(nn.Module):
    def __init__(self, args: Args) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    attention_cls: type[nn.Module] = Attention
    feed_forward_cls: type[nn.Module] = FeedForward
    norm_cls: type[nn.RMSNorm] = nn.RMSNorm

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.attention_norm = self.norm_cls(args.dim, eps=args.norm_eps)
        self.attention = self.attention_cls(args)
        self.ffn_norm = self.norm_cls(args.dim, eps=args.norm_eps)
        self.feed_forward = self.feed_forward_cls(args)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, mask: AttentionMask
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), positions, mask)
        return x + self.feed_forward(self.ffn_norm(x))

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()


class Model(ModelProtocol):
    block_cls: type[nn.Module] = Block

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): self.block_cls(args) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.mask = CausalMask()
        if args.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask = self.mask(positions.shape[1], document_ids, positions.device)
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for layer in self.layers.values():
            h = layer(h, positions, mask)
        h = self.norm(h) if self.norm is not None else h
        return self.output(h) if self.output is not None else h

    def init_weights(self) -> None:
        if self.tok_embeddings is not None:
            nn.init.normal_(self.tok_embeddings.weight, std=0.02)
        for layer in self.layers.values():
            layer.init_weights()
        if self.norm is not None:
            self.norm.reset_parameters()
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=0.02)


class Adapter(BaseStateDictAdapter):
    """Layers' names within `layers.N.` -> Hugging Face's within `model.layers.N.`, and the rest."""

    layer_names = {  # noqa: RUF012
        "attention_norm": "input_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }
    names = {  # noqa: RUF012
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
    }

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {self.key_to_hf(key): value for key, value in state_dict.items()}

    def from_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {self.key_from_hf(key): value for key, value in state_dict.items()}

    def key_to_hf(self, key: str) -> str:
        module, _, kind = key.rpartition(".")
        if not module.startswith("layers."):
            return f"{self.names[module]}.{kind}"
        _, number, name = module.split(".", 2)
        return f"model.layers.{number}.{self.layer_names[name]}.{kind}"

    def key_from_hf(self, key: str) -> str:
        module, _, kind = key.rpartition(".")
        if not module.startswith("model.layers."):
            return f"{_invert(self.names)[module]}.{kind}"
        _, _, number, name = module.split(".", 3)
        return f"layers.{number}.{_invert(self.layer_names)[name]}.{kind}"


def _invert(names: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}


def parallelize(
    model: nn.Module, world_mesh: DeviceMesh, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    if parallel_dims.tp_enabled:
        apply_tp(model, world_mesh["tp"], job_config)
    if parallel_dims.cp_enabled:
        apply_cp(model, world_mesh["cp"], job_config)
    apply_ac(model, job_config)
    model = apply_compile(model, job_config)
    if parallel_dims.dp_enabled:
        apply_fsdp(model, world_mesh["dp"], job_config)
    return model


def tp_plan() -> dict[str, Any]:
    """The plan of a block: heads and feed-forward features are split, between them the sequence."""
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None),  # hidden states, positions, mask
            desired_input_layouts=(Replicate(), None, None),
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
        ),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        "feed_forward.w3": ColwiseParallel(),
    }


def apply_tp(model: nn.Module, tp_mesh: DeviceMesh, job_config: JobConfig) -> None:
    apply_tensor_parallel(model, tp_mesh, job_config, tp_plan())


def get_train_spec(flavor: str, **replaced: Any) -> TrainSpec:
    """The spec of the right model, with the fields in `replaced` in the place of its own."""
    spec = TrainSpec(
        model_cls=Model,
        model_args=Args(),
        parallelize_fn=parallelize,
        pipeline_fn=build_pipeline,
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        state_dict_adapter=Adapter,
    )
    return replace(spec, **replaced)


def register(module: str, **replaced: Any) -> None:
    """Register a mutant under the name of its module: the right model with other fields."""
    register_train_spec(
        module.removeprefix("mutants."), lambda flavor: get_train_spec(flavor, **replaced)
    )


def with_layers(
    attention: type[nn.Module] = Attention,
    feed_forward: type[nn.Module] = FeedForward,
    block: type[Block] = Block,
    model: type[Model] = Model,
    norm: type[nn.RMSNorm] = nn.RMSNorm,
) -> type[Model]:
    """The model with other layers. `norm`: those of a block."""
    parts = {"attention_cls": attention, "feed_forward_cls": feed_forward, "norm_cls": norm}
    new_block = type("MutantBlock", (block,), parts)
    return type("MutantModel", (model,), {"block_cls": new_block})


def norm_with_gradient(
    of_weight: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> type[nn.RMSNorm]:
    """A norm with a backward pass of its own: `of_weight(grad, normed)` is its weight's gradient.

    Both arguments are `[..., dim]`.
    """

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, normed, weight):
            ctx.save_for_backward(normed, weight)
            return normed * weight

        @staticmethod
        def backward(ctx, grad):
            normed, weight = ctx.saved_tensors
            return grad * weight, of_weight(grad, normed)

    class Norm(nn.RMSNorm):
        def forward(self, x):
            return Scale.apply(F.rms_norm(x, self.normalized_shape, eps=self.eps), self.weight)

    return Norm


def hf_config() -> dict[str, Any]:
    """The same model as a `config.json` of `LlamaForCausalLM`."""
    args = Args()
    return {
        "model_type": "llama",
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_heads,
        "intermediate_size": args.ffn_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": False,
    }


register_train_spec("base", get_train_spec)
