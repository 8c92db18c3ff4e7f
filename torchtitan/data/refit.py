"""Converts a position in the data to other sources, or to another global batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchtitan.config.batch import BatchSizes

from .mixing import MixtureState, join_rows, split_rows
from .order import Place


def refit(
    rows: np.ndarray, was: Sequence[str], now: Sequence[str], sizes: BatchSizes, step: int
) -> np.ndarray:
    """Return the position from which a changed run goes on with the documents not read yet.

    Row `b` of a batch of `B` has documents `b`, `b + B`, `b + 2 B`, ... In a batch of `m B` rows,
    `m` rows share those that it has not begun: the one at which it is goes to row `document % m B`.
    In a batch of `B / m`, a row has the documents of `m` former rows. It begins where the last of
    them was, and so reads again what the others had read beyond that: see `count_read_again`.

    Args:
        rows: `[B, k]` int64 of all ranks, in order: see `DataLoader.state_dict`.
        was: names of the sources of this state.
        now: names of the sources. One that is not in `was` begins at its first document.
        sizes: of the batches. The largest is a multiple or a divisor of `B`. If it is not `B`,
            packing must be contiguous and the sources must have random access.
        step: steps done.

    Returns:
        `[sizes.largest, k]` int64, with `k` for the sources `now`.
    """
    batch, global_batch_size = len(rows), sizes.largest
    all_rows = np.arange(global_batch_size)
    state, places = split_rows(rows, len(was))
    parts, size = dict(zip(was, places, strict=True)), places[0].shape[1]
    found = []
    for name in now:
        if name in parts and global_batch_size < batch:
            groups = parts[name].reshape(-1, global_batch_size, size)
            last = groups[:, :, :1].argmin(axis=0)
            found.append(np.take_along_axis(groups, last[np.newaxis], axis=0)[0])
        elif name in parts:
            part = np.zeros((global_batch_size, size), np.int64)
            part[:batch] = parts[name]
            part[:, 0] = np.resize(parts[name][:, 0], len(part)) + all_rows // batch * batch
            found.append(part[np.argsort(part[:, 0] % global_batch_size)])
        else:
            found.append(np.array([Place(row)[:size] for row in all_rows.tolist()]))
    if list(was) != list(now):
        one = len(was) == 1  # which has no state
        read = sizes.through(step) * batch // global_batch_size
        drawn = dict(zip(was, [read] if one else state.drawn, strict=True))
        drawn_now = [drawn.get(name, 0) for name in now]
        state = MixtureState.at(sizes.units(step) if one else state.steps, drawn_now)
    return join_rows(state, found)


def count_read_again(rows: np.ndarray, was: Sequence[str], global_batch_size: int) -> int:
    """Return how many documents a smaller batch reads again, in whole or in part: see `refit`."""
    batch, places = len(rows), np.stack(split_rows(rows, len(was))[1], axis=1)
    groups = places.reshape(-1, min(global_batch_size, batch), *places.shape[1:])
    ahead = groups[..., 0] - groups[..., 0].min(axis=0)
    begun = (groups[..., 1] > 0) & (ahead > 0)
    return int((ahead // batch + begun).sum())
