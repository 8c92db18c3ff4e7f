"""Folders as a training run leaves them, without the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchtitan.config import load_config, to_toml

SMALL = ("--training.seq_len=64", "--training.mixed_precision_param=float32")
BATCH = ("--training.local_batch_size=2", "--training.global_batch_size=4")


def write_run(
    folder: Path,
    losses: list[float | None],
    *options: str,
    processes: int = 1,
    grad_norms: list[float | None] | None = None,
) -> Path:
    """A finished run whose steps had these losses; gradient norms are 1 by default."""
    config = load_config([*SMALL, *BATCH, "--metrics.log_freq=1", "--training.steps=3", *options])
    folder.mkdir(parents=True)
    (folder / "config.resolved.toml").write_text(to_toml(config))
    grad_norms = grad_norms or [1.0] * len(losses)
    with (folder / "metrics.jsonl").open("w") as file:
        for step, (loss, norm) in enumerate(zip(losses, grad_norms, strict=True), start=1):
            row: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": norm}
            row |= {"tokens_per_second": 100.0 * processes, "tokens_per_second_per_device": 100.0}
            row |= {"tokens_seen": step * 4 * config.training.seq_len}
            file.write(json.dumps(row) + "\n")
    return folder


def write_config(path: Path, *options: str) -> Path:
    """A TOML file for a job."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(load_config([*SMALL, *BATCH, "--training.steps=3", *options])))
    return path
