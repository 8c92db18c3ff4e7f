"""Measure how long training pauses for a checkpoint, saved at once and in the background.

One trainer alternates between saving at once, in the background, and at once without checksums, so
all of them are compared in one process, on one file system, with the same state (0.5 GB: weights
and moments of AdamW). Steps of training are timed with and without a save in the background.
Finally, checkpoints are loaded with and without checking their checksums.

    python -m benchmarks.checkpoint [--folder /dev/shm] [--rounds 7]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from benchmarks.report import Spread, Table, verdict
from torchtitan.components.checkpoint import storage
from torchtitan.components.checkpoint.background import HostCopy
from torchtitan.config import JobConfig, load_config
from torchtitan.runtime.stop_request import StopRequest
from torchtitan.train import Trainer

STALL_TARGET = 0.10


@dataclass
class Samples:
    """Seconds of each round."""

    blocking: list[float] = field(default_factory=list)
    """A save that training waits for."""
    without_checksums: list[float] = field(default_factory=list)
    """The same, without computing checksums."""
    stall: list[float] = field(default_factory=list)
    """Time that training waits for a save in the background: the call, and the optimizer step's
    wait for the copy of the state."""
    lost: list[float] = field(default_factory=list)
    """The stall, plus the slowdown of steps until the save is complete."""
    background: list[float] = field(default_factory=list)
    """From the end of the call until the save is complete."""
    step: list[float] = field(default_factory=list)
    """A step of training while nothing is being saved."""
    first_step: list[float] = field(default_factory=list)
    """The step in which the state is copied."""
    step_meanwhile: list[float] = field(default_factory=list)
    """Each later step during the save in the background."""
    load: list[float] = field(default_factory=list)
    load_without_checksums: list[float] = field(default_factory=list)


class SavingTrainer(Trainer):
    """A trainer whose steps and saves are called from outside."""

    def begin(self) -> None:
        self.metrics.start()
        self._stop = StopRequest()

    def step(self) -> None:
        self.state.step += 1
        self.train_step(self._stop)

    def end(self) -> None:
        self._stop.close()
        self.metrics.close()
        self.close()


def measure(folder: Path, flavor: str, rounds: int) -> tuple[Samples, int]:
    """Return the samples, and the bytes of a checkpoint."""
    trainer = SavingTrainer(_config(folder, flavor))
    trainer.begin()
    config, samples = trainer.job_config.checkpoint, Samples()
    no_checksum = SimpleNamespace(crc32=lambda *_: 0)
    for number in range(-1, rounds):  # the first round is not counted
        counted = samples if number >= 0 else Samples()
        config.async_mode = "disabled"
        trainer.step()  # each save is of another step
        counted.blocking.append(_seconds(lambda: _save(trainer)))
        trainer.step()
        with mock.patch.object(storage, "zlib", no_checksum):
            counted.without_checksums.append(_seconds(lambda: _save(trainer)))
        counted.step += [_seconds(trainer.step) for _ in range(3)]

        config.async_mode = "async"
        trainer.step()
        with _waits_for_copy() as waits:
            stall = _seconds(lambda: _save(trainer))
            start = time.perf_counter()
            saves = trainer.checkpointer._background
            steps = [_seconds(trainer.step)]
            counted.stall.append(stall + waits.pop(0))
            while not saves.done:
                steps.append(_seconds(trainer.step))
            trainer.checkpointer.wait()
            counted.background.append(time.perf_counter() - start)
            undisturbed = statistics.median(counted.step[-3:])
            counted.lost.append(stall + sum(steps) - len(steps) * undisturbed)
            counted.first_step.append(steps[0])
            counted.step_meanwhile += steps[1:]

    config.async_mode = "disabled"
    _save(trainer)
    checkpoint = trainer.checkpointer.newest()
    size = sum(storage.sizes_in(checkpoint).values())
    for verify in [True, False] * (rounds + 1):
        config.verify = verify
        times = samples.load if verify else samples.load_without_checksums
        times.append(_seconds(trainer.checkpointer.load))
    del samples.load[0], samples.load_without_checksums[0]
    trainer.end()
    return samples, size


def _config(folder: Path, flavor: str) -> JobConfig:
    return load_config(
        [
            *["--job.custom_import=benchmarks.flavors", f"--job.dump_folder={folder}"],
            *["--model.name=benchmark_llama3", f"--model.flavor={flavor}"],
            *["--training.seq_len=64", "--training.local_batch_size=1"],
            *["--training.steps=1000000", "--checkpoint.enable", "--checkpoint.interval=1"],
            *["--checkpoint.keep_latest_k=1", "--metrics.log_freq=1000000"],
        ]
    )


@contextmanager
def _waits_for_copy() -> Iterator[list[float]]:
    """Yield the seconds that each optimizer step waits until the state has been copied."""
    waits: list[float] = []
    wait = HostCopy.synchronize_staging

    def timed(stager: HostCopy) -> None:
        waits.append(_seconds(lambda: wait(stager)))

    with mock.patch.object(HostCopy, "synchronize_staging", timed):
        yield waits


def _save(trainer: SavingTrainer) -> None:
    trainer.checkpointer.save(trainer.state.step)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def table(folder: Path, flavor: str, rounds: int) -> Table:
    folder = Path(tempfile.mkdtemp(prefix="torchtitan-benchmark-", dir=folder))
    try:
        samples, size = measure(folder, flavor, rounds)
    finally:
        shutil.rmtree(folder)
    blocking = Spread.of(samples.blocking)
    share = Spread.of_ratios(samples.stall, samples.blocking)
    lost = Spread.of(samples.lost)
    pairs = zip(samples.blocking, samples.without_checksums, strict=True)
    checksums = Spread.of([with_ - without for with_, without in pairs])
    pairs = zip(samples.load, samples.load_without_checksums, strict=True)
    verified = Spread.of([with_ - without for with_, without in pairs])
    target = verdict(share.median, at_most=STALL_TARGET)
    rows = [
        ["save at once", str(blocking), "1", ""],
        ["stall of a save in the background", str(Spread.of(samples.stall)), str(share), target],
        ["time lost, with steps slowed down", str(lost), _share(lost, blocking), ""],
        ["until it is complete", str(Spread.of(samples.background)), "", ""],
        ["checksums in a save", str(checksums), _share(checksums, blocking), ""],
        ["load", str(Spread.of(samples.load)), "", ""],
        ["checksums in a load", str(verified), "", ""],
        ["a step", str(Spread.of(samples.step)), "", ""],
        ["a step in which the state is copied", str(Spread.of(samples.first_step)), "", ""],
    ]
    if samples.step_meanwhile:
        rows.append(["a step while it is written", str(Spread.of(samples.step_meanwhile)), "", ""])
    return Table(
        f"Checkpoints of {size / 1e6:.0f} MB in {folder.parent}, {rounds} rounds",
        ["", "seconds", "of a save at once", "target"],
        rows,
        "Median (lowest to highest). All in one process, by turns.",
    )


def _share(part: Spread, whole: Spread) -> str:
    return f"{part.median / whole.median:.3f}"


def run(quick: bool = False) -> list[Table]:
    """Run the cases of the suites: on the disk of temporary files, and in memory if available."""
    folders = [Path(tempfile.gettempdir())]
    if Path("/dev/shm").is_dir():
        folders.append(Path("/dev/shm"))
    if quick:
        return [table(folders[0], "tiny", 1)]
    return [table(folder, "150M-4-layers", 7) for folder in folders]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--flavor", default="150M-4-layers", help="flavor in benchmarks/flavors.py")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    print(table(args.folder, args.flavor, args.rounds).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
