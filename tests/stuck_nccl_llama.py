"""`tiny_llama` on a device whose process group, as NCCL's, cannot be left after a failure.

Rank 1 fails in its second batch: FAILS="data", by a user's mistake, or FAILS="bug".
"""

import os
import time
from dataclasses import replace

import tiny_llama
import torch
import torch.distributed as dist

from torchtitan.data import build_dataloader
from torchtitan.errors import DataError
from torchtitan.protocols import TrainSpec, register_train_spec
from torchtitan.train import Trainer

MODEL_CONFIGS = tiny_llama.MODEL_CONFIGS
_close, _destroy = Trainer.close, dist.destroy_process_group


def _close_on_cuda(self, *args, **kwargs) -> None:
    self.device = torch.device("cuda")
    _close(self, *args, **kwargs)


def _wait_forever(group=None) -> None:
    if group is None and os.environ.get("FAILS"):
        time.sleep(1000)
    _destroy(group)


Trainer.close = _close_on_cuda
dist.destroy_process_group = _wait_forever


class FailingLoader:
    def __init__(self, inner) -> None:
        self._inner, self._calls = inner, 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __next__(self):
        self._calls += 1
        if self._calls == 2 and os.environ.get("RANK") == "1" and "FAILS" in os.environ:
            raise {"data": DataError, "bug": ValueError}[os.environ["FAILS"]]("the second batch")
        return next(self._inner)


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(
        tiny_llama.get_train_spec(flavor),
        build_dataloader_fn=lambda *args: FailingLoader(build_dataloader(*args)),
    )


register_train_spec("stuck_nccl_llama", get_train_spec)
