"""`torchtitan verify`: the command line."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import tyro

from torchtitan.config.options import parse_options, shown_as
from torchtitan.tools.result_file import make_folder, require_folder, write_json

DESCRIPTION = """\
Check on this machine, without a GPU, that a model is correct: that it keeps the model contract,
that every parallelism gives the same numbers as one process, that checkpoints and the exchange
with Hugging Face work, and that it learns.

  torchtitan verify llama3
  torchtitan verify my_model --custom-import my_package.my_model --quick
  torchtitan verify my_model --only layouts --only contract.init_weights

Exit code: 0 if no check failed, 1 if one did, 2 for a mistake in the command, 130 after Ctrl-C."""


@dataclass
class Options:
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Name of the model, as in `model.name`."""
    flavor: Annotated[str, shown_as("FLAVOR")] = ""
    """Flavor of the model. Default: debugmodel."""
    custom_import: Annotated[str, shown_as("MODULE", "--job.custom-import")] = ""
    """Python module to import first, so that it can register the model."""
    hf: Annotated[Path | None, shown_as("PATH")] = None
    """Folder with a Hugging Face checkpoint of this flavor to compare with."""
    only: Annotated[tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="CHECK")] = field(
        default_factory=list
    )
    """Run only this check or group of checks; may be given several times."""
    quick: bool = False
    """Skip the slow checks."""
    list_checks: Annotated[bool, tyro.conf.arg(name="list")] = False
    """List the checks without running them."""
    json: Annotated[Path | None, shown_as("FILE")] = None
    """Write the report, with tracebacks, to this file as JSON."""


def main(argv: list[str] | None = None) -> int:
    """Run the command with the arguments after `torchtitan verify`; return the exit code.

    Raises:
        ConfigError: an argument is wrong, or there is no such model.
    """
    options = parse_options(Options, argv, "torchtitan verify", DESCRIPTION)
    # These import PyTorch, which --help does not need.
    from .catalog import choose

    checks = choose(options.only, options.quick)
    if options.list_checks:
        width = max(len(check.name) for check in checks)
        sys.stdout.writelines(f"{check.name:{width}}  {check.asks}\n" for check in checks)
        return 0
    return verify(options, checks)


def verify(options: Options, checks: list) -> int:
    """Run the checks and show their outcomes. Return the exit code."""
    from . import report
    from .run import run_checks
    from .subject import subject_of

    if options.json:
        make_folder(options.json.expanduser().parent, "--json")
        require_folder(str(options.json), "--json")
    with TemporaryDirectory(prefix="torchtitan-verify-") as folder:
        subject = subject_of(
            options.name, options.flavor, Path(folder), options.custom_import, options.hf
        )
        running = report.Running(len(checks))
        running.console.print(f"verify {subject.name} {subject.flavor}: {len(checks)} checks\n")
        try:
            with closing(run_checks(checks, subject, running.started)) as coming:
                outcomes = report.show(coming, checks, running)
        except KeyboardInterrupt:
            running.console.print("\nstopped")
            return 130
    result = report.to_json(outcomes, subject.name, subject.flavor)
    if options.json:
        write_json(str(options.json), result, "--json")
    return 0 if result["passed"] else 1
