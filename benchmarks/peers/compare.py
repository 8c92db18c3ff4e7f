"""Compare speed and memory of the trainer with Hugging Face's `Trainer` and PyPI's `torchtitan`.

Each runs in its own process, from the same weights over the same batches, and all take turns of a
few steps: disturbances of the machine that last longer than a turn affect all of them. The result
is the ratio of the turns of one round, and the order changes from round to round. Two processes of
the same trainer can differ by a few percent throughout (depending on where their memory lies), so
all are started several times. Equal losses show that all do the same work. On a GPU, whose memory
they could not share, they run one after the other.

    python -m benchmarks.peers.compare [--upstream VENV/bin/python] [--compile]
        [--precision bfloat16] [--starts 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import flavors  # noqa: F401  (registers them)
from benchmarks.peers.turns import WARMUP_STEPS
from benchmarks.report import Bar, Spread, Table, verdict
from torchtitan.config import load_config
from torchtitan.config.batch import batch_sizes
from torchtitan.distributed.init import initialize_weights
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.runtime.device import device

CONFIGS = Path(__file__).parent.parent / "configs"
HERE = Path(__file__).parent
TARGET = {"Hugging Face Trainer": 1.15, "torchtitan 0.2.2": 1.0}
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
LOSSES_COMPARED = {"float32": None, "bfloat16": 40}
"""The first so many, None: all. Rounding to 8 bits leads runs apart later on."""
UPSTREAM = "TORCHTITAN_0_2_2"
"""Environment variable: the Python that has the package."""

_OURS = ("THP_MEM_ALLOC_ENABLE", "PYTORCH_ALLOC_CONF")


@dataclass
class Contestant:
    """A trainer's process, and what it has told."""

    name: str
    process: subprocess.Popen
    reports: Any
    words: Any
    first_step: float = 0.0
    """Seconds from the start of the process to the end of the first step. Of the last start."""
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.name}: {statistics.median(self.wall):.3f} s a turn, "
            f"{self.peak_bytes / 2**30:.2f} GiB, first step after {self.first_step:.1f} s, "
            f"losses from {self.losses[0]:.4f} to {self.losses[-1]:.4f}"
        )

    def take_turn(self) -> dict[str, Any]:
        self.words.write("go\n")
        self.words.flush()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        line = self.reports.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: exit code {self.process.wait()}")
        return json.loads(line)


def prepare(config_file: Path, flavor: str, steps: int, folder: Path) -> dict[str, Any]:
    """The plan for all: the weights as a Hugging Face folder, the batches, the numbers."""
    config = load_config(["--job.config_file", str(config_file)])
    config.model.name, config.model.flavor = "benchmark_llama3", flavor
    spec = get_train_spec("benchmark_llama3", flavor)
    with torch.device("meta"):
        model = spec.model_cls(spec.model_args)
    initialize_weights(model, config.debug.seed, device())  # whose numbers ours draws
    weights = folder / "weights"
    weights.mkdir()
    adapter = spec.state_dict_adapter(spec.model_args)
    save_file(adapter.to_hf(model.state_dict()), weights / "model.safetensors", {"format": "pt"})
    (weights / "config.json").write_text(json.dumps(spec.model_args.to_hf_config()))
    del model
    torch.cuda.empty_cache()  # for the contestants, where the weights were made there

    sizes = batch_sizes(config, 1)
    batch_size, accumulation_steps = sizes.largest, sizes.most_passes
    loader = spec.build_dataloader_fn(config, spec.build_tokenizer_fn(config), 0, 1)
    batches = [next(loader) for _ in range(steps * accumulation_steps)]
    loader.close()
    tokens, labels = (torch.cat([batch[key] for batch in batches]) for key in ("tokens", "labels"))
    if not torch.equal(tokens[:, 1:], labels[:, :-1]):
        raise RuntimeError("the labels are not the tokens, one later")
    torch.save(torch.cat([tokens, labels[:, -1:]], dim=1), folder / "sequences.pt")

    optimizer = config.optimizer
    return {
        "config": str(config_file),
        "flavor": flavor,
        "model": dataclasses.asdict(spec.model_args),
        "weights": str(weights),
        "sequences": str(folder / "sequences.pt"),
        "steps": steps,
        "local_batch_size": config.training.local_batch_size,
        "accumulation_steps": accumulation_steps,
        "tokens_per_step": batch_size * config.training.seq_len,
        "seq_len": config.training.seq_len,
        "lr": optimizer.lr,
        "betas": (optimizer.beta1, optimizer.beta2),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "max_norm": config.training.max_norm,
    }


