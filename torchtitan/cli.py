"""The command `torchtitan`: a table of subcommands, each imported only when it is run."""

from __future__ import annotations

import atexit
import errno
import gc
import importlib
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType, TracebackType
from typing import NoReturn

import torchtitan
from torchtitan.errors import ConfigError, TitanError, did_you_mean, may_pass, outage_or

COMMANDS = {
    "train": ("torchtitan.train", "train a model"),
    "new": ("torchtitan.authoring.new.command", "start a new model of your own"),
    "verify": (
        "torchtitan.authoring.verify.command",
        "check that a model is correct, without a GPU",
    ),
    "converge": (
        "torchtitan.commands.converge.command",
        "train with several layouts from one seed, and compare the curves",
    ),
    "report": (
        "torchtitan.commands.report.command",
        "show the logs of runs as a page: curves, config, checkpoints",
    ),
    "generate": ("torchtitan.commands.generate", "continue prompts with a trained model"),
    "eval": (
        "torchtitan.commands.evaluate.command",
        "measure perplexity, or run tasks of lm-evaluation-harness",
    ),
    "convert": (
        "torchtitan.commands.convert.command",
        "convert from and to Hugging Face folders, and inspect both",
    ),
    "checkpoint": (
        "torchtitan.commands.checkpoint.command",
        "list, verify, prune, compare and average checkpoints",
    ),
    "download": ("torchtitan.commands.download", "fetch weights and tokenizer from the hub"),
    "data": ("torchtitan.data.command", "prepare token shards, or inspect data"),
    "plan": (
        "torchtitan.planning.command",
        "estimate memory, time and cost of a run, or search for a layout",
    ),
    "launch": (
        "torchtitan.launching.command",
        "start a job on Slurm, Kubernetes, SkyPilot or ssh hosts",
    ),
    "models": ("torchtitan.commands.models", "list the models, their flavors and sizes"),
}
"""Name -> (module with `main(argv)`, which may raise `TitanError`; one line of help)."""

