"""Run folders for the tests of `torchtitan report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchtitan.config import load_config, to_toml

VALUES = {
    "grad_norm": 0.5,
    "lr": 1e-3,
    "tokens_per_second": 4000.0,
    "tokens_per_second_per_device": 2000.0,
    "peak_memory_bytes": 3 * 2**30,
    "data_wait_seconds": 0.01,
}


def write_run(
    folder: Path, losses: list[float | None], *options: str, every: int = 1, **more: Any
) -> Path:
    """A run that logged these losses; `more` are further keys, with their value at each step."""
    folder.mkdir(parents=True)
    steps = max(len(losses) * every, 1)
    config = load_config([f"--training.steps={steps}", *options])
    (folder / "config.resolved.toml").write_text(to_toml(config))
    facts = {"torch": "2.13.0", "device": "cuda (H100)", "host": "node1", "processes": "2"}
    (folder / "environment.json").write_text(json.dumps(facts))
    with (folder / "metrics.jsonl").open("w") as file:
        for number, loss in enumerate(losses, start=1):
            row = {"step": number * every, "loss": loss} | VALUES | more
            file.write(json.dumps(row | {"elapsed_seconds": 0.1 * number}) + "\n")
    return folder
