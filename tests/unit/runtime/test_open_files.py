"""A process may open as many files as the system lets it."""

import resource

import pytest

from torchtitan.runtime.open_files import allow_open_files

INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("before", "takes_infinity", "after"),
    [
        ((1024, 4096), True, (4096, 4096)),
        ((256, INFINITE), True, (INFINITE, INFINITE)),
        ((256, INFINITE), False, (10_240, INFINITE)),  # macOS
        ((INFINITE, INFINITE), False, (INFINITE, INFINITE)),
    ],
)
def test_the_limit_is_raised_as_far_as_possible(before, takes_infinity, after, monkeypatch):
    limits = [before]

    def setrlimit(kind, new):
        if new[0] == INFINITE and not takes_infinity:
            raise ValueError("current limit exceeds maximum limit")
        limits.append(new)

    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    allow_open_files()
    assert limits[-1] == after