_OF_PATHS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors that a path of the user's causes: no permission, a disk to be read only, a name that is
too long, links in a circle."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `TitanError`, or a file that one may not access (`_OF_PATHS`) or that cannot be
    reached now, into one line on stderr and its exit code; let other errors pass.

    Ctrl-C passes too, since the signal has to end the process for a shell's loop to end; but if
    nothing handles it, Python shows it in one line. Also works as a decorator.
    """
    try:
        yield
    except TitanError as error:
        _report(f"error: {error}")
        raise SystemExit(error.exit_code) from error
    except OSError as error:  # wherever a path of the user's is first looked at
        if error.filename is None or not (may_pass(error) or error.errno in _OF_PATHS):
            raise
        told = outage_or(TitanError, f"{error.filename}: {error.strerror}", error)
        _report(f"error: {told}")
        raise SystemExit(told.exit_code) from error
    except KeyboardInterrupt:
        sys.excepthook = partial(_show_interrupt, sys.excepthook)
        raise


def _show_interrupt(
    otherwise: Callable[..., object],
    kind: type[BaseException],
    error: BaseException,
    stack: TracebackType | None,
) -> None:
    """Show where the code of this package was interrupted; an `excepthook`."""
    if not issubclass(kind, KeyboardInterrupt):
        otherwise(kind, error, stack)
        return
    package = os.path.dirname(__file__)
    where = ""
    # Nothing may be imported here: Python 3.13 would forget to end the process by its signal.
    for frame, line in traceback.walk_tb(stack):
        code = frame.f_code
        if code.co_filename.startswith(package + os.sep):
            file = os.path.relpath(code.co_filename, os.path.dirname(package))
            where = f" at {file}:{line}, in {code.co_name}"
    sys.stderr.write(f"interrupted{where}\n")


def end_at_once(error: Exception | KeyboardInterrupt) -> NoReturn:
    """Show an error as `exit_on_user_error` or Python would, and end the process with its code.

    Nothing is cleaned up. Python would wait for threads, and process groups for pending work, both
    of which may wait for a rank that is gone; torchrun ends other ranks only once this one ends.
    """
    try:
        with exit_on_user_error():
            raise error
    except BaseException as shown:
        _end(_show(shown))


def leave(main: Callable[[], int]) -> NoReturn:
    """Call `main` and end the process as `sys.exit(main())` does, but without Python's teardown.

    The teardown cuts off threads that wait for the interpreter's lock, as gloo's threads do to free
    a tensor after a collective. C++ then aborts the process (Python up to 3.13, torch up to 2.13).
    """
    if _has_callers():
        sys.exit(main())
    try:
        code = main()
    except BaseException as error:
        code = _show(error)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    _end(code)


def _has_callers() -> bool:
    """Return whether another program runs this one in its process, as many profilers do: it may
    have work to do at the end.
    """
    frames = (frame.f_code for frame, _ in traceback.walk_stack(None))
    callers = {code.co_name for code in frames if code.co_filename != __file__}
    return not callers <= {"<module>", "_run_code", "_run_module_as_main"}  # of `python -m`


def _show(error: BaseException) -> int:
    """Show an error as Python does when it ends a process, and return the code; negative: the
    signal that is to end the process.
    """
    if not isinstance(error, SystemExit):
        own = error.__traceback__  # of the function that caught it
        sys.excepthook(type(error), error, own and own.tb_next)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error.code, int):
        return error.code
    if error.code is not None:
        sys.stderr.write(f"{error.code}\n")
    return 0 if error.code is None else 1


def _end(code: int) -> NoReturn:
    with suppress(OSError):  # nobody reads it
        sys.stdout.flush()
        sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        signal.raise_signal(-code)
    os._exit(code)


def run() -> NoReturn:
    """The console script."""
    leave(main)


@contextmanager
def exit_when_unread() -> Iterator[None]:
    """End quietly if nobody reads stdout any more: `torchtitan train --help | head -1`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        stdout = select.poll()
        stdout.register(sys.stdout, select.POLLOUT)  # macOS reports nothing on no events
        unread = select.POLLERR | select.POLLHUP  # on Linux, and on macOS
        if not any(event & unread for _, event in stdout.poll(0)):
            raise  # from a socket, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes on exit
        raise SystemExit(128 + signal.SIGPIPE) from None


def _report(message: str) -> None:
    """Show an error on stderr, once if several ranks have the same one."""
    from torchtitan.runtime.error_report import claim_report, write_error_file
    from torchtitan.tools.secrets import hide_secrets
    from torchtitan.tools.text import printable

    message = printable(hide_secrets(message))
    write_error_file(message)
    with claim_report(message) as first:
        if first:
            sys.stderr.write(message + "\n")
            sys.stderr.flush()


@exit_when_unread()
@exit_on_user_error()
def main(argv: list[str] | None = None) -> int:
    """Run `torchtitan <command> ...`, and return the exit code.

    Raises:
        SystemExit: code 2 for a user's mistake, 1 for an outage; either is printed to stderr.
    """
    if sys.platform == "win32":
        raise ConfigError("torchtitan runs on Linux and macOS; on Windows, start it in WSL")
    command, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if command in COMMANDS:
        return _import(COMMANDS[command][0]).main(arguments) or 0
    if command in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    if command == "--version":
        sys.stdout.write(f"torchtitan {torchtitan.__version__}\n")
        return 0
    if not command:
        sys.stderr.write(_usage())
        return 2
    raise ConfigError(f"unknown command {command!r}.{did_you_mean(command, COMMANDS)}")


def _import(name: str) -> ModuleType:
    """Import a command's module. Imported objects stay alive, so no garbage collection needs to
    look at them: that saves more than a second of CPU time over a whole training run.
    """
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: torchtitan <command> [options]\n\n"
        f"{torchtitan.__doc__.splitlines()[0]}\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n  -h, --help  show this help, or that of a command: torchtitan train --help\n"
        "  --version   show the version\n"
    )
