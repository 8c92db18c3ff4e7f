"""What a stage of a pipeline hands on."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from torchtitan.distributed.pipeline_parallel import _Stage
from torchtitan.errors import ConfigError


def test_what_is_handed_on_has_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks received it into a part of their buffers, and kept the rest."""
    monkeypatch.setattr(PipelineStage, "get_fwd_send_ops", lambda stage, chunk: [chunk])
    stage = object.__new__(_Stage)
    stage.stage_index, stage.num_stages = 0, 2
    hidden = torch.zeros(1, 4, 8)
    stage.fwd_cache = {0: ((hidden, hidden[:, :3]), ()), 1: ((hidden, hidden[:, :2]), ())}
    assert stage.get_fwd_send_ops(0) == stage.get_fwd_send_ops(0) == [0]
    with pytest.raises(ConfigError, match=r"\[1, 4, 8\], \[1, 2, 8\]\], but of .*\[1, 3, 8\]\] in"):
        stage.get_fwd_send_ops(1)
