"""What parts of a run tell for the metrics, each rank its own: means over all that tell it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torchtitan.distributed.host_sum import HostSum

_SLOTS = 128
"""Numbers that go in the same message as their names' checksums: two for each name."""


def loader_metrics(dataloader: Any, sum_over_ranks: HostSum) -> dict[str, float]:
    """What a loader tells about itself, if it does: means over the ranks that tell it.

    All ranks call this.
    """
    tell = getattr(dataloader, "metrics", None)
    values: dict[str, float] = tell() if tell else {}
    return _means({name: (value, 1) for name, value in values.items()}, sum_over_ranks)


def loss_metrics(loss_fn: Any, sum_over_ranks: HostSum) -> dict[str, float]:
    """What a loss tells of the steps since it was asked last: its sums over its counts.

    Both are added up over all ranks, so ranks that compute the same do not change the quotient, and
    stages of a pipeline that have no loss add nothing. Absent where nothing was counted. All ranks
    call this.
    """
    tell = getattr(loss_fn, "metrics", None)
    return _means(tell(), sum_over_ranks) if tell else {}


def _means(values: dict[str, tuple[float, float]], sum_over_ranks: HostSum) -> dict[str, float]:
    """Sums over counts, of all ranks. Names may be others on each rank."""
    told = {name: (float(total), float(count)) for name, (total, count) in values.items()}
    numbers = [number for pair in told.values() for number in pair]
    checksums = _checksums("\n".join(told))
    ranks, firsts = dist.get_world_size(), numbers[:_SLOTS]
    # One sum for both. It is of as many numbers on each rank, whatever that rank tells.
    given = [*checksums, *(c**2 for c in checksums), *firsts, *[0.0] * (_SLOTS - len(firsts))]
    sums = torch.tensor(given, dtype=torch.float64)
    sum_over_ranks(sums)
    parts = len(checksums)
    pairs = zip(sums[:parts].tolist(), sums[parts : 2 * parts].tolist(), strict=True)
    # Equal for numbers that are all the same, and for no others (Cauchy and Schwarz).
    if all(int(total) ** 2 == ranks * int(squares) for total, squares in pairs):
        rest = torch.tensor(numbers[_SLOTS:], dtype=torch.float64)
        if len(rest):
            sum_over_ranks(rest)
        summed = torch.cat([sums[2 * parts :][: len(firsts)], rest]).tolist()
        told = dict(zip(told, zip(summed[::2], summed[1::2], strict=True), strict=True))
    else:
        of_ranks: list[dict[str, tuple[float, float]]] = [{}] * ranks
        dist.all_gather_object(of_ranks, told)
        names = sorted(set().union(*of_ranks))
        told = {name: _sum(own[name] for own in of_ranks if name in own) for name in names}
    return {name: total / count for name, (total, count) in told.items() if count}


def _sum(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    totals, counts = zip(*pairs, strict=True)
    return sum(totals), sum(counts)


def _checksums(text: str) -> tuple[int, int]:
    """Of 16 bits each: the squares of a million ranks' add up to less than 53 bits, exactly."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest[:2]), int.from_bytes(digest[2:])
