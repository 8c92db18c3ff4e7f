"""`torchtitan converge`: the command line, and the comparison from beginning to end."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from torchtitan.config.options import flag, parse_options, shown_as, split_overrides
from torchtitan.errors import ConfigError
from torchtitan.tools.figures import MISSING, can_plot
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.result_file import make_folder

from .compare import Outcome, judge
from .curves import METRICS, read_curves, read_skipped
from .launch import launch
from .match import check_match, warn_of_repeats
from .page import write_page
from .report import Result, show, write_text
from .runs import Run, plan_runs

DESCRIPTION = """\
Train a control and one or more tests from the same seed and data, and compare their losses and
gradient norms step by step. The tests may differ from the control in layout and technique
(parallelism, activation checkpointing, compile, precision, kernels), but must compute the same
training. See docs/converging.md.

  torchtitan converge one.toml fsdp2.toml tp2.toml -- --training.steps 50
  torchtitan converge model.toml model.toml --nproc model-2=2
  torchtitan converge outputs/last_week model.toml

Each run is either a TOML file, which is trained on this machine with as many processes as its
parallelism degrees need, or the folder of a finished run that logged every step. Options after --
change the config of every job that is started, as for `torchtitan train`.

Exit code: 0 if all tests match the control, 1 if one diverged or failed, 2 for a mistake
in the command or a config."""


@dataclass
class Options:
    control: Annotated[tyro.conf.Positional[str], shown_as("CONTROL")]
    """TOML file or run folder to compare the tests with."""
    tests: Annotated[tyro.conf.Positional[list[str]], shown_as("TEST [TEST ...]")]
    """TOML files or run folders to compare with the control."""
    nproc: Annotated[tyro.conf.UseAppendAction[list[str]], shown_as("NAME=N")] = field(
        default_factory=list
    )
    """Number of processes of a run. NAME is the file, or its name in the report: without .toml, and
    with -2 if it is the second with that name. Default: the product of the parallelism degrees,
    where data_parallel_shard_degree = -1 counts as 1."""
    allow_different: Annotated[tyro.conf.UseAppendAction[list[str]], shown_as("KEY")] = field(
        default_factory=list
    )
    """Key or section of the config (such as debug.seed, optimizer) that may differ although it
    changes the training."""
    rtol: Annotated[float | None, shown_as("FLOAT")] = None
    """Relative tolerance of the loss. Default: 1e-4, or 2e-2 if either run is in bfloat16"""
    grad_norm_rtol: Annotated[float | None, shown_as("FLOAT")] = None
    """Relative tolerance of the gradient norm. Default: 1e-2, or 0.2 if either run is in
    bfloat16"""
    out: Annotated[str, shown_as("FOLDER")] = "./outputs/converge"
    """Folder for verdict.json, table.md, report.html, curves.png and the new runs."""


def main(argv: list[str]) -> int:
    """Run the command with the arguments after `torchtitan converge`; return the exit code."""
    own, overrides = split_overrides(argv)
    options = parse_options(Options, own, "torchtitan converge", DESCRIPTION)
    if not options.tests:
        raise ConfigError("give at least one test: torchtitan converge CONTROL TEST [TEST ...]")
    for name in ("rtol", "grad_norm_rtol"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"{flag(name)} {value}: must be at least 0, and finite")
    init_logger()
    result = converge(options, overrides, shlex.join(["torchtitan", "converge", *argv]))
    return 0 if result.equal else 1


def converge(options: Options, overrides: list[str], command: str) -> Result:
    """Plan, run, compare and report. `command` is the user's command line, for the report."""
    out = Path(options.out).expanduser()
    arguments = [options.control, *options.tests]
    runs = plan_runs(arguments, out / "runs", options.nproc, overrides)
    check_match(runs[0], runs[1:], options.allow_different)
    warn_of_repeats(runs[0], runs[1:])
    plots = can_plot()
    if not plots:
        logger.warning("no plots: %s", MISSING)
    make_folder(out, "--out")

    control, *tests = _run_all(runs)
    verdicts = [judge(control, test, options.rtol, options.grad_norm_rtol) for test in tests]
    result = Result(control, verdicts, options.allow_different, command)
    write_text(result, out)
    write_page(result, out, plots)
    show(result, out)
    return result


def _run_all(runs: list[Run]) -> list[Outcome]:
    """Return the outcome of each run. If the control fails, no test is started."""
    outcomes: list[Outcome] = []
    for run in runs:
        if run.finished:
            outcomes.append(_outcome(run))
        elif outcomes and outcomes[0].problems():
            outcomes.append(Outcome(run, {name: {} for name in METRICS}, "not started"))
        else:
            outcomes.append(_outcome(run, launch(run)))
    return outcomes


def _outcome(run: Run, failure: str | None = None) -> Outcome:
    return Outcome(run, read_curves(run.folder), failure, read_skipped(run.folder))