def start(name: str, command: list[str], plan: dict[str, Any], folder: Path) -> Contestant:
    """Start a contestant and wait until it is warm."""
    folder.mkdir()
    (reports, reports_fd), (words_fd, words) = os.pipe(), os.pipe()
    plan = plan | {"reports_fd": reports_fd, "words_fd": words_fd, "folder": str(folder)}
    plan |= {"port": _free_port()}
    (folder / "plan.json").write_text(json.dumps(plan))
    # Importing our package sets them; each contestant is as its users find it.
    environment = {k: v for k, v in os.environ.items() if k not in _OURS}
    began = time.perf_counter()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, str(folder / "plan.json")],
            pass_fds=(reports_fd, words_fd),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    os.close(reports_fd)
    os.close(words_fd)
    contestant = Contestant(name, process, os.fdopen(reports), os.fdopen(words, "w"))
    try:
        contestant.hear()
    except RuntimeError as error:
        raise RuntimeError(f"{error}\n{(folder / 'log').read_text()[-4000:]}") from error
    contestant.first_step = time.perf_counter() - began
    return contestant


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def compare(
    config_file: Path,
    flavor: str,
    *,
    rounds: int,
    steps_per_turn: int,
    compiled: bool = False,
    precision: str = "float32",
    upstream: str | None = None,
    trainer: bool = True,
) -> tuple[dict[str, Any], list[Contestant]]:
    """All contestants by turns, one start of each; ours is the first of the list.

    Raises:
        RuntimeError: one fails, or the losses differ, so that they did not do the same work.
    """
    commands = {"ours": [sys.executable, "-m", "benchmarks.peers.ours"]}
    if trainer:
        commands["Hugging Face Trainer"] = [sys.executable, "-m", "benchmarks.peers.hugging_face"]
    if upstream:
        # -E: a `PYTHONPATH` may point to this repository, which is the other `torchtitan`.
        commands["torchtitan 0.2.2"] = [upstream, "-E", str(HERE / "upstream.py")]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        # One step more than the turns need: the last turn ends where it begins.
        steps = WARMUP_STEPS + rounds * steps_per_turn + 1
        plan = prepare(config_file, flavor, steps, folder)
        plan |= {"compile": compiled, "precision": precision, "steps_per_turn": steps_per_turn}
        alone = torch.cuda.is_available()
        groups = [[name] for name in commands] if alone else [list(commands)]
        contestants: list[Contestant] = []
        for names in groups:
            group = []
            for name in names:
                own = folder / name.replace(" ", "_")
                group.append(start(name, commands[name], plan, own))
                stack.callback(group[-1].process.kill)
            take_turns(group, rounds)
            contestants += group
    for contestant in contestants:
        contestant.losses = contestant.losses[: LOSSES_COMPARED[precision]]
    ours = contestants[0]
    for other in contestants[1:]:
        if (difference := loss_difference(ours, other)) > LOSS_TOLERANCE[precision]:
            raise RuntimeError(f"the losses of {other.name} differ from ours by {difference:.1e}")
    return plan, contestants


def take_turns(group: list[Contestant], rounds: int) -> None:
    """All rounds, and the end of the processes."""
    for number in range(rounds):
        first = number % len(group)
        for contestant in group[first:] + group[:first]:
            report = contestant.take_turn()
            contestant.wall.append(report["wall"])
            contestant.cpu.append(report["cpu"])
    for contestant in group:
        last = contestant.take_turn()
        contestant.losses, contestant.peak_bytes = last["losses"], last["peak"]
        contestant.process.wait(timeout=60)
        print(contestant, file=sys.stderr, flush=True)


def loss_difference(ours: Contestant, other: Contestant) -> float:
    """Largest relative difference of a micro-batch's loss."""
    pairs = zip(ours.losses, other.losses, strict=True)
    return max(abs(a - b) / abs(a) for a, b in pairs)


def compare_often(
    config_file: Path, flavor: str, *, starts: int, rounds: int, **settings: Any
) -> tuple[dict[str, Any], list[Contestant]]:
    """`compare`, with so many starts of each and their rounds put together."""
    plan, together = compare(config_file, flavor, rounds=rounds, **settings)
    for _ in range(starts - 1):
        _, contestants = compare(config_file, flavor, rounds=rounds, **settings)
        for all_of_it, more in zip(together, contestants, strict=True):
            all_of_it.wall += more.wall
            all_of_it.cpu += more.cpu
            all_of_it.first_step = more.first_step
            all_of_it.peak_bytes = max(all_of_it.peak_bytes, more.peak_bytes)
    return plan, together


