"""Measure start-up times: help, imports, first step, compiled first step with a warm cache.

Each command runs in its own process, and all commands alternate, several times. `import torch` is
measured too, as the lower bound of every script built on PyTorch.

    python -m benchmarks.startup [--rounds 5] [--imports]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.report import Bar, Spread, Table, verdict

CONFIG = Path(__file__).parent / "configs" / "debugmodel.toml"
PROBE = "import sys; import torchtitan; sys.exit('torch' in sys.modules)"


@dataclass
class Command:
    """A command to start, and the event at which it counts as started."""

    name: str
    arguments: list[str]
    """Arguments of the Python interpreter."""
    target_seconds: float | None = None
    until: str | None = None
    """The line on stderr that ends the measurement; None: the process's end."""
    environment: dict[str, str] = field(default_factory=dict)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Of the process and its children, up to its end."""

    def measure(self) -> None:
        """Run once. Raises `RuntimeError` if the command fails."""
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *self.arguments],
            env=os.environ | self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        seconds = None
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if seconds is None and self.until and re.search(self.until, line):
                    seconds = time.perf_counter() - start
        except BaseException:
            process.kill()
            raise
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stderr.close()
        if process.returncode != 0 or (self.until and seconds is None):
            raise RuntimeError(f"{self.name}: exit code {process.returncode}\n{''.join(lines)}")
        self.wall.append(seconds or time.perf_counter() - start)
        self.cpu.append(usage.ru_utime + usage.ru_stime)


def commands(folder: Path) -> list[Command]:
    """Return the commands to measure; `folder` takes the runs' output and the compiler's cache."""
    train = ["-m", "torchtitan", "train", "--job.config_file", str(CONFIG)]
    train += ["--job.dump_folder", str(folder / "run"), "--training.steps", "1"]
    train += ["--metrics.progress", "plain"]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    first_step = r"step 1/1 "
    return [
        Command("`torchtitan --help`", ["-m", "torchtitan", "--help"], 0.5),
        Command("`import torchtitan`, and no torch with it", ["-c", PROBE]),
        Command("`import torch`, for comparison", ["-c", "import torch"]),
        Command("`import torchtitan.train`", ["-c", "import torchtitan.train"]),
        Command("first step, debug model", train, 6, first_step),
        Command(
            "first step, debug model, compiled, warm cache",
            [*train, "--compile.enable"],
            15,
            first_step,
            cache,
        ),
    ]


def measure(rounds: int) -> Table:
    with tempfile.TemporaryDirectory() as folder:
        measured = commands(Path(folder))
        cold = measured[-1]
        cold.measure()  # fills the compiler's cache
        cold_wall, cold_cpu = cold.wall.pop(), cold.cpu.pop()
        for command in measured[:-1]:
            command.measure()  # loads the files into the page cache
            command.wall.clear()
            command.cpu.clear()
        for _ in range(rounds):
            for command in measured:
                command.measure()
    rows = [
        [
            command.name,
            str(Spread.of(command.wall)),
            str(Spread.of(command.cpu)),
            verdict(Spread.of(command.wall).median, at_most=command.target_seconds)
            if command.target_seconds
            else "",
        ]
        for command in measured
    ]
    rows.append(["the same, empty cache (once)", f"{cold_wall:.1f}", f"{cold_cpu:.1f}", ""])
    return Table(
        f"Start-up, {rounds} rounds",
        ["command", "seconds", "CPU seconds of the whole process", "target, seconds"],
        rows,
        "Median (lowest to highest). A process that others leave the processor to takes about its "
        "CPU seconds.",
        [Bar(c.name, Spread.of(c.wall), c.target_seconds) for c in measured],
        "seconds",
    )


def imports() -> Table:
    """Measure the time of imports by package, in a run of one step."""
    with tempfile.TemporaryDirectory() as folder:
        train = {c.name: c.arguments for c in commands(Path(folder))}["first step, debug model"]
        command = [sys.executable, "-X", "importtime", *train]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds: Counter[str] = Counter()
    for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", done.stderr):
        seconds[_package(name)] += int(own) / 1e6
    rows = [[name, f"{taken:.2f}"] for name, taken in seconds.most_common(12)]
    rows.append(
        ["all others", f"{seconds.total() - sum(s for _, s in seconds.most_common(12)):.2f}"]
    )
    return Table("Imports of a run", ["package", "seconds, own code"], rows)


def _package(module: str) -> str:
    """Return the package, or for large ones its part: `numpy`, `torch.distributed.tensor`."""
    parts = module.split(".")
    depth = 1
    if parts[0] == "torch":
        depth = 3 if parts[1:2] == ["distributed"] else 2
    return ".".join(parts[:depth])


def run(quick: bool = False) -> list[Table]:
    return [measure(1 if quick else 5)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--imports", action="store_true", help="show import times instead")
    args = parser.parse_args(argv)
    result = imports() if args.imports else measure(args.rounds)
    print(result.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
