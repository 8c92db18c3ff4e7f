"""Garbage is collected at fixed steps, and Python's own collection comes back."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from torchtitan.tools.garbage_collection import GarbageCollection, without_collection


@pytest.fixture(autouse=True)
def automatic() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The generations that were collected so far."""
    generations: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda generation=2: generations.append(generation))
    return generations


def test_collects_only_every_freq_steps(collected: list[int]) -> None:
    collection = GarbageCollection(5)
    assert collected == [2]  # all that set-up left
    steps_that_collected = []
    for step in range(1, 13):
        before = len(collected)
        collection.step(step)
        if len(collected) > before:
            steps_that_collected.append(step)
    assert steps_that_collected == [5, 10]
    assert collected == [2, 1, 1]
    collection.close()


def test_automatic_collection_is_off_in_between_and_back_after_close() -> None:
    collection = GarbageCollection(5)
    assert not gc.isenabled()
    collection.close()
    assert gc.isenabled()


def test_close_leaves_collection_off_that_was_off_before() -> None:
    gc.disable()
    GarbageCollection(5).close()
    assert not gc.isenabled()


def test_freq_0_changes_nothing(collected: list[int]) -> None:
    collection = GarbageCollection(0)
    assert gc.isenabled()
    collection.step(1)
    collection.close()
    assert gc.isenabled()
    assert not collected


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_as_before_after_a_pause(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    with pytest.raises(ValueError), without_collection():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled() == enabled
