"""Tells what would save memory when a run has too little."""

from __future__ import annotations

import torch

from torchtitan.config import JobConfig


def add_memory_advice(error: BaseException, job_config: JobConfig) -> None:
    """Add to an error of too little memory, which Python shows with it, what the job could try.

    The options are those of docs/debugging.md, without the ones that the job has already.
    """
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if not (on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)):
        return
    training = job_config.training
    ways = {
        'loss.name = "chunked_cross_entropy"': job_config.loss.name == "cross_entropy",
        'activation_checkpoint.mode = "full"': job_config.activation_checkpoint.mode != "full",
        "a smaller training.local_batch_size with the same global_batch_size": (
            training.local_batch_size > 1
        ),
        "more shards": True,
        "training.enable_cpu_offload": not (on_cpu or training.enable_cpu_offload),
    }
    open_to = ", ".join(way for way, is_open in ways.items() if is_open)
    error.add_note(
        f"To save memory, try in this order: {open_to}. 'torchtitan plan' tells before a run what "
        "each rank needs (docs/debugging.md, docs/planning.md)"
    )
