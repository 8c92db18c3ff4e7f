"""`tiny_llama` on a device whose process group, as NCCL's, cannot be left after a failure.

Rank 1 fails, as FAILS says: in its second batch by a user's mistake, "data", or by a "bug"; or
before the first step, in its "model", by a Ctrl-C there, "interrupt", or while it is to "load".
"""

import os
import signal
import threading
import time
from dataclasses import replace

import tiny_llama
import torch
import torch.distributed as dist

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.data import build_dataloader
from torchtitan.errors import DataError
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.protocols import TrainSpec, register_train_spec
from torchtitan.runtime import process_group
from torchtitan.train import Trainer

MODEL_CONFIGS = tiny_llama.MODEL_CONFIGS
_close, _destroy, _load = Trainer.close, dist.destroy_process_group, CheckpointManager.load


def _close_on_cuda(self, *args, **kwargs) -> None:
    if os.environ.get("FAILS"):
        process_group.device_type = lambda: "cuda"
    _close(self, *args, **kwargs)


def _wait_forever(group=None) -> None:
    if group is None and os.environ.get("FAILS"):
        time.sleep(1000)
    _destroy(group)


def _fail_before_steps(place) -> None:
    """Fail if this is the place, as if on CUDA, with a thread that an ordinary exit waits for."""
    if os.environ.get("RANK") != "1" or os.environ.get("FAILS") not in place:
        return
    threading.Thread(target=time.sleep, args=(1000,)).start()
    process_group.device_type = lambda: "cuda"
    if os.environ["FAILS"] == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    raise torch.OutOfMemoryError(f"in the {os.environ['FAILS']}")


def _failing_load(self) -> int:
    _fail_before_steps(("load",))
    return _load(self)


class FailingModel(Llama3Model):
    def init_weights(self) -> None:
        _fail_before_steps(("model", "interrupt"))
        super().init_weights()


CheckpointManager.load = _failing_load
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
        model_cls=FailingModel,
        build_dataloader_fn=lambda *args: FailingLoader(build_dataloader(*args)),
    )


register_train_spec("stuck_nccl_llama", get_train_spec)
