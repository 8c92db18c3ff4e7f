"""Blocks that the compiler must split are compiled inside of their checkpoints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.config import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.expert_parallel import moe_layers
from torchtitan.protocols.train_spec import get_train_spec

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
GROUPED = torch.ops.aten._grouped_mm.default
MATMUL = torch.ops.aten.mm.default


class Calls(TorchDispatchMode):
    """Counts operations, those of compiled code included: its backend is `aot_eager`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Ran:
    out: torch.Tensor
    gradients: list[torch.Tensor]
    compiled: int
    """Operations in the graphs of the compiler."""
    backward: Counter[Any]
    """Operations of the backward pass, recomputation included."""


@cache
def run(checkpointing: str, scope: str | None = "block") -> Ran:
    """Two blocks with experts, whose float32 the compiler does not know, forward and backward.

    Args:
        scope: of the compiler; None: eager.
    """
    config = JobConfig()
    config.training.mixed_precision_param = "float32"
    config.activation_checkpoint.mode = checkpointing
    config.compile.enable, config.compile.backend = scope is not None, "aot_eager"
    config.compile.scope = scope or "block"
    spec = get_train_spec("qwen3", "debugmodel_moe")
    torch.manual_seed(0)
    model: Any = spec.model_cls(replace(spec.model_args, n_layers=2))
    model.init_weights()
    tokens = torch.randint(spec.model_args.vocab_size, (1, 16))
    apply_ac(model, config)
    model = apply_compile(model, config)
    torch._dynamo.reset()
    counters.clear()
    out = model(tokens)
    with Calls() as backward:
        out.square().mean().backward()
    gradients = [param.grad for param in model.parameters()]
    return Ran(out.detach(), gradients, counters["stats"]["calls_captured"], backward.calls)


@pytest.mark.parametrize(
    ("checkpointing", "scope"),
    [
        ("full", "model"),
        ("selective", "block"),
        pytest.param("full", "block", marks=pytest.mark.long),
        pytest.param("selective", "model", marks=pytest.mark.long),
    ],
)
def test_checkpointed_blocks_are_compiled(checkpointing: str, scope: str) -> None:
    found, eager = run(checkpointing, scope), run("none", None)
    # All but attention's kernel, which the policy of selective checkpointing is to see.
    kernel = checkpointing == "selective"
    assert found.compiled >= run("none").compiled - kernel > 40
    torch.testing.assert_close(found.out, eager.out)
    torch.testing.assert_close(found.gradients, eager.gradients)


def test_per_op_keeps_attention_and_every_other_product_of_experts() -> None:
    none, full, selective = (run(mode).backward for mode in ("none", "full", "selective"))
    assert (none[ATTENTION], full[ATTENTION], selective[ATTENTION]) == (0, 2, 0)
    experts = [calls[GROUPED] - none[GROUPED] for calls in (full, selective)]
    assert experts == [2 * 3, 2 * 1]
    # What compiled code computes is none of the policy's, which keeps every other product.
    assert full[MATMUL] == selective[MATMUL] > none[MATMUL]


def test_layers_below_all_trained_ones_are_compiled() -> None:
    """PyTorch refused to recompute their attention, which has no backward pass."""
    config = JobConfig()
    config.activation_checkpoint.mode = "full"
    config.compile.enable, config.compile.backend = True, "aot_eager"
    model = tiny_model("llama3, tied")
    for part in (model.tok_embeddings, model.layers["0"]):
        part.requires_grad_(False)
    apply_ac(model, config)
    model = apply_compile(model, config)
    model(tiny_tokens(1, 16)).square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_experts_in_a_pipeline_count_all_micro_batches_in_flight() -> None:
    """Where compiled code recomputed attention, the second backward pass was refused."""
    config = JobConfig()
    config.activation_checkpoint.mode = "full"
    config.compile.enable, config.compile.backend = True, "aot_eager"
    config.parallelism.pipeline_parallel_degree = 2
    model = tiny_model("qwen3, experts", n_layers=1)
    apply_ac(model, config)
    model = apply_compile(model, config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = [model(tiny_tokens(1, 16)) for _ in range(2)]
    for out in outs:
        out.float().square().mean().backward()
    (moe,) = moe_layers(model)
    assert moe.router.tally.sum() == 2 * 16 * moe.args.top_k
