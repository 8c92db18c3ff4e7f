"""What FSDP gathers in a step: each group of parameters once for a use, and nothing in vain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import run_ranks

from torchtitan.config import load_config
from torchtitan.distributed.collective_observer import CollectiveObserver
from torchtitan.runtime.stop_request import StopRequest
from torchtitan.train import Trainer

RANKS, BATCH, LAYERS = 2, 2, 4
CONFIG = [
    *["--training.seq_len=32", f"--training.local_batch_size={BATCH}", "--training.steps=3"],
    *["--job.custom_import=tiny_llama", "--model.name=tiny_llama", "--model.flavor=tiny"],
    *["--activation_checkpoint.mode=none", "--training.mixed_precision_param=float32"],
]


def gathers_of_a_step(micro_batches: int, folder: str) -> tuple[Counter[int], int, int]:
    """How often each size (of a rank's share) is gathered; the sizes of head and embedding."""
    batch = BATCH * RANKS * micro_batches
    options = [f"--training.global_batch_size={batch}", f"--job.dump_folder={folder}"]
    trainer = Trainer(load_config([*CONFIG, *options]))
    count: Counter[int] = Counter()

    def observe(name: str, inputs: list[torch.Tensor], call: Callable[[], Any]) -> Any:
        if name.startswith("_allgather_base"):
            count[sum(t.numel() for t in inputs)] += 1
        return call()

    stop = StopRequest()
    for step in (1, 2):  # of the first, FSDP learns the order
        trainer.state.step = step
        count.clear()
        with CollectiveObserver(observe):
            trainer.train_step(stop)
    model: Any = trainer.model_parts[0]
    head = sum(p.to_local().numel() for m in (model.norm, model.output) for p in m.parameters())
    embedding = model.tok_embeddings.weight.to_local().numel()
    stop.close()
    trainer.close()
    return count, head, embedding


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_head_and_embedding_are_gathered_once_a_micro_batch(micro_batches: int, tmp_path) -> None:
    """The head stays until the backward pass, which begins with it. That of a table needs none."""
    count, *sizes = run_ranks(gathers_of_a_step, RANKS, micro_batches, str(tmp_path))[0]
    assert len(set(sizes)) == 2 and [count[size] for size in sizes] == [micro_batches] * 2, count
    layers = {size: times for size, times in count.items() if size not in sizes}
    assert set(layers.values()) == {2 * LAYERS * micro_batches}, count
