"""On one device, autocast turns each weight into bfloat16 once a step, not once a micro-batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from harness import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.config import load_config
from torchtitan.runtime.stop_request import StopRequest
from torchtitan.train import Trainer

CONFIG = [
    *["--training.seq_len=32", "--training.local_batch_size=2", "--training.steps=3"],
    *["--training.mixed_precision_param=bfloat16", "--optimizer.lr=1e-3"],
    *["--job.custom_import=tiny_llama", "--model.name=tiny_llama", "--model.flavor=tiny"],
    "--activation_checkpoint.mode=none",
]


class Casts(TorchDispatchMode):
    """How often each parameter is cast, by its place in memory."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.places = {parameter.data_ptr() for parameter in parameters}
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.places:
            self.count[args[0].data_ptr()] += 1
        return func(*args, **kwargs or {})


def steps(global_batch_size: int, folder: str) -> None:
    options = [f"--training.global_batch_size={global_batch_size}", f"--job.dump_folder={folder}"]
    trainer = Trainer(load_config([*CONFIG, *options]))
    stop = StopRequest()
    matrices = [p for p in trainer._parameters() if p.ndim == 2]
    for step in (1, 2):  # the second has the weights that the first has made
        trainer.state.step = step
        with Casts(matrices) as casts:
            trainer.train_step(stop)
        # All but the embedding, which is looked up and not multiplied.
        assert len(casts.count) == len(matrices) - 1
        assert set(casts.count.values()) == {1}, casts.count
    stop.close()
    trainer.close()


@pytest.mark.parametrize("global_batch_size", [2, 8])
def test_each_weight_is_cast_once_a_step(global_batch_size: int, tmp_path) -> None:
    run_ranks(steps, 1, global_batch_size, str(tmp_path))
