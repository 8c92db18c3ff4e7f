"""torchrun for hosts that may be taken away: `python -m torchtitan.distributed.torchrun ...`.

It takes torchrun's options, and differs from it in this:

* SIGTERM, SIGUSR1 and SIGINT go to the ranks, which save a checkpoint and leave in their own time.
  torchrun would kill them after 30 s (torch 2.11), and does not know SIGUSR1.
* Ranks that leave with exit code 75 (preempted) or 2 (a mistake of the user) are not started
  again on this allocation, whatever `--max-restarts` says.
* The exit code is that of the ranks, which the scheduler's script acts on; torchrun's is 1. With
  `--preempted-code N` as the first option it is N in the place of 75.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

PREEMPTED = 75
"""Exit code of a run that saved a checkpoint because it was asked to stop: start it again.

It is EX_TEMPFAIL of sysexits.h.
"""
_MISTAKE = 2
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class _Agent(LocalElasticAgent):
    """Restarts ranks that crashed, not those that meant to leave."""

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        codes = {failure.exitcode for failure in result.failures.values()}
        if codes & {PREEMPTED, _MISTAKE}:
            self._remaining_restarts = 0
        return result


def main(argv: list[str] | None = None) -> int:
    """Run torchrun with `argv`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    preempted_code = PREEMPTED
    if argv[:1] == ["--preempted-code"]:
        preempted_code, argv = int(argv[1]), argv[2:]
    for number in _FORWARDED:
        signal.signal(number, _forward)
    # torchrun sets handlers too, for these signals and no others.
    argv = ["--signals-to-handle", "SIGHUP,SIGQUIT", *argv]
    with patch("torch.distributed.launcher.api.LocalElasticAgent", _Agent):
        try:
            torchrun(argv)
        except ChildFailedError as error:
            codes = {failure.exitcode for failure in error.failures.values()}
            if PREEMPTED in codes:
                return preempted_code
            sys.stderr.write(f"{error}\n")
            return _MISTAKE if _MISTAKE in codes else 1
    return 0


def _forward(number: int, _frame: FrameType | None) -> None:
    ranks = _children()
    if not ranks:  # nothing has begun that could be lost
        raise SystemExit(PREEMPTED)
    for pid in ranks:
        os.kill(pid, number)


def _children() -> list[int]:
    """Process numbers of the ranks."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[0] != "Z" and int(fields[1]) == os.getpid():
            found.append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
