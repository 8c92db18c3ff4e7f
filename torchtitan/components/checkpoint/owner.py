"""Ensure that only one run at a time saves into a folder of checkpoints.

A restarted run takes over the folder. It cannot ask the previous run, which may still be alive on a
host that has lost its network. So each run leaves its name in the folder. A run that finds another
name there before it begins or completes a checkpoint ends. If torchrun then restarts it, it does
not take the folder back.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist

from torchtitan.config import JobConfig
from torchtitan.errors import CheckpointError, outage_or
from torchtitan.runtime.collective_calls import on_all_ranks, on_rank_zero
from torchtitan.tools.foreign_files import parse_json
from torchtitan.tools.result_file import replace_file
from torchtitan.tools.secrets import hide_secrets
from torchtitan.tools.text import first_line

from .folder import checkpoint_root
from .retry import read_again
from .storage import StoragePath, make_folder

OWNER = ".owner.json"
SEEN_AFTER = (0.5, 2.0, 5.0, 15.0, 40.0)
"""Seconds to wait after each look. An NFS client may cache a folder's contents for a minute
(acdirmax, nfs(5))."""


class TakenOverError(CheckpointError):
    """Another run saves into the folder now."""


@dataclass(frozen=True)
class Owner:
    """The name that a run leaves in the folder of its checkpoints."""

    job: str
    """Id of the job, the same each time that torchrun restarts the ranks."""
    start: str
    """Id of this start of the job, new each time."""
    folder: str
    """Folder of the checkpoints, so that a copy of the folder has no owner."""
    host: str
    pid: int
    """Process id of rank 0."""
    process: str
    """Boot id and start time of that process, since process ids are reused."""
    since: str

    @classmethod
    def new(cls, folder: StoragePath, job: str = "") -> Owner:
        """Return the owner for this process."""
        return cls(
            job=job or uuid4().hex,
            start=uuid4().hex,
            folder=_absolute(folder),
            host=socket.gethostname(),
            pid=os.getpid(),
            process=_process(os.getpid()),
            since=datetime.now().astimezone().isoformat(timespec="seconds"),
        )

    @classmethod
    def of(cls, folder: StoragePath) -> Owner | None:
        """Return the run that saves or saved into `folder`; None if unknown.

        Raises:
            OutageError: the file cannot be read.
        """
        path = folder / OWNER
        try:
            return cls(**parse_json(read_again(path, path.read_bytes)))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def place(self) -> tuple[str, str, int, str]:
        """The job and the process of its rank 0."""
        return self.job, self.host, self.pid, self.process

    def works_in(self, folder: StoragePath) -> bool:
        """Return whether it is another live process of this machine that saves into `folder`."""
        return (
            self.pid != os.getpid()
            and self.folder == _absolute(folder)
            and self.process != ""
            and self.process == _process(self.pid)
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Claim:
    """This run's claim to the folder of its checkpoints. For rank 0 only.

    Args:
        folder: the folder of checkpoints.
        store: store shared by all starts of the same job, earlier and later.
    """

    def __init__(self, folder: StoragePath, store: dist.Store | None = None) -> None:
        self._folder = folder
        self._store = store or dist.HashStore()
        self._owner: Owner | None = None
        self._key = f"owner/{_absolute(folder)}"  # holds `Owner.job` once the job has taken it

    def take(self) -> Owner:
        """Take the folder over from the previous run, if any; return the name left in it.

        Raises:
            TakenOverError: the folder was this job's, and another job has taken it.
            CheckpointError: the folder is not writable, or another process of this machine saves
                into it.
            OutageError: the folder cannot be written now.
        """
        job = self._store.get(self._key).decode() if self._store.check([self._key]) else ""
        try:
            with _alone(self._folder):
                there = Owner.of(self._folder)
                if job and there is not None and there.job != job:
                    raise self._taken_over(there)
                refuse_live_owner(self._folder)  # which may have started when this run did
                owner = Owner.new(self._folder, job)
                _write(self._folder, owner)
        except OSError as error:
            message = f"{self._folder}: cannot write there: {first_line(error)}"
            raise outage_or(CheckpointError, message, error) from error
        self._owner = owner
        self._store.set(self._key, owner.job)
        return owner

    def check(self) -> None:
        """Check the claim; take the folder if this is the first call or the claim was deleted.

        Raises:
            TakenOverError: another run has taken the folder since.
            OutageError: the owner cannot be read.
        """
        there = Owner.of(self._folder)
        if self._owner is None or there is None:
            self.take()
        elif there.start != self._owner.start and there.place != self._owner.place:
            # The same place means this run's own claim, written by an attempt that seemed to fail.
            raise self._taken_over(there)

    def _taken_over(self, by: Owner) -> TakenOverError:
        return TakenOverError(
            f"{self._folder} was taken over by another run ({by}), which now saves its "
            "checkpoints there, so this run ends. To run side by side, give each run its own "
            "job.dump_folder, and its own checkpoint.folder if that is a URL"
        )


def require_shared(folder: StoragePath, claim: Claim, group: dist.ProcessGroup) -> None:
    """Take `claim` on `folder`, and check that each rank finds rank 0's name in it.

    If each host had its own folder of that name, no save would ever complete.

    Raises:
        CheckpointError: on all ranks: a rank does not find the name; or see `Claim.take`.
    """
    owner = on_rank_zero(claim.take, group)
    if not isinstance(folder, Path):
        return  # a URL means the same everywhere

    def look(rank: int, ranks: int) -> None:
        if rank != 0 and not _finds(folder, owner):
            raise CheckpointError(
                f"{_absolute(folder)} on {socket.gethostname()} (rank {rank}) is not the same "
                f"folder as {owner.folder} on {owner.host} (rank 0). Checkpoints must be on "
                "storage that all hosts share: choose another job.dump_folder, or a URL as "
                "checkpoint.folder"
            )

    try:
        on_all_ranks(look, group)
    except CheckpointError:
        on_rank_zero(claim.check, group)  # another run may have taken the folder since
        raise


def _finds(folder: Path, owner: Owner) -> bool:
    for seconds in (*SEEN_AFTER, None):
        with suppress(OSError):
            os.listdir(folder)  # makes NFS ask the server for changes
        there = Owner.of(folder)
        if there is not None and there.start == owner.start:
            return True
        if seconds is not None:
            time.sleep(seconds)
    return False


def refuse_live_owner(folder: StoragePath, what: str = "saves its checkpoints") -> None:
    """Raise `CheckpointError` if another run on this machine does `what` in `folder`."""
    owner = Owner.of(folder)
    if owner is not None and owner.works_in(folder):
        raise CheckpointError(
            f"{folder}: another run {what} there ({owner}). Stop it, or choose another "
            "job.dump_folder, and another checkpoint.folder if that is a URL"
        )


def claim_dump_folder(job_config: JobConfig) -> None:
    """Refuse a run if another one on this machine writes to its dump folder.

    Their metrics would be mixed in one file, though one may save no checkpoints, or elsewhere.

    Raises:
        CheckpointError: there is such a run.
    """
    folder = Path(job_config.job.dump_folder)
    if job_config.checkpoint.enable and checkpoint_root(job_config) == folder:
        return  # a `Claim` to the same folder is a job's, and holds for all of its starts
    with suppress(OSError), _alone(folder):  # a full disk does not end a run
        refuse_live_owner(folder, "writes its metrics")
        _write(folder, Owner.new(folder))


@contextmanager
def _alone(folder: StoragePath) -> Iterator[None]:
    """Have other runs of this machine wait that take a local folder at the same time."""
    if not isinstance(folder, Path):
        yield
        return
    make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # NFS locks no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(folder: StoragePath, owner: Owner) -> None:
    """Write the owner file atomically."""
    content = json.dumps(asdict(owner), indent=1).encode() + b"\n"
    if isinstance(folder, Path):
        make_folder(folder)
        replace_file(folder / OWNER, content)
    else:
        folder.mkdir()
        (folder / OWNER).write_bytes(content)


def _absolute(folder: StoragePath) -> str:
    return hide_secrets(str(folder.resolve() if isinstance(folder, Path) else folder))


def _process(pid: int) -> str:
    """Return boot id and start time of a process on Linux; "" if it is dead or unknown.

    Source: proc_pid_stat(5). The state is the field after the name, which may contain spaces.
    """
    with suppress(OSError, IndexError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state not in ("Z", "X"):  # zombie or dead
            return f"{boot} {fields[18]}"
    return ""
