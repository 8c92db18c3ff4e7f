"""`torchtitan report`: the command line."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from torchtitan.config.options import parse_options, shown_as
from torchtitan.errors import ConfigError
from torchtitan.tools.figures import MISSING, can_plot, png
from torchtitan.tools.result_file import require_folder, write_result
from torchtitan.tools.secrets import hide_secrets

from .page import report_page
from .run import read_runs

DESCRIPTION = """\
Show the logs of one or several runs in one HTML file that needs no network: curves, config,
environment, checkpoints, and where the runs differ. The runs may be unfinished. See
docs/metrics.md.

  torchtitan report outputs
  torchtitan report outputs/a outputs/b --out compare.html --png compare.png"""


@dataclass
class Options:
    runs: Annotated[tyro.conf.Positional[list[str]], shown_as("RUN [RUN ...]")]
    """Folders of runs (job.dump_folder)."""
    out: Annotated[str | None, shown_as("FILE")] = None
    """HTML file to write. Default: report.html in the run's folder, or in the current folder if
    there are several runs."""
    png: Annotated[str | None, shown_as("FILE")] = None
    """Also write a picture of the first curves to this file (needs matplotlib)."""


def main(argv: list[str]) -> int:
    """Run the command with the arguments after `torchtitan report`; return the exit code."""
    options = parse_options(Options, argv, "torchtitan report", DESCRIPTION)
    if not options.runs:
        raise ConfigError("give the folder of a run: torchtitan report RUN [RUN ...]")
    require_folder(options.out, "--out")
    require_folder(options.png, "--png")
    if options.png and not can_plot():
        raise ConfigError(f"--png {options.png}: {MISSING}")
    runs = read_runs(options.runs)
    if options.png and not any(run.curves for run in runs):
        raise ConfigError(f"--png {options.png}: no step has been logged yet")

    out = options.out
    if out is None:
        folder = runs[0].folder if len(runs) == 1 else Path()
        out = str(folder / "report.html")
    write_result(out, hide_secrets(report_page(runs)), "--out")
    written = [out]
    if options.png:
        from .figure import draw

        write_result(options.png, png(draw(runs)), "--png")
        written.append(options.png)
    sys.stdout.write("".join(f"{path}\n" for path in written))
    return 0
