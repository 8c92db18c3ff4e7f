"""Compare the trainer's tokens per second with those of a bare PyTorch loop.

Both train the same model from the same weights on the same batches, in one process, by turns: a few
steps of one, as many of the other. Disturbances of the machine that last longer than a turn affect
both; the result is the ratio of neighbouring turns. Equal losses show that both do the same work.

    python -m benchmarks.trainer [--config benchmarks/configs/debugmodel.toml] [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare_loop import BareLoop, MicroBatch
from benchmarks.report import Bar, Spread, Table, verdict
from torchtitan.config import JobConfig, load_config
from torchtitan.protocols.train_spec import train_spec_of
from torchtitan.runtime.stop_request import StopRequest
from torchtitan.train import Trainer

CONFIGS = Path(__file__).parent / "configs"
TARGET = 0.98
WARMUP_STEPS = 3
LOSS_TOLERANCE = 1e-4


@dataclass
class Times:
    """Seconds of each turn: elapsed time and processor time (all threads)."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.wall.append(end[0] - start[0])
        self.cpu.append(end[1] - start[1])


@dataclass
class Comparison:
    """The result of `compare`."""

    name: str
    tokens_per_turn: int
    trainer: Times
    bare: Times
    loss_difference: float
    """Largest relative difference of a logged loss."""

    def ratio(self, clock: str) -> Spread:
        """Return the trainer's tokens a second over the bare loop's, by `wall` or `cpu`."""
        return Spread.of_ratios(getattr(self.bare, clock), getattr(self.trainer, clock))

    def rate(self, times: Times) -> Spread:
        return Spread.of([self.tokens_per_turn / seconds for seconds in times.wall])


class AlternatingTrainer(Trainer):
    """A trainer that hands over to the bare loop every `steps_per_turn` steps.

    A turn of the trainer contains its whole loop: fetching data, the step, logging, garbage
    collection. Training runs one step more than the turns need, since the last turn ends when that
    step begins.
    """

    def __init__(self, job_config: JobConfig, rounds: int, steps_per_turn: int) -> None:
        job_config.training.steps = WARMUP_STEPS + rounds * steps_per_turn + 1
        super().__init__(job_config)
        self.times, self.bare_times = Times(), Times()
        self.bare_losses: list[torch.Tensor] = []
        self._steps_per_turn = steps_per_turn
        self._resumed: tuple[float, float] | None = None
        self._bare = self._bare_loop()
        self._batches = iter(self._read_batches())

    def train_step(self, stop: StopRequest) -> bool:
        done = self.state.step - 1 - WARMUP_STEPS
        if done == -WARMUP_STEPS:
            self._run_bare(WARMUP_STEPS)
        if done >= 0 and done % self._steps_per_turn == 0:
            now = self._now()
            if self._resumed is not None:
                self.times.add(self._resumed, now)
            if self.state.step < self.job_config.training.steps:
                self._run_bare(self._steps_per_turn)
                end = self._now()
                self.bare_times.add(now, end)
                self._resumed = end
        return super().train_step(stop)

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def _run_bare(self, steps: int) -> None:
        for _ in range(steps):
            self.bare_losses.append(self._bare.step(next(self._batches)))

    def _bare_loop(self) -> BareLoop:
        config = self.job_config
        spec = train_spec_of(config)
        model = spec.model_cls(spec.model_args.update_from_config(config)).to(self.device)
        model.load_state_dict(self.model_parts[0].state_dict())
        optimizer = config.optimizer
        return BareLoop(
            model,
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            max_norm=config.training.max_norm,
            dtype=getattr(torch, config.training.mixed_precision_param),
            compile_model=config.compile.enable,
        )

    def _read_batches(self) -> list[list[MicroBatch]]:
        """Read all steps' micro-batches into memory, so that the bare loop waits for no data."""
        config = self.job_config
        spec = train_spec_of(config)
        loader = spec.build_dataloader_fn(config, spec.build_tokenizer_fn(config), 0, 1)
        steps = []
        for _ in range(config.training.steps):
            batches = [next(loader) for _ in range(self.batch_sizes.passes(1))]
            steps.append([(batch["tokens"], batch["labels"]) for batch in batches])
        loader.close()
        return steps


def compare(config_file: Path, rounds: int, steps_per_turn: int) -> Comparison:
    """Train by turns according to a config.

    Raises:
        RuntimeError: the losses differ, so the two loops did not do the same work.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ["--job.config_file", str(config_file), "--job.dump_folder", folder]
        config = load_config([*options, "--metrics.progress", "plain"])
        trainer = AlternatingTrainer(config, rounds, steps_per_turn)
        trainer.train()
        if len(trainer.times.wall) < rounds:
            raise RuntimeError("the training was stopped")
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()

    difference = _loss_difference([json.loads(line) for line in lines], trainer.bare_losses)
    if difference > LOSS_TOLERANCE:
        raise RuntimeError(f"the losses of trainer and bare loop differ by {difference:.1e}")
    tokens = trainer.batch_sizes.largest * config.training.seq_len * steps_per_turn
    return Comparison(config_file.stem, tokens, trainer.times, trainer.bare_times, difference)


def _loss_difference(logged: list[dict[str, Any]], bare: list[torch.Tensor]) -> float:
    """Return the largest difference; the trainer logs the mean loss since it logged last."""
    differences, previous = [], 0
    for line in logged:
        if line["step"] > len(bare):  # the trainer's last step
            break
        mean = torch.stack(bare[previous : line["step"]]).mean().item()
        differences.append(abs(line["loss"] - mean) / mean)
        previous = line["step"]
    return max(differences)


def table(comparisons: list[Comparison]) -> Table:
    rows = []
    for c in comparisons:
        ratio = c.ratio("wall")
        rows.append(
            [
                c.name,
                str(c.rate(c.trainer)),
                str(c.rate(c.bare)),
                f"**{ratio.median:.3f}** ({ratio.low:.3f} to {ratio.high:.3f})",
                f"{c.ratio('cpu').median:.3f}",
                str(len(c.trainer.wall)),
                f"{c.loss_difference:.0e}",
                verdict(ratio.median, at_least=TARGET),
            ]
        )
    return Table(
        "Trainer against a bare loop",
        [
            "config",
            "trainer, tokens/s",
            "bare loop, tokens/s",
            "ratio",
            "ratio by CPU time",
            "rounds",
            "loss difference",
            "target",
        ],
        rows,
        "Median (lowest to highest) over the rounds. A round is a turn of each; its ratio is that "
        "of its two turns. CPU time, of all threads, is less disturbed by other processes.",
        [Bar(c.name, c.ratio("wall"), TARGET) for c in comparisons],
        "tokens/s of the trainer over those of the bare loop",
    )


def run(quick: bool = False) -> list[Table]:
    """Run the configs of the CPU suite."""
    plans = [("debugmodel", 15, 5), ("layers_150m", 11, 2), ("layers_1b", 7, 2)]
    if quick:
        plans = [("debugmodel", 2, 1)]
    return [table([compare(CONFIGS / f"{name}.toml", *plan) for name, *plan in plans])]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "debugmodel.toml")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps-per-turn", type=int, default=5)
    args = parser.parse_args(argv)
    print(table([compare(args.config, args.rounds, args.steps_per_turn)]).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
