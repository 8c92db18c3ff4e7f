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


class Mixture:
    """A schedule of sources, with a state of `2 + 2 sources` integers.

    Args:
        phases: by ascending `from_step`, the first from step 1, all with as many weights.
        rows: sequences in a global batch.
        seed: seed of the order within a step.
    """

    def __init__(self, phases: Sequence[Phase], rows: int, seed: int) -> None:
        self._phases = [(phase.from_step, integer_weights(phase.weights)) for phase in phases]
        self._rows = rows
        self._seed = seed
        self.sources = len(phases[0].weights)
        self._steps = 0
        self._key = weights_key(self._phases[0][1])
        self._lags = [0] * self.sources
        self._drawn = [0] * self.sources

    @property
    def state(self) -> tuple[int, ...]:
        """Steps done, a key of the weights, then the lag and number of sequences of each source.

        A mixture of one source has nothing to remember, so its state is empty.
        """
        if self.sources == 1:
            return ()
        return (self._steps, self._key, *self._lags, *self._drawn)

    @staticmethod
    def state_size(sources: int) -> int:
        return 0 if sources == 1 else 2 + 2 * sources

    @staticmethod
    def steps_part(sources: int) -> slice:
        """Return the part of a state that has the number of steps done."""
        return slice(1 if sources > 1 else 0)

    @staticmethod
    def drawn_part(sources: int) -> slice:
        """Return the part of a state that has the number of sequences taken from each source."""
        return slice(2 + sources, 2 + 2 * sources) if sources > 1 else slice(0)

    @staticmethod
    def drawn(state: Sequence[int], sources: int) -> list[int]:
        """Return the number of sequences taken from each source, according to a state."""
        return list(state[Mixture.drawn_part(sources)])

    def load_state(self, state: Sequence[int]) -> None:
        if self.sources > 1:
            self._steps, self._key, *rest = state
            self._lags, self._drawn = rest[: self.sources], rest[self.sources :]

    def step(self) -> np.ndarray:
        """Return the source of each row of the next step: `[rows]` int64."""
        chosen = np.zeros(self._rows, np.int64)
        if self.sources == 1:
            return chosen
        self._steps += 1
        begin, weights = [phase for phase in self._phases if phase[0] <= self._steps][-1]
        # The config may have changed. In states of earlier versions, the key is the sum of weights.
        changed = self._key not in (weights_key(weights), sum(weights))
        if begin == self._steps or changed:
            self._lags = [0] * self.sources
        self._key = weights_key(weights)
        order = permute(np.arange(self._rows), self._rows, mix(self._seed, self._steps))
        chosen[order] = [self._draw(weights) for _ in range(self._rows)]
        return chosen

    def _draw(self, weights: list[int]) -> int:
        """Choose the next sequence's source.

        `lag / total` is the number of sequences by which a source is behind its share. Of the
        sources that can take one without getting too far ahead, choose the one that must have it
        soonest.
        """
        total, slack = sum(weights), max(2 * sum(weight > 0 for weight in weights) - 2, 1)
        chosen, time_left = -1, 0
        for source, weight in enumerate(weights):
            self._lags[source] += weight
            if weight == 0 or self._lags[source] * slack < total:
                continue
            # Time until the lag is 1 - 1 / slack, times `weight`, so that all numbers are whole.
            left = total * (slack - 1) - slack * self._lags[source]
            if chosen < 0 or left * weights[chosen] < time_left * weight:
                chosen, time_left = source, left
        if chosen < 0:  # an old state has lags of other weights with the same sum
            chosen = max(np.flatnonzero(weights).tolist(), key=lambda source: self._lags[source])
        self._lags[chosen] -= total
        self._drawn[chosen] += 1
        return chosen


class Steps:
    """The steps of a mixture for several readers, each of which takes all of them in order.

    A step of thousands of rows takes milliseconds under the interpreter's lock, so it is made once.
    """

    def __init__(self, mixture: Mixture, readers: int) -> None:
        self._mixture = mixture
        self._lock = threading.Lock()
        self._waiting: list[deque[tuple[np.ndarray, tuple[int, ...]]]] = [
            deque() for _ in range(readers)
        ]

    def of_reader(self, number: int) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
        """Yield the result of `Mixture.step` and the state after it."""
        own = self._waiting[number]
        while True:
            with self._lock:
                if not own:
                    step = self._mixture.step(), self._mixture.state
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
