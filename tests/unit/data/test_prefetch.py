from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from torchtitan.data.prefetch import Prefetcher
from torchtitan.errors import DataError

DEPTH = 3


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "torchtitan-prefetch"]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.unfreeze()  # `cli.main` freezes what it finds, also loaders of other tests
    gc.collect()
    wait_until(lambda: not threads())


def test_items_come_in_order_and_then_end() -> None:
    prefetcher = Prefetcher(iter(range(20)), DEPTH)
    assert list(prefetcher) == list(range(20))
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_it_reads_a_limited_number_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in itertools.count():
            made.append(i)
            yield i

    prefetcher = Prefetcher(items(), DEPTH)
    wait_until(lambda: len(made) == DEPTH + 1)  # one more is ready to be put
    time.sleep(0.05)
    assert len(made) == DEPTH + 1
    assert next(prefetcher) == 0
    wait_until(lambda: len(made) == DEPTH + 2)
    prefetcher.close()


def test_an_error_comes_in_its_turn_as_it_is_and_stays() -> None:
    error = DataError("file.jsonl:7: broken")

    def items() -> Iterator[int]:
        yield from (1, 2)
        raise error

    prefetcher = Prefetcher(items(), DEPTH)
    assert [next(prefetcher), next(prefetcher)] == [1, 2]
    for _ in range(2):
        with pytest.raises(DataError) as raised:
            next(prefetcher)
        assert raised.value is error


def test_close_ends_a_thread_that_waits_for_room_and_may_be_repeated() -> None:
    prefetcher = Prefetcher(itertools.count(), 1)
    wait_until(lambda: len(threads()) == 1)
    prefetcher.close()
    assert not threads()
    prefetcher.close()


def test_the_thread_ends_with_its_prefetcher() -> None:
    prefetcher = Prefetcher(itertools.count(), 1)
    next(prefetcher)
    del prefetcher
    gc.collect()
    assert not threads()
