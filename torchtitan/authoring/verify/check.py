"""Defines a check and its outcomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .subject import Subject

Function = TypeVar("Function", bound="Callable[[Subject], str]")


class CheckFailedError(Exception):
    """The model does not satisfy the check.

    Args:
        problem: what differs, where and by how much, in one or two sentences.
        hint: where the author should look, and the usual mistake.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem, hint)  # both, so that it can be pickled
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return self.problem


class NotApplicableError(Exception):
    """The check does not apply to this model; the message gives the reason."""


@dataclass(frozen=True)
class Check:
    """One question to a model, with a name that `--only` and the table show."""

    name: str
    """`group.question`, such as `contract.init_weights` or `layouts.fsdp2_tp2`."""
    asks: str
    """The condition that must hold, in a line."""
    run: Callable[[Subject], str]
    """Called on each rank. Returns the measurement in a few words, or "".

    Must be a module-level function (or a `functools.partial` of one), so that it can be pickled.

    Raises:
        CheckFailedError: the condition does not hold.
        NotApplicableError: the check does not apply to this model.
    """
    ranks: int = 1
    """Number of processes. `run` is called on all, and joins their process group."""
    timeout: float = 60.0
    """Seconds; a check that takes longer has failed, most likely in a collective."""
    quick: bool = True
    """Part of `--quick`."""
    float64: bool = False
    """Whether to compute in float64, if the model can: see `layouts.precision`."""
    needs: tuple[str, ...] = ()
    """Checks that must have passed before: this check reads files that they leave in
    `Subject.folder`, or would only fail again for the same reason."""

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]


class Checks(list[Check]):
    """The checks of a module, in the order in which they are run and shown.

    Args:
        needs: default `needs` of the checks; else they need that the model can be imported.
    """

    def __init__(self, *needs: str) -> None:
        super().__init__()
        self._needs = needs or ("contract.import",)

    def of(self, name: str, asks: str, **options: Any) -> Callable[[Function], Function]:
        """Decorate a function as `run` of a check, with these and other fields of `Check`."""

        def declare(run: Function) -> Function:
            self.append(Check(name, asks, run, **{"needs": self._needs, **options}))
            return run  # unchanged, so that it can be pickled

        return declare


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check."""

    check: Check
    status: str
    """`pass`, `fail`, or `skip` if it does not apply, or a check that it needs has failed."""
    message: str = ""
    """The measurement (pass), the problem (fail), or the reason (skip)."""
    hint: str = ""
    """Where to look after a failure."""
    details: str = ""
    """A traceback, or the stacks of the ranks, if there is one."""
    seconds: float = 0.0
