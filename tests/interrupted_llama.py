"""`tiny_llama` whose rank R gets the signal S during step N, as INTERRUPT="S N R" says."""

import os
import signal
from dataclasses import replace

import tiny_llama

from torchtitan.data import build_dataloader
from torchtitan.protocols import TrainSpec, register_train_spec

MODEL_CONFIGS = tiny_llama.MODEL_CONFIGS


class InterruptingLoader:
    def __init__(self, loader) -> None:
        self._loader = loader
        name, step, rank = os.environ.get("INTERRUPT", "SIGTERM 0 0").split()
        self._signal, self._batch = signal.Signals[name], int(step)
        self._here = rank == os.environ.get("RANK", "0")
        self._batches = 0

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def __next__(self):
        self._batches += 1
        if self._here and self._batches == self._batch * self.gradient_accumulation_steps:
            os.kill(os.getpid(), self._signal)
        return next(self._loader)


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(
        tiny_llama.get_train_spec(flavor),
        build_dataloader_fn=lambda *args: InterruptingLoader(build_dataloader(*args)),
    )


register_train_spec("interrupted_llama", get_train_spec)
