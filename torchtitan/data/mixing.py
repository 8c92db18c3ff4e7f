"""Chooses the source of each sequence of a global batch.

Sequences are numbered over the whole run, and each number is assigned to a source by Tijdeman's
algorithm ("The chairman assignment problem", 1980): after any number of sequences since a phase
began, each source has had its share to within less than one sequence. So the tokens of a source in
any window of a phase are exact to less than two sequences, whatever the weights.

Each step spreads the sources over the rows of a batch by its own permutation, so that no row stays
with one source.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .order import mix, permute
from .sources import Source

_LARGEST = 2**40


@dataclass(frozen=True)
class Phase:
    """Weights that apply from a training step on."""

    from_step: int
    weights: tuple[float, ...]
    """One for each source; not all 0."""


@dataclass(frozen=True)
class Blend:
    """Several sources and their weights: the input of a loader that mixes."""

    sources: dict[str, Source]
    """Name in the metrics -> source."""
    phases: tuple[Phase, ...]

    @classmethod
    def of(cls, source: Source) -> Blend:
        return cls({"": source}, (Phase(1, (1.0,)),))


@dataclass
class MixtureState:
    """What a mixture remembers, the same for all rows of a batch."""

    steps: int
    """Steps done, in `BatchSizes.units`."""
    key: int
    """`weights_key` of the phase."""
    lags: list[int]
    """See `Mixture._draw`."""
    drawn: list[int]
    """Sequences taken from each source."""

    @classmethod
    def at(cls, step: int, drawn: Sequence[int]) -> MixtureState:
        """Return the state at the end of a step, before a new phase: no weights have the key 0."""
        return cls(step, 0, [0] * len(drawn), list(drawn))

    @property
    def numbers(self) -> list[int]:
        """As in a state of the loader; a mixture of one source has nothing to remember there."""
        return [self.steps, self.key, *self.lags, *self.drawn] if len(self.drawn) > 1 else []


def state_size(sources: int) -> int:
    return len(MixtureState.at(0, [0] * sources).numbers)


def split_rows(rows: np.ndarray, sources: int) -> tuple[MixtureState, list[np.ndarray]]:
    """Split a state of a loader, `[rows, k]`, see `DataLoader.state_dict`.

    Returns:
        The mixture's state, and for each source the `order.Place` of each row, `[rows, 4 or 5]`.
    """
    size = state_size(sources)
    state, numbers = MixtureState.at(0, [0] * sources), rows[0, :size].tolist()
    if numbers:
        steps, key, *rest = numbers
        state = MixtureState(steps, key, rest[:sources], rest[sources:])
    return state, np.split(rows[:, size:], sources, axis=1)


def join_rows(state: MixtureState, places: Sequence[np.ndarray]) -> np.ndarray:
    """Undo `split_rows`."""
    numbers = np.array(state.numbers, np.int64)
    return np.hstack([np.tile(numbers, (len(places[0]), 1)), *places])


class Mixture:
    """A schedule of sources.

    Args:
        phases: by ascending `from_step`, the first from step 1, all with as many weights.
        rows: sequences of a step. In a run whose batches grow, each unit of `BatchSizes` is a step
            here.
        seed: seed of the order within a step.
        state: where to go on; changed by `step`.
    """

    def __init__(
        self, phases: Sequence[Phase], rows: int, seed: int, state: MixtureState | None = None
    ) -> None:
        self._phases = [(phase.from_step, integer_weights(phase.weights)) for phase in phases]
        self._rows = rows
        self._seed = seed
        self.state = state or MixtureState.at(0, [0] * len(phases[0].weights))

    def step(self) -> np.ndarray:
        """Return the source of each row of the next step: `[rows]` int64."""
        chosen, state = np.zeros(self._rows, np.int64), self.state
        if len(state.drawn) == 1:
            return chosen
        state.steps += 1
        begin, weights = [phase for phase in self._phases if phase[0] <= state.steps][-1]
        key = weights_key(weights)
        # The weights of the config may have changed since the state was saved.
        if begin == state.steps or state.key != key:
            state.lags = [0] * len(weights)
        state.key = key
        order = permute(np.arange(self._rows), self._rows, mix(self._seed, state.steps))
        total, slack = sum(weights), max(2 * sum(weight > 0 for weight in weights) - 2, 1)
        chosen[order] = [self._draw(weights, total, slack) for _ in range(self._rows)]
        return chosen

    def _draw(self, weights: list[int], total: int, slack: int) -> int:
        """Choose the next sequence's source.

        `lag / total` is the number of sequences by which a source is behind its share. Of the
        sources that can take one without getting too far ahead, choose the one that must have it
        soonest.
        """
        chosen, time_left, lags = -1, 0, self.state.lags
        for source, weight in enumerate(weights):
            lags[source] += weight
            if lags[source] * slack < total:  # as always of weight 0
                continue
            # Time until the lag is 1 - 1 / slack, times `weight`, so that all numbers are whole.
            left = total * (slack - 1) - slack * lags[source]
            if chosen < 0 or left * weights[chosen] < time_left * weight:
                chosen, time_left = source, left
        lags[chosen] -= total
        self.state.drawn[chosen] += 1
        return chosen


class Steps:
    """The steps of a mixture for several readers, each of which takes all of them in order.

    A step of thousands of rows takes milliseconds under the interpreter's lock, so it is made once.
    """

    def __init__(self, mixture: Mixture, readers: int) -> None:
        self._mixture = mixture
        self._lock = threading.Lock()
        self._waiting: list[deque[tuple[np.ndarray, list[int]]]] = [deque() for _ in range(readers)]

    def of_reader(self, number: int) -> Iterator[tuple[np.ndarray, list[int]]]:
        """Yield the result of `Mixture.step`, and the numbers of the state after it."""
        own = self._waiting[number]
        while True:
            with self._lock:
                if not own:
                    step = self._mixture.step(), self._mixture.state.numbers
                    for waiting in self._waiting:
                        waiting.append(step)
                step = own.popleft()
            yield step


def weights_key(weights: Sequence[int]) -> int:
    """Hash the weights to a negative number of 63 bits."""
    return -1 - (functools.reduce(mix, weights, 0) >> 2)


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Return the smallest integers in the ratio of the weights, read as the decimals they print as.

    If they exceed 2^40, return integers near that ratio, where only 0 becomes 0.
    """
    fractions = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*whole)
    whole = [number // divisor for number in whole]
    largest = max(whole)
    if largest > _LARGEST:
        whole = [max(number * _LARGEST // largest, int(number > 0)) for number in whole]
    return whole
