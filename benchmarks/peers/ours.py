"""This package's trainer as a contestant: `python -m benchmarks.peers.ours PLAN`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.turns import Turns
from torchtitan.config import load_config
from torchtitan.runtime.stop_request import StopRequest
from torchtitan.train import Batch, Trainer


class Contestant(Trainer):
    turns: Turns

    def train_step(self, stop: StopRequest) -> Any:
        self.turns.before_step()
        return super().train_step(stop)

    def forward_backward(self, batch: Batch, global_tokens: torch.Tensor) -> torch.Tensor:
        loss = super().forward_backward(batch, global_tokens)
        self.turns.losses.append(loss)
        return loss


def main(plan_file: str) -> None:
    plan = json.loads(Path(plan_file).read_text())
    turns = Turns(plan)
    # It prepares its own batches from text, which the others find ready.
    options = ["--job.config_file", plan["config"], "--job.dump_folder", plan["folder"]]
    options += ["--training.steps", str(plan["steps"]), "--metrics.progress", "plain"]
    options += ["--job.custom_import", "benchmarks.flavors"]
    options += ["--model.name", "benchmark_llama3", "--model.flavor", plan["flavor"]]
    options += ["--training.mixed_precision_param", plan["precision"]]
    if plan["compile"]:
        options += ["--compile.enable"]
    trainer = Contestant(load_config(options))
    trainer.turns = turns
    trainer.train()
    turns.finish()


if __name__ == "__main__":
    main(sys.argv[1])
