"""`torchtitan plan`: the command line."""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from torchtitan.config import JobConfig, load_config, to_toml
from torchtitan.config.options import flag, parse_options, shown_as, split_overrides
from torchtitan.errors import ConfigError, WorldSizeError
from torchtitan.models.plugins import load_plugins
from torchtitan.tools.figures import MISSING, can_plot
from torchtitan.tools.result_file import require_folder, write_json, write_result

from .devices import get_device
from .estimate import plan_run
from .page import page
from .picture import png
from .report import Budget, as_json, show, show_found
from .search import search

_SECONDS_OF_A_LINE = 10.0
"""Interval of a search's progress lines when stderr is not a terminal."""
DESCRIPTION = """\
Estimate what a run needs before renting a GPU: memory of each rank by category, communication,
pipeline bubble, step time, tokens/s, MFU, and the time and cost of a token budget. Memory is
traced through the real model, parallelism and optimizer; times are estimates. See
docs/planning.md.

  torchtitan plan model.toml --world-size 512 --tokens 15e12 --price 2.5
  torchtitan plan model.toml --world-size 64 --search --global-batch-size 256
  torchtitan plan model.toml -- --activation_checkpoint.mode full

Options after -- change the job's config, as for `torchtitan train`.

Exit code: 0 if the run fits (or the search found a layout that does), 1 if not, 2 for a mistake in
the command or the config."""


@dataclass
class Options:
    config: Annotated[tyro.conf.Positional[str], shown_as("CONFIG")]
    """TOML file of the job."""
    world_size: Annotated[int | None, shown_as("N", "--gpus")] = None
    """Number of devices. Default: the product of the parallelism degrees, or at least one full host
    if the shard degree is -1."""
    device: Annotated[str, shown_as("NAME")] = "h100"
    """a100, a100-40gb, l40s, h100-pcie, h100, h200, b200, gb200 or mi300x."""
    nodes_of: Annotated[int, shown_as("N")] = 8
    """Devices per host."""
    tokens: Annotated[float | None, shown_as("N")] = None
    """Token budget, such as 15e12; the plan shows its time and cost."""
    price: Annotated[float | None, shown_as("FLOAT")] = None
    """Price of one device for one hour, in any currency."""
    json: Annotated[str | None, shown_as("FILE")] = None
    """Write the plan as JSON."""
    html: Annotated[str | None, shown_as("FILE")] = None
    """Write an HTML page with memory by category and the pipeline's timeline."""
    png: Annotated[str | None, shown_as("FILE")] = None
    """Write the same as a PNG picture; needs matplotlib (`torchtitan[plots]`)."""
    search: bool = False
    """Search for the fastest layout that fits, for this model, global batch and sequence length.
    The job's degrees, local batch, schedule and activation checkpointing are ignored."""
    global_batch_size: Annotated[int | None, shown_as("N")] = None
    """Sequences per step; sets training.global_batch_size."""
    seq_len: Annotated[int | None, shown_as("N")] = None
    """Tokens per sequence; sets training.seq_len."""
    seconds: Annotated[float | None, shown_as("S")] = None
    """Time limit of a search. Default: 300."""
    out: Annotated[str | None, shown_as("FILE")] = None
    """File to which a search writes the best job. Default: planned.toml."""


_SECONDS, _OUT = 300.0, "planned.toml"
_OF_A_PLAN = ("json", "html", "png", "tokens", "price")
_OF_A_SEARCH = ("seconds", "out")


def main(argv: list[str] | None = None) -> int:
    """Run the command with the arguments after `torchtitan plan`; return the exit code.

    Raises:
        ConfigError: an argument or the config is wrong, or the layout is impossible.
    """
    argv = sys.argv[1:] if argv is None else argv
    own, overrides = split_overrides(argv)
    options = parse_options(Options, own, "torchtitan plan", DESCRIPTION)
    _check(options)
    for name in ("global_batch_size", "seq_len"):
        if getattr(options, name) is not None:
            overrides = [*overrides, f"--training.{name}={getattr(options, name)}"]
    config = load_config([f"--job.config_file={options.config}", *overrides])
    load_plugins(config.job.custom_import)
    warnings.simplefilter("ignore")  # PyTorch warns about the meshes of a fake world
    logging.getLogger("torchtitan").setLevel(logging.WARNING)
    # It logs the traceback of an error that is raised, too.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    return _search(options, config) if options.search else _plan(options, config)


def _plan(options: Options, config: JobConfig) -> int:
    if options.png and not can_plot():
        raise ConfigError(f"--png {options.png}: {MISSING}, or use --html")
    world_size = options.world_size or default_world_size(config, options.nodes_of)
    device = get_device(options.device)
    try:
        plan = plan_run(config, world_size, device, options.nodes_of)
    except WorldSizeError as error:
        if options.world_size:
            raise
        told = f"on {world_size} devices, the default; set it with --world-size N"
        raise WorldSizeError(f"{error} ({told})") from error
    budget = Budget.of(plan, options.tokens, options.price) if options.tokens else None
    show(plan, budget)
    if options.json:
        write_json(options.json, as_json(plan, budget), "--json")
    if options.html:
        write_result(options.html, page(plan, budget), "--html")
    if options.png:
        write_result(options.png, png(plan), "--png")
    return 0 if plan.room >= 0 else 1


def _search(options: Options, config: JobConfig) -> int:
    if options.world_size is None:
        raise ConfigError("--search needs --gpus N: the number of devices")
    device, seconds = get_device(options.device), options.seconds or _SECONDS
    with _progress() as tell:
        found = search(config, options.world_size, device, options.nodes_of, seconds, tell)
    show_found(found)
    if not found.best:
        return 1
    out = options.out or _OUT
    write_result(out, to_toml(found.best.config), "--out")
    sys.stdout.write(f"written to {out}\n")
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows text on stderr: in place on a terminal, else in lines."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
        return
    last = -math.inf

    def tell(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_OF_A_LINE:
            last = time.monotonic()
            console.print(text, soft_wrap=True, highlight=False)

    yield tell


def default_world_size(config: JobConfig, host_size: int) -> int:
    """Return the number of devices of a job if the command does not set it."""
    smallest = config.parallelism.smallest_world
    if config.parallelism.data_parallel_shard_degree != -1 or smallest >= host_size:
        return smallest
    return math.lcm(smallest, host_size)


def _check(options: Options) -> None:
    for name in ("world_size", "nodes_of", "tokens", "price", "seconds"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            alias = " (--gpus)" if name == "world_size" else ""
            raise ConfigError(f"{flag(name)}{alias} {value}: must be above 0, and finite")
    if options.price is not None and options.tokens is None:
        raise ConfigError("--price needs --tokens N: the token budget to compute the cost of")
    for name in _OF_A_PLAN if options.search else _OF_A_SEARCH:
        if getattr(options, name) is None:
            continue
        if not options.search:
            raise ConfigError(f"--{name} applies only to a search. Give --search too")
        raise ConfigError(
            f"--{name} applies to a single plan, not to a search. Plan the job that it writes: "
            f"torchtitan plan {options.out or _OUT} --{name} ..."
        )
    for name in ("json", "html", "png", "out"):
        require_folder(getattr(options, name), f"--{name}")
