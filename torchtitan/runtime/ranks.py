"""Start the ranks of a world in milliseconds, and report how they ended.

Importing PyTorch takes seconds. So each rank is forked from a server that has imported it once:
Python's `multiprocessing` forkserver. The server runs nothing else, has one thread and never
touches CUDA, so that forking it is safe; the caller may have threads and use CUDA.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection, util
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ("torchtitan.train", "torchtitan.models", "torch.distributed.pipelining")
"""Modules that the server imports. None of them may start a thread or touch CUDA."""

# Once a rank has failed the others are of no use, but their errors may help: the first to report
# is not always the one at fault.
_SECONDS_AFTER_A_FAILURE = 5.0
_SECONDS_TO_DUMP_STACKS = 5.0
_MOST_PATIENCE = 10
_IDLE = 0.03
"""A rank that computes for a smaller part of the time only waits: its watches take up to 0.01."""
_SECONDS_TO_JUDGE = 2.0  # at least: any process may have to wait for a processor
_SHOWN_OUTPUT = 4000  # characters
_LONGEST_TMPDIR = 70  # bytes; unix(7): a name has 107, of which /pymp-8/listener-8 takes 32


@dataclass
class RankFailure:
    """The outcome of a rank that did not return."""

    rank: int
    reason: str
    """One line: `ValueError: ...`, `killed by SIGSEGV`, `exit code 2`, `not done after 60 s`."""
    traceback: str = ""
    """Traceback of its exception; of all its threads if it crashed or had to be stopped."""
    output: str = ""
    """The end of its stdout and stderr."""
    exit_code: int | None = None
    """`exitcode` of its `multiprocessing.Process`; None if it had to be stopped."""
    exception: Exception | None = None
    """The exception that it raised, if that can be pickled."""
    computed: bool = False
    """Whether it still computed when it had to be stopped, rather than wait."""

    def __str__(self) -> str:
        parts = [f"rank {self.rank}: {self.reason}", self.traceback, self.output]
        return "\n".join(part.rstrip() for part in parts if part.strip())


class RanksFailedError(RuntimeError):
    """Some ranks raised an exception, died, or did not return in time.

    Args:
        failures: in the order in which they were noticed; ranks that had to be stopped come last.
    """

    def __init__(self, failures: list[RankFailure], world_size: int) -> None:
        self.failures = failures
        shown = "\n\n".join(map(str, failures))
        super().__init__(f"{len(failures)} of {world_size} ranks failed\n\n{shown}")


class Ranks:
    """Processes that each call `function(*args)` as one rank of a world of their own.

    Each has the environment that torchrun sets (`RANK`, `MASTER_ADDR`, ...), one thread for
    computing, and its own stdout and stderr. Leaving the `with` block stops those still running.

    Args:
        function: of a module, so that it can be pickled; `args` and results must be picklable.
        env: environment of the ranks to which torchrun's variables are added; default: the
            caller's.
        output_folder: receives `rank-N.out` and `rank-N.err`; by default a temporary one.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        env: Mapping[str, str] | None = None,
        output_folder: Path | None = None,
    ) -> None:
        # As in torchrun, the launcher holds the store, so its port is certainly free.
        self._store = _store_of_this_host()
        self._temporary = tempfile.TemporaryDirectory(prefix="torchtitan-ranks-")
        # Pickled here, because `multiprocessing` would share the memory of tensors, by a thread.
        call = pickle.dumps((function, args))
        env = dict(os.environ if env is None else env)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        _shorten_socket_names()
        self._ranks = [
            _Rank(
                rank=rank,
                env=env | _torchrun_env(rank, world_size, self._store.port),
                call=call,
                output=(output_folder or Path(self._temporary.name)) / f"rank-{rank}",
                stacks=Path(self._temporary.name) / f"stacks-{rank}",
            )
            for rank in range(world_size)
        ]
        for rank in self._ranks:
            rank.start(context)

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks]

    def wait(self, timeout: float) -> list[Any]:
        """Return all ranks' results, or raise `RanksFailedError`.

        Args:
            timeout: seconds. On a busy machine, ranks that still compute then have up to
                `_MOST_PATIENCE` times as long; those that only wait are stopped.
        """
        start, to_judge = time.monotonic(), max(timeout / 10, _SECONDS_TO_JUDGE)
        deadline, limit = start + timeout, f"not done after {timeout:g} s"
        computed: dict[int, float] = {}
        recently: dict[int, float] = {}  # computed since ranks were judged before
        failures: list[RankFailure] = []
        running = {rank.process.sentinel: rank for rank in self._ranks}
        pipes = {rank.pipe: rank for rank in self._ranks}
        while running:
            ready = connection.wait([*running, *pipes], deadline - time.monotonic())
            if not ready:
                before = computed
                computed = {rank.rank: _cpu_seconds(rank.process.pid) for rank in running.values()}
                recently = {rank: computed[rank] - before.get(rank, 0.0) for rank in computed}
                waiting = bool(before) and max(recently.values()) < _IDLE * to_judge
                late = time.monotonic() - start > _MOST_PATIENCE * timeout
                if failures or waiting or late:
                    break
                deadline = time.monotonic() + to_judge
            for source in ready:
                if source in pipes:
                    pipes.pop(source).receive()
                elif source in running:
                    rank = running.pop(source)
                    pipes.pop(rank.pipe, rank).receive()
                    if failure := rank.failure():
                        failures.append(failure)
                        limit = "stopped, because another rank failed"
                        soon = time.monotonic() + _SECONDS_AFTER_A_FAILURE
                        deadline = min(deadline, soon)
        stopped = _stop(running.values(), limit)
        for failure in stopped:
            failure.computed = recently.get(failure.rank, 0.0) >= _IDLE * to_judge
        failures += stopped
        if failures:
            raise RanksFailedError(failures, len(self._ranks))
        return [rank.result for rank in self._ranks]

    def kill(self) -> None:
        """End all ranks at once. `wait`, possibly in another thread, then raises."""
        for rank in self._ranks:
            rank.process.kill()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.pipe.close()
        self._temporary.cleanup()


