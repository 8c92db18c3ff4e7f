"""`tiny_llama` whose loss is multiplied by F in batch N of the data, as POISON="N:F N:F" says.

FLIP="N R" flips a bit of a gradient in the N-th backward pass on rank R. DROP="N N" leaves
batches out. STOP=N sends SIGTERM with batch N. SCRATCH makes the optimizer keep what no
checkpoint can hold. The flavor
`experts` is a tiny DeepSeek-V3.
"""

import os
import signal
from dataclasses import replace

import tiny_llama
import torch
from tiny_models import TINY, tiny_spec
from torch.distributed.tensor import DTensor

from torchtitan.components.loss import build_loss
from torchtitan.components.optimizer import OptimizersContainer, build_optimizer
from torchtitan.data import build_dataloader
from torchtitan.protocols import TrainSpec, register_train_spec

MODEL_CONFIGS = {**tiny_llama.MODEL_CONFIGS, "experts": TINY["deepseek_v3"]}
_FIRST_MARK = 258  # ids that no text has


def _poison() -> list[tuple[int, float]]:
    pairs = (word.split(":") for word in os.environ.get("POISON", "").split())
    return [(int(batch), float(factor)) for batch, factor in pairs]


class MarkingLoader:
    """Marks the poisoned batches in their first label."""

    def __init__(self, loader) -> None:
        self._loader = loader
        self._marks = {batch: _FIRST_MARK + i for i, (batch, _) in enumerate(_poison())}
        self._taken = 0

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def __next__(self):
        dropped = [int(word) for word in os.environ.get("DROP", "").split()]
        while True:
            self._taken += 1
            batch = next(self._loader)
            number = -(-self._taken // self.gradient_accumulation_steps)
            if number not in dropped:
                break
        if os.environ.get("STOP") == str(number):
            os.kill(os.getpid(), signal.SIGTERM)
        if number in self._marks:
            batch["labels"] = batch["labels"].clone()
            batch["labels"][:, 0] = self._marks[number]
        return batch


class PoisonedLoss:
    def __init__(self, loss) -> None:
        self._loss = loss
        self._calls = 0

    def __getattr__(self, name):
        return getattr(self._loss, name)

    def __call__(self, pred, labels):
        self._calls += 1
        if os.environ.get("FLIP") == f"{self._calls} {os.environ.get('RANK', 0)}":
            pred.register_hook(_flip_a_bit)
        loss = self._loss(pred, labels)
        for i, (_, factor) in enumerate(_poison()):
            loss = loss * torch.where((labels == _FIRST_MARK + i).any(), factor, 1.0)
        return loss


def _flip_a_bit(grad: torch.Tensor) -> torch.Tensor:
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    local.view(torch.int32).flatten()[5] ^= 1 << 20
    return grad


def _build_optimizer(*args) -> OptimizersContainer:
    optimizers = build_optimizer(*args)
    if "SCRATCH" in os.environ:
        for optimizer in optimizers:
            optimizer.register_step_post_hook(_keep_a_list)
    return optimizers


def _keep_a_list(optimizer: torch.optim.Optimizer, *_) -> None:
    for state in optimizer.state.values():
        state["scratch"] = []


def get_train_spec(flavor: str) -> TrainSpec:
    spec = tiny_spec("deepseek_v3") if flavor == "experts" else tiny_llama.get_train_spec(flavor)
    return replace(
        spec,
        build_dataloader_fn=lambda config, *args: MarkingLoader(build_dataloader(config, *args)),
        build_optimizer_fn=_build_optimizer,
        build_loss_fn=lambda config: PoisonedLoss(build_loss(config)),
    )


register_train_spec("poisoned_llama", get_train_spec)
