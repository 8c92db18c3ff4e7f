"""What ranks show of errors that end many of them."""

from __future__ import annotations

import sys
from pathlib import Path

from torchtitan.runtime.error_report import show_tracebacks_once
from torchtitan.runtime.ranks import Ranks
from torchtitan.runtime.world import rank
from torchtitan.tools.text import first_line


def collective() -> None:
    raise RuntimeError(f"connection closed, rank {rank()}\nmore")


def own_error() -> None:
    raise ValueError("the cause")


def fail() -> None:
    """As Python does at the end of a process."""
    show_tracebacks_once(first_line)
    try:
        own_error() if rank() == 3 else collective()
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)


def test_one_of_the_ranks_that_fail_at_one_place_shows_the_traceback(tmp_path: Path) -> None:
    with Ranks(fail, 4, output_folder=tmp_path) as ranks:
        ranks.wait(60)
    shown = [(tmp_path / f"rank-{number}.err").read_text() for number in range(4)]
    assert "Traceback" in shown[3] and "ValueError: the cause" in shown[3]
    whole, *lines = sorted(shown[:3], key=len, reverse=True)
    assert "Traceback" in whole and "in collective" in whole
    for line in lines:
        number = shown.index(line)
        assert line == (
            f"[rank {number}] RuntimeError: connection closed, rank {number} "
            "(traceback: see another rank's)\n"
        )
