"""`torchtitan models`: lists the models, their flavors and sizes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from torchtitan.config.options import parse_options, require_at_least_one, shown_as
from torchtitan.errors import ConfigError, did_you_mean
from torchtitan.models import MODEL_REGISTRY
from torchtitan.models.plugins import load_plugins
from torchtitan.protocols.train_spec import (
    BrokenModel,
    get_train_spec,
    model_flavors,
    problem_of,
)
from torchtitan.tools.tables import print_table
from torchtitan.tools.text import human


@dataclass
class Options:
    name: Annotated[tyro.conf.Positional[str | None], shown_as("[NAME]")] = None
    """List only this model."""
    custom_import: Annotated[str, shown_as("MODULE", "--job.custom-import")] = ""
    """Python module to import first, so that it can register a model."""
    seq_len: Annotated[int, shown_as("N")] = 4096
    """Sequence length for the FLOP count."""


def main(argv: list[str]) -> int:
    """Run the command with the arguments after `torchtitan models`; return the exit code."""
    description = "List models, their flavors and sizes."
    options = parse_options(Options, argv, "torchtitan models", description)
    require_at_least_one(options, "seq_len")
    load_plugins(options.custom_import)
    if options.name is not None and options.name not in MODEL_REGISTRY:
        raise ConfigError(f"no model {options.name!r}.{did_you_mean(options.name, MODEL_REGISTRY)}")
    rows, problems = [], []
    for name in [options.name] if options.name else sorted(MODEL_REGISTRY):
        try:
            for flavor, (nparams, flops) in model_sizes(name, options.seq_len).items():
                size = [human(nparams), f"{nparams:,}", f"{flops / 1e9:,.3f}"]
                rows.append([name, flavor, *size])
        except Exception as error:  # from the model author's code
            if options.name:
                raise
            problems.append(problem_of(name, error))

    header = ["model", "flavor", "parameters", "exactly", f"GFLOP/token at {options.seq_len:,}"]
    print_table(header, rows, left=2, sections=True)
    for problem in problems:
        sys.stderr.write(f"warning: {problem}\n")
    return 0


def model_sizes(name: str, seq_len: int) -> dict[str, tuple[int, int]]:
    """Return flavor -> parameters, and FLOPs to train on a token, as in `get_nparams_and_flops`."""
    if isinstance(broken := MODEL_REGISTRY[name], BrokenModel):
        raise ConfigError(broken.problem)
    args = {flavor: get_train_spec(name, flavor).model_args for flavor in model_flavors(name)}
    return {flavor: each.get_nparams_and_flops(seq_len) for flavor, each in args.items()}