@dataclass(eq=False)
class _Rank:
    """The caller's side of one rank."""

    rank: int
    env: dict[str, str]
    call: bytes
    output: Path
    stacks: Path
    result: Any = None
    error: tuple[str, str, bytes] | None = None
    """An exception in one line, its traceback, and the pickled exception (b"" if impossible)."""
    process: Any = field(init=False)
    """A `multiprocessing` process; its types are too loose for one that has started or ended."""
    pipe: connection.Connection = field(init=False)

    def output_files(self) -> list[Path]:
        """Return the files of stdout and stderr."""
        return [self.output.with_suffix(suffix) for suffix in (".out", ".err")]

    def start(self, context: Any) -> None:
        for file in self.output_files():
            file.touch()
        self.pipe, theirs = context.Pipe(duplex=False)
        arguments = (theirs, self.call, self.env, os.getcwd(), self.output_files(), self.stacks)
        self.process = context.Process(target=_run_rank, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> None:
        """Receive the rank's result or error, unless it was received before or the rank died."""
        with suppress(EOFError, OSError):
            if self.pipe.poll():
                self.result, self.error = pickle.loads(self.pipe.recv_bytes())

    def failure(self, stopped: str = "") -> RankFailure | None:
        """Wait for the rank to end, and return why it failed; None if it returned.

        `stopped` is the reason for stopping it, if it was stopped.
        """
        self.process.join()
        code = self.process.exitcode
        if code == 0 and not stopped:
            return None
        exception = None
        if stopped:
            reason, details = stopped, _read_stacks(self.stacks)
        elif self.error:
            reason, details, pickled = self.error
            exception = _unpickle(pickled)
        elif code < 0:
            reason, details = f"killed by {signal.Signals(-code).name}", _read_stacks(self.stacks)
        else:
            reason, details = f"exit code {code}", ""
        output = "".join(_read_end(file, _SHOWN_OUTPUT) for file in self.output_files())
        return RankFailure(
            rank=self.rank,
            reason=reason,
            traceback=details,
            output=output[-_SHOWN_OUTPUT:],
            exit_code=None if stopped else code,
            exception=exception,
        )


def _store_of_this_host() -> dist.TCPStore:
    """Return a store that no other host reaches; by default it listens on all interfaces."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    host, port = listener.getsockname()
    descriptor = listener.detach()
    return dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
    )


def _shorten_socket_names() -> None:
    """Put the server's socket in /tmp if its name would be too long in TMPDIR, as in some jobs.

    `multiprocessing` creates its temporary folder once per process.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_TMPDIR:
        return
    usual = tempfile.tempdir
    tempfile.tempdir = "/tmp"
    try:
        util.get_temp_dir()
    finally:
        tempfile.tempdir = usual


def _cpu_seconds(pid: int) -> float:
    """Return how long a process and its children, such as compilers, have computed.

    0 if it has ended, or where there is no /proc.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        tasks = list(Path(f"/proc/{pid}/task").glob("*/children"))
        children = " ".join(task.read_text() for task in tasks).split()
    except OSError:
        return 0.0
    own = sum(map(int, fields[11:15]))  # proc(5): utime, stime, and those of children that ended
    return own / os.sysconf("SC_CLK_TCK") + sum(_cpu_seconds(int(child)) for child in children)


def _stop(ranks: Iterable[_Rank], reason: str) -> list[RankFailure]:
    """End ranks that still run, after they have written down their stacks."""
    ranks = list(ranks)
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank.process.pid, signal.SIGABRT)  # faulthandler writes the stacks
    deadline = time.monotonic() + _SECONDS_TO_DUMP_STACKS
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
        rank.process.kill()
    failures = [rank.failure(stopped=reason) for rank in ranks]
    return [failure for failure in failures if failure is not None]


def _pickle(exception: Exception) -> bytes:
    try:
        return pickle.dumps(exception)
    except Exception:
        return b""


def _unpickle(pickled: bytes) -> Exception | None:
    """Return the exception; None if its class is unknown here or takes other arguments."""
    try:
        return pickle.loads(pickled)
    except Exception:
        return None


def _read_end(path: Path, size: int) -> str:
    """Return the last `size` bytes of a file that may be large."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace")


