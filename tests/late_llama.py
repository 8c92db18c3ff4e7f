"""`tiny_llama` one rank of which sleeps: LATE="data R S N" or LATE="forward R S N": S seconds on
rank R in its N-th batch or forward pass; N = 0: in each.
"""

import os
import time
from dataclasses import replace

import tiny_llama

from torchtitan.components.loss import build_loss
from torchtitan.data import build_dataloader
from torchtitan.protocols import TrainSpec, register_train_spec

MODEL_CONFIGS = tiny_llama.MODEL_CONFIGS


class _Late:
    def __init__(self, part: str, inner) -> None:
        where, rank, seconds, number = os.environ.get("LATE", "data -1 0 0").split()
        self._here = where == part and rank == os.environ.get("RANK", "0")
        self._seconds, self._number = float(seconds), int(number)
        self._inner = inner
        self._calls = 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def _maybe_sleep(self) -> None:
        self._calls += 1
        if self._here and self._number in (0, self._calls):
            time.sleep(self._seconds)


class LateLoader(_Late):
    def __next__(self):
        self._maybe_sleep()
        return next(self._inner)


class LateLoss(_Late):
    def __call__(self, pred, labels):
        self._maybe_sleep()
        return self._inner(pred, labels)


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(
        tiny_llama.get_train_spec(flavor),
        build_dataloader_fn=lambda *args: LateLoader("data", build_dataloader(*args)),
        build_loss_fn=lambda config: LateLoss("forward", build_loss(config)),
    )


register_train_spec("late_llama", get_train_spec)
