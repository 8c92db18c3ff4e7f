"""`torchtitan train` on the null GPU, see null_gpu.c. By torchrun or alone.

What depends on numbers that a kernel would have computed is done otherwise: objects travel on the
host, experts get even shares, and a loss may be NaN, since memory is used again as it was left.
NULL_WORLD = N: one process stands for rank 0 of N, whose collectives do nothing, and tells its peak
memory. REFUSE_SYNC: the host may not wait for the device, from the second step on and in
validations.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda._sanitizer import cuda_sanitizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtitan import train
from torchtitan.components import batch_agreement
from torchtitan.components.validate import TextValidator
from torchtitan.config import load_config
from torchtitan.distributed import block_calls, expert_parallel
from torchtitan.distributed.tying import preserve_tying
from torchtitan.runtime.stop_request import StopRequest

STEPS = 3


def main() -> int:
    train.refuse_nonfinite_step = lambda *args: None
    expert_parallel.FakeTensor = torch.Tensor  # of which the load is taken to be even
    dist.send_object_list = _on_host(dist.send_object_list)
    dist.recv_object_list = _on_host(dist.recv_object_list)
    if os.environ.get("REFUSE_SYNC"):
        train.Trainer.train_step = _without_sync(train.Trainer.train_step)
        TextValidator._summed = _refusing_sync(TextValidator._summed)
    if cuda_sanitizer.enabled:
        threading.Thread.run = _watching_streams(threading.Thread.run)
    world_size = os.environ.get("NULL_WORLD")
    return _tell_memory(int(world_size)) if world_size else train.main()


def _on_host(function: Any) -> Any:
    return lambda *args, **options: function(*args, **options | {"device": torch.device("cpu")})


def _without_sync(train_step: Any) -> Any:
    def wrapped(trainer: train.Trainer, stop: StopRequest) -> bool:
        call = train_step if trainer.state.step == 1 else _refusing_sync(train_step)
        return call(trainer, stop)

    return wrapped


def _refusing_sync(function: Any) -> Any:
    def wrapped(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return wrapped


def _watching_streams(run: Any) -> Any:
    """PyTorch's sanitizer watches the main thread and its backward passes, and counts for one."""
    handler, alone = cuda_sanitizer.dispatch.event_handler, threading.Lock()
    launch = handler._handle_kernel_launch

    def counted(*args: Any) -> Any:
        with alone:
            return launch(*args)

    handler._handle_kernel_launch = counted

    def wrapped(thread: threading.Thread) -> None:
        with cuda_sanitizer.dispatch:
            run(thread)

    return wrapped


def _tell_memory(world_size: int) -> int:
    """Print the bytes at the peak of the allocator in the last of some steps, as JSON."""
    os.environ.update(RANK="0", WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    new_group = dist.new_group

    def join(timeout_seconds: int) -> None:
        torch.cuda.set_device(0)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)

    def fake_group(ranks: Any = None, **options: Any) -> Any:
        return new_group(ranks, backend="fake", group_desc=options.get("group_desc"))

    def allocate(model: torch.nn.Module, seed: int, device: torch.device, _: torch.device) -> None:
        with preserve_tying(model):
            model.to_empty(device=device)  # values would be drawn in vain

    def same_on_all(objects: list[Any], own: Any, group: Any = None) -> None:
        objects[:] = [own] * len(objects)

    train.init_distributed = join
    train.initialize_weights = allocate
    dist.new_group = fake_group
    dist.broadcast_object_list = lambda *_, **__: None
    dist.all_gather_object = same_on_all
    # Of sums that add nothing:
    batch_agreement.all_alike = block_calls.all_alike = lambda *_: True
    batch_agreement.BatchAgreement.weighted_digest = lambda *_: 0
    trainer, stop = train.Trainer(load_config(sys.argv[1:])), StopRequest()
    for trainer.state.step in range(1, STEPS + 1):
        torch.cuda.reset_peak_memory_stats()
        trainer.train_step(stop)
    sys.stdout.write(json.dumps({"peak": torch.cuda.max_memory_allocated()}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # threads of the trainer go on


if __name__ == "__main__":
    sys.exit(main())
