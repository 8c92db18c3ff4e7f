"""The progress of a run, as saved in checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class TrainState:
    """State of a resumed run besides weights, optimizer, schedule and data position."""

    step: int = 0
    """Optimizer steps done."""
    tokens_seen: int = 0
    """Tokens trained on by all ranks together."""

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step), "tokens_seen": torch.tensor(self.tokens_seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = int(state_dict["step"])
        self.tokens_seen = int(state_dict["tokens_seen"])