def ratio(ours: Contestant, other: Contestant, clock: str) -> Spread:
    """Of ours to the other's tokens/s, by `wall` or `cpu` time: over the rounds."""
    return Spread.of_ratios(getattr(other, clock), getattr(ours, clock))


def row(name: str, plan: dict[str, Any], ours: Contestant, other: Contestant) -> list[str]:
    wall, cpu = (ratio(ours, other, clock) for clock in ("wall", "cpu"))
    tokens = plan["tokens_per_step"] * plan["steps_per_turn"]
    rate = Spread.of([tokens / seconds for seconds in other.wall])
    itself = other is ours
    return [
        name,
        other.name,
        str(rate),
        "" if itself else f"**{wall.median:.3f}** ({wall.low:.3f} to {wall.high:.3f})",
        "" if itself else f"{cpu.median:.3f}",
        f"{other.peak_bytes / 2**30:.2f}",
        f"{other.first_step:.1f}",
        "" if itself else f"{loss_difference(ours, other):.0e}",
        "" if itself else verdict(wall.median, at_least=TARGET[other.name]),
    ]


PLANS = [("debugmodel", 6, 5), ("layers_150m", 6, 2), ("layers_1b", 6, 1)]
"""Config, rounds of a start, steps of a turn."""
STARTS = 3
GPU_PLANS = [("llama3_1b", 6, 3)]
FLAVORS = {
    "llama3_1b": "1B-untied",
    "debugmodel": "debugmodel-untied",
    "layers_150m": "150M-4-layers-untied",
    "layers_1b": "1B-1-layer-untied",
}


def table(
    compiled: bool,
    plans: list[tuple[str, int, int]],
    upstream: str | None,
    starts: int = STARTS,
    precision: str = "float32",
    trainer: bool = True,
) -> Table:
    rows, bars = [], []
    for name, rounds, steps_per_turn in plans:
        plan, contestants = compare_often(
            CONFIGS / f"{name}.toml",
            FLAVORS[name],
            starts=starts,
            rounds=rounds,
            steps_per_turn=steps_per_turn,
            compiled=compiled,
            precision=precision,
            upstream=upstream,
            trainer=trainer,
        )
        ours, *others = contestants
        rows += [row(name, plan, ours, contestant) for contestant in contestants]
        for other in others:
            label = f"{name}, over {other.name}"
            bars.append(Bar(label, ratio(ours, other, "wall"), TARGET[other.name]))
    return Table(
        f"Beside other trainers, {'compiled' if compiled else 'eager'}, {precision}",
        [
            "config",
            "trainer",
            "tokens/s",
            "ours over it",
            "by CPU time",
            "peak GiB",
            "first step, seconds",
            "loss difference",
            "target",
        ],
        rows,
        f"Median (lowest to highest) over the rounds of {starts} starts; a round is a turn of "
        "each. The peak is that of the whole process, on a GPU of its tensors. The first step's "
        "time holds the start of the process.",
        bars,
        "tokens/s of ours over those of the other",
    )


def run(quick: bool = False) -> list[Table]:
    upstream = os.environ.get(UPSTREAM)
    if quick:
        return [table(False, [("debugmodel", 2, 1)], upstream, starts=1)]
    if torch.cuda.is_available():
        return [
            table(compiled, GPU_PLANS, upstream, starts=1, precision="bfloat16")
            for compiled in (False, True)
        ]
    precisions = ["float32"]
    if torch.cpu._is_amx_tile_supported():
        precisions.append("bfloat16")  # which other CPUs are slow in
    return [
        table(compiled, PLANS, upstream, precision=precision)
        for precision in precisions
        for compiled in (False, True)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=FLAVORS, nargs="+", default=[p[0] for p in PLANS])
    parser.add_argument("--starts", type=int, default=STARTS)
    parser.add_argument("--rounds", type=int, default=6, help="rounds per start")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", choices=LOSS_TOLERANCE, default="float32")
    parser.add_argument(
        "--upstream",
        default=os.environ.get(UPSTREAM),
        help=f"Python of an environment with torchtitan==0.2.2; default: ${UPSTREAM}",
    )
    parser.add_argument("--no-trainer", action="store_true", help="skip Hugging Face's Trainer")
    args = parser.parse_args(argv)
    steps = {name: steps for name, _, steps in PLANS + GPU_PLANS}
    plans = [(name, args.rounds, steps[name]) for name in args.config]
    compared = table(
        args.compile, plans, args.upstream, args.starts, args.precision, not args.no_trainer
    )
    print(compared.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
