"""Where collectives can be observed: not beside compiled code, which flex attention is."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from torchtitan.components.stragglers import Stragglers
from torchtitan.config import JobConfig, load_config
from torchtitan.distributed.collective_observer import can_be_observed
from torchtitan.errors import ConfigError
from torchtitan.protocols.train_spec import get_train_spec

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def case(name: str, *options: str) -> tuple[list[nn.Module], JobConfig]:
    config = load_config(["--training.seq_len=4096", *options])
    spec = get_train_spec(name, "debugmodel")
    with torch.device("meta"):
        model = spec.model_cls(spec.model_args.update_from_config(config))
    return [model], config


@pytest.mark.parametrize(
    ("name", "options", "observable"),
    [
        ("llama3", [], True),
        ("llama3", ["--training.document_mask"], False),
        ("llama3", ["--training.document_mask", "--model.attention=sdpa"], True),
        ("llama3", ["--model.attention=flex"], False),
        ("llama3", ["--compile.enable"], False),
        ("gemma3", [], False),  # its window is shorter
        ("gemma3", ["--model.attention=sdpa"], True),
    ],
)
def test_what_can_be_observed_on_a_gpu(name: str, options: list[str], observable: bool) -> None:
    assert can_be_observed(*case(name, *options), CUDA) is observable


def test_a_cpu_has_no_flex_attention() -> None:
    assert can_be_observed(*case("gemma3", "--training.document_mask"), CPU)


def test_timing_what_cannot_be_timed_is_refused() -> None:
    parts, config = case("llama3", "--training.document_mask", "--metrics.straggler_freq=10")
    Stragglers(config, parts, CPU)
    with pytest.raises(ConfigError, match=r"straggler_freq = 10: .*flex attention.* Use 0"):
        Stragglers(config, parts, CUDA)
