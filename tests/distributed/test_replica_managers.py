"""The ranks of a replica group connect to the server of their own start, not of an earlier one."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from harness import on_ranks

from torchtitan.components.fault_tolerance import Replicas
from torchtitan.config import JobConfig
from torchtitan.errors import OutageError


def _start(folder: Path, lighthouse: str) -> None:
    def manager(**options: object) -> SimpleNamespace:
        """As torchft's: rank 0 makes a server, and the others find its address in a store."""
        address = folder / "address"
        if dist.get_rank() == 0:
            time.sleep(0.2)
            if lighthouse == "away":
                raise RuntimeError("failed to connect: transport error")
            address.write_text("new")
        return SimpleNamespace(address=address.read_text(), load_state_dict=lambda state: None)

    sys.modules["torchft"] = SimpleNamespace(Manager=manager, ProcessGroupGloo=lambda timeout: None)
    config = JobConfig()
    config.fault_tolerance.enable = True
    replicas = Replicas(config)
    if lighthouse == "away":
        with pytest.raises(OutageError, match=r"torchft: failed to connect.*= http://here:1$"):
            replicas.start(0, dict, lambda state: None)
        return
    replicas.start(0, dict, lambda state: None)
    assert replicas._manager.address == "new"


@pytest.mark.parametrize("lighthouse", ["there", "away"])
def test_rank_zero_connects_first(
    lighthouse: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://here:1")
    (tmp_path / "address").write_text("of an earlier start")
    on_ranks(2, _start, tmp_path, lighthouse)
