"""Figures that the tests of faults measure, shown at the end of the test run."""

from __future__ import annotations

import pytest

_FIGURES = pytest.StashKey[dict[str, object]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = {}


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> dict[str, object]:
    """Name -> figure; what tests put in is shown."""
    return pytestconfig.stash[_FIGURES]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if figures := config.stash[_FIGURES]:
        terminalreporter.section("faults")
        for name, figure in figures.items():
            terminalreporter.line(f"{name}: {figure}")
