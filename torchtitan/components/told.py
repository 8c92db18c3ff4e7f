"""What parts of a run tell for the metrics, each rank its own: means over all that tell it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torchtitan.distributed.host_sum import HostSum


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
    told = {name: [float(number) for number in pair] for name, pair in values.items()}
    if not _alike("\n".join(told), sum_over_ranks):
        of_ranks: list[dict[str, list[float]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(of_ranks, told)
        names = sorted(set().union(*of_ranks))
        told = {name: _sums(own[name] for own in of_ranks if name in own) for name in names}
    elif told:
        sums = torch.tensor(list(told.values()), dtype=torch.float64)
        sum_over_ranks(sums)
        told = dict(zip(told, sums.tolist(), strict=True))
    return {name: total / count for name, (total, count) in told.items() if count}


def _sums(pairs: Iterable[list[float]]) -> list[float]:
    return [sum(column) for column in zip(*pairs, strict=True)]


def _alike(text: str, sum_over_ranks: HostSum) -> bool:
    """Whether all ranks have the same text, by a checksum of it."""
    checksum = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=3).digest())
    sums = torch.tensor([checksum, checksum**2])  # 48 bits: thousands of ranks' fit into 63
    sum_over_ranks(sums)
    total, total_of_squares = sums.tolist()
    # Equal for numbers that are all the same, and for no others (Cauchy and Schwarz).
    return bool(total**2 == dist.get_world_size() * total_of_squares)
