"""Too little memory names the options that save some, and only those that the job lacks."""

from __future__ import annotations

import traceback

import pytest
import torch

from torchtitan.components.out_of_memory import add_memory_advice
from torchtitan.config import JobConfig


def _shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _real_cpu_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


def test_an_error_of_the_device_names_what_the_job_lacks() -> None:
    error, config = torch.OutOfMemoryError("CUDA out of memory."), JobConfig()
    config.loss.name = "chunked_cross_entropy"
    config.training.local_batch_size = 1
    add_memory_advice(error, config)
    shown = _shown(error)
    assert 'try in this order: activation_checkpoint.mode = "full", more shards, ' in shown
    assert "more shards, training.enable_cpu_offload." in shown


def test_an_error_of_the_host_is_one_too() -> None:
    error = _real_cpu_error()
    add_memory_advice(error, JobConfig())
    shown = _shown(error)
    assert 'try in this order: loss.name = "chunked_cross_entropy", ' in shown
    assert "enable_cpu_offload" not in shown


def test_other_errors_stay_as_they_are() -> None:
    error = RuntimeError("shape mismatch")
    add_memory_advice(error, JobConfig())
    assert not hasattr(error, "__notes__")
