"""Combine the metrics of data loaders, losses and optimizers over ranks."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.errors import ConfigError
from torchtitan.runtime.host_sum import sum_over_ranks


def loader_metrics(dataloader: Any) -> dict[str, float]:
    """Return the metrics of a loader, if it has any: means over the ranks that report each.

    All ranks call this.
    """
    tell = getattr(dataloader, "metrics", None)
    values: dict[str, Any] = tell() if tell else {}
    return _means({n: (own_number("a data loader", n, v), 1) for n, v in values.items()})


def loss_metrics(loss_fn: Any) -> dict[str, float]:
    """Return the metrics of a loss since the last call: sums divided by counts.

    Sums and counts are each added over all ranks, so ranks that compute the same values do not
    change the quotient, and pipeline stages without a loss add nothing. Metrics with a count of 0
    are left out. All ranks call this.
    """
    tell = getattr(loss_fn, "metrics", None)
    if tell is None:
        return {}
    pairs: dict[str, tuple[float, float]] = {}
    for name, pair in tell().items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ConfigError(
                f"metrics() of a loss maps {name!r} to {pair!r}. It must be a sum and a count, "
                "such as (6.0, 2)"
            )
        pairs[name] = own_number("a loss", name, pair[0]), own_number("a loss", name, pair[1])
    return _means(pairs)


def own_number(who: str, name: Any, value: Any) -> float:
    """Return a value of an author's `metrics()`. Raise `ConfigError` if it is no number."""
    try:
        if isinstance(name, str) and not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ConfigError(
        f"metrics() of {who} has {name!r}: {value!r}. Names must be strings, and values numbers "
        "or tensors of one number"
    )


def highest_of_ranks(value: float) -> float:
    """Return the highest value of any rank. All ranks call this."""
    highest = torch.tensor(value, dtype=torch.float64)
    sum_over_ranks(highest, dist.ReduceOp.MAX)
    return highest.item()


def _means(values: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Return sums divided by counts over all ranks. Ranks may have different names."""
    # All ranks have the same names if the maximum of their checksums is also the minimum.
    digest = hashlib.blake2b("\n".join(values).encode(), digest_size=7).digest()
    checksum = int.from_bytes(digest)
    bounds = torch.tensor([checksum, -checksum])
    sum_over_ranks(bounds, dist.ReduceOp.MAX)
    if bounds[0] == -bounds[1]:
        sums = torch.tensor(list(values.values()), dtype=torch.float64)
        if values:
            sum_over_ranks(sums)
        summed = dict(zip(values, sums.tolist(), strict=True))
    else:
        of_ranks: list[dict[str, tuple[float, float]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(of_ranks, values)
        summed = {}
        for name in sorted(set().union(*of_ranks)):
            totals, counts = zip(*(own[name] for own in of_ranks if name in own), strict=True)
            summed[name] = sum(totals), sum(counts)
    return {name: total / count for name, (total, count) in summed.items() if count}