def _read_stacks(path: Path) -> str:
    """Return the stacks that faulthandler wrote, without parts that are the same in every rank."""
    text = path.read_text(errors="replace") if path.exists() else ""
    threads = text.partition("\nExtension modules:")[0].split("\n\n")
    return "\n\n".join(thread for thread in threads if _end_with_parent.__name__ not in thread)


def _torchrun_env(rank: int, world_size: int, port: int) -> dict[str, str]:
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "GROUP_WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "OMP_NUM_THREADS": 1,
    }
    return {name: str(value) for name, value in values.items()}


def _run_rank(
    pipe: connection.Connection,
    call: bytes,
    env: dict[str, str],
    cwd: str,
    output_files: list[Path],
    stacks: Path,
) -> None:
    """Run a rank, in its own process."""
    gc.freeze()  # collecting the server's imports would copy their memory into each rank
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for descriptor, path in enumerate(output_files, start=1):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dump: the stacks are enough
    with suppress(OSError):  # when memory runs out, Linux should kill a rank, not its caller
        Path("/proc/self/oom_score_adj").write_text("1000")
    stacks_file = open(stacks, "w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.enable(stacks_file)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(call)
        reply = pickle.dumps((function(*args), None))
    except Exception as error:
        line = f"{type(error).__name__}: {error}"
        sent = (line, traceback.format_exc(), _pickle(error))
        pipe.send_bytes(pickle.dumps((None, sent)))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # a normal exit may hang: see `exit_may_hang`
    pipe.send_bytes(reply)


def _end_with_parent() -> None:
    """End this rank when its caller has ended, so that it does not wait for other ranks."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os._exit(1)
