"""What all ranks write, as tables of numbers on rank 0.

Thousands of ranks write millions of shards. torch.distributed.checkpoint has several Python objects
for each, which rank 0 receives, compares, sends back and pickles: 0.1 ms and 4 kB a shard. In the
tables a shard takes some 60 bytes, and `.metadata` is written from them with no object for a shard.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult


@dataclass
class ToldItems:
    """The items that a rank writes, to be sent to rank 0."""

    heads: bytes
    """Name -> what the metadata has of it but for the shards, pickled. The same bytes on all ranks
    with the same names, so that rank 0 reads them once."""
    numbers: np.ndarray
    """`[items, 1 + 2 * dims]` int64: which name, offsets, sizes (0 and 1 in dimensions that the
    tensor lacks)."""
    paths: dict[str, Any]
    """Name -> where it was in the nested state: some of the `planner_data` of the metadata."""

    @classmethod
    def of(
        cls, items: list[WriteItem], everything: list[WriteItem], paths: dict[str, Any]
    ) -> ToldItems:
        """Describe `items`, some of `everything` that the rank could write."""
        heads = {item.index.fqn: _head(item) for item in everything}
        number = {name: at for at, name in enumerate(heads)}
        dims = max((len(_box(item)[0]) for item in items), default=0)
        rows = []
        for item in items:
            offsets, sizes = _box(item)
            missing = dims - len(offsets)
            rows.append((number[item.index.fqn], *offsets, *[0] * missing, *sizes, *[1] * missing))
        numbers = np.array(rows, dtype=np.int64).reshape(len(rows), 1 + 2 * dims)
        return cls(zlib.compress(pickle.dumps(heads)), numbers, paths)

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(eq=False)
class Places:
    """Where a rank has written its items, in their order."""

    files: list[str]
    numbers: np.ndarray
    """`[items, 3]` int64: which file, offset and length in it."""

    @classmethod
    def of(cls, items: list[WriteItem], results: list[WriteResult]) -> Places:
        at = {result.index: result.storage_data for result in results}
        files: dict[str, int] = {}
        rows = []
        for item in items:
            place = at[item.index]
            file = files.setdefault(place.relative_path, len(files))
            rows.append((file, place.offset, place.length))
        return cls(list(files), np.array(rows, dtype=np.int64).reshape(len(rows), 3))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Places)
            and self.files == other.files
            and np.array_equal(self.numbers, other.numbers)
        )


class SaveTable:
    """The items of all ranks, of which each is written once.

    Args:
        told: of each rank.

    Raises:
        ValueError: the shards do not cover a tensor exactly.
    """

    def __init__(self, told: list[ToldItems]) -> None:
        self._paths = {key: path for own in reversed(told) for key, path in own.paths.items()}
        self._heads: list[tuple[str, Any]] = []
        """Names, and what the metadata has of each but for the shards. A name that ranks have for
        themselves may be of different tensors, or of a value on some."""
        kinds: dict[Any, int] = {}
        known: dict[bytes, np.ndarray] = {}
        self._dims = max((own.numbers.shape[1] // 2 for own in told), default=0)
        self._rows = np.empty((sum(map(len, told)), 1 + 2 * self._dims), dtype=np.int64)
        """As `ToldItems.numbers` but with the numbers of `_heads`, of all ranks in turn."""
        self._begins = np.cumsum([0, *map(len, told)])
        for own, begin, end in zip(told, self._begins, self._begins[1:], strict=False):
            if own.heads not in known:
                heads = pickle.loads(zlib.decompress(own.heads)).items()
                for name, head in heads:
                    if (name, _kind(head)) not in kinds:
                        kinds[name, _kind(head)] = len(self._heads)
                        self._heads.append((name, head))
                numbers = [kinds[name, _kind(head)] for name, head in heads]
                known[own.heads] = np.array(numbers, np.int64)
            dims = own.numbers.shape[1] // 2
            rows = self._rows[begin:end]
            rows[:, 0] = known[own.heads][own.numbers[:, 0]]
            rows[:, 1 : 1 + self._dims], rows[:, 1 + self._dims :] = 0, 1
            rows[:, 1 : 1 + dims] = own.numbers[:, 1 : 1 + dims]
            rows[:, 1 + self._dims : 1 + self._dims + dims] = own.numbers[:, 1 + dims :]
        self._take_the_first_kind()
        order = np.lexsort(self._rows[:, self._dims :: -1].T)
        self._order = order[self._rows[order, 0] >= 0]
        """Numbers of the rows that are written, by name, then by place."""
        self._keep_one_of_each()
        self._check()

    def _take_the_first_kind(self) -> None:
        """Of a name that differs between ranks, take what the first rank that writes it has."""
        numbers = {name: number for number, (name, _) in enumerate(self._heads)}
        last = np.array([numbers[name] for name, _ in self._heads], np.int64)
        told = self._rows[:, 0]
        first = np.empty(len(last), np.int64)
        first[last[told[::-1]]] = told[::-1]  # of equal indices, the last counts
        told[first[last[told]] != told] = -1

    def _keep_one_of_each(self) -> None:
        """Leave each item that several ranks have to the one of them that writes least."""
        place = self._rows[self._order, : 1 + self._dims]
        is_new = np.ones(len(place), dtype=bool)
        is_new[1:] = (place[1:] != place[:-1]).any(axis=1)
        begins = np.flatnonzero(is_new)
        ends = np.append(begins[1:], len(place))
        several = ends - begins > 1

        rank_of = np.repeat(np.arange(len(self._begins) - 1), np.diff(self._begins))
        item_bytes = np.array([_element_bytes(head) for _, head in self._heads] or [0])
        sizes = self._rows[:, 1 + self._dims :].prod(axis=1) * item_bytes[self._rows[:, 0]]
        alone = self._order[begins[~several]]
        written = np.bincount(rank_of[alone], sizes[alone], minlength=len(self._begins) - 1)
        kept = [alone]
        for begin, end in zip(begins[several], ends[several], strict=True):
            same = self._order[begin:end]
            chosen = same[[written[rank_of[same]].argmin()]]
            written[rank_of[chosen]] += sizes[chosen]
            kept.append(chosen)
        self._kept = np.zeros(len(self._rows), dtype=bool)
        self._kept[np.concatenate(kept)] = True
        self._order = self._order[self._kept[self._order]]

    def not_written(self) -> list[list[int]]:
        """Return the numbers of the items of each rank that another rank writes."""
        spans = zip(self._begins, self._begins[1:], strict=False)
        return [np.flatnonzero(~self._kept[begin:end]).tolist() for begin, end in spans]

    def _by_name(self) -> Iterator[tuple[str, Any, np.ndarray]]:
        """Yield each name, what the metadata has of it, and the numbers of its rows, by place."""
        numbers = self._rows[self._order, 0]
        begins = np.searchsorted(numbers, np.arange(len(self._heads) + 1))
        for (name, head), begin, end in zip(self._heads, begins, begins[1:], strict=False):
            if end > begin:
                yield name, head, self._order[begin:end]

    def _boxes(self, rows: np.ndarray, dims: int) -> tuple[np.ndarray, np.ndarray]:
        """Return offsets and sizes, `[rows, dims]` each."""
        first = 1 + self._dims
        return self._rows[rows, 1 : 1 + dims], self._rows[rows, first : first + dims]

    def _check(self) -> None:
        """Check that the shards of each tensor cover each element exactly once."""
        right: set[tuple[torch.Size, bytes, bytes]] = set()
        for name, entry, rows in self._by_name():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            offsets, sizes = self._boxes(rows, len(entry.size))
            layout = entry.size, offsets.tobytes(), sizes.tobytes()
            if layout in right:  # as most tensors, of the same layer elsewhere
                continue
            at = first_fault(entry.size, offsets, sizes)
            if at is not None:
                raise ValueError(
                    f"the ranks would not write each element of {name} {list(entry.size)} exactly "
                    f"once: its {len(rows)} parts leave a gap, overlap or exceed the tensor "
                    f"at {at}"
                )
            right.add(layout)

    def metadata(self, places: dict[int, Places], meta: StorageMeta, version: str) -> bytes:
        """Return the contents of `.metadata`.

        Args:
            places: rank -> where it has written its items.
        """
        files: dict[str, int] = {}
        at = np.empty((len(self._rows), 3), dtype=np.int64)
        for rank, own in places.items():
            begin, end = self._begins[rank : rank + 2]
            rows = begin + np.flatnonzero(self._kept[begin:end])
            numbers = np.array([files.setdefault(name, len(files)) for name in own.files], np.int64)
            at[rows] = own.numbers
            at[rows, 0] = numbers[own.numbers[:, 0]]
        pickled = _Pickled(list(files))
        for name, entry, rows in self._by_name():
            if isinstance(entry, TensorStorageMetadata):
                pickled.add(name, entry, at[rows], *self._boxes(rows, len(entry.size)))
            else:
                pickled.add(name, entry, at[rows])
        return pickled.finish(Metadata({}, self._paths, {}, meta, version))


def first_fault(size: torch.Size, offsets: np.ndarray, sizes: np.ndarray) -> list[int] | None:
    """Return where shards of a tensor leave a gap, overlap or exceed it; None: nowhere.

    PyTorch's check compares pairs of shards, which takes minutes if thousands of ranks shard a
    tensor along two dimensions. Here a shard counts 1 at its first corner, -1 at the corners next
    to that, 1 at those next to these and so on. The sums over shards equal those of the whole
    tensor only if nothing is missing or overlaps.

    Args:
        offsets, sizes: of the shards, `[shards, dims]`.
    """
    outside = (offsets < 0).any(axis=1) | (offsets + sizes > np.array(size, np.int64)).any(axis=1)
    if outside.any():
        return offsets[outside][0].tolist()
    begins = np.concatenate([offsets, np.zeros((1, len(size)), np.int64)])
    ends = np.concatenate([offsets + sizes, np.array([size], np.int64).reshape(1, len(size))])
    corners, signs = np.zeros(len(begins), np.int64), np.ones(len(begins), np.int64)
    signs[-1] = -1  # the whole tensor
    for dim, length in enumerate(size):
        corners = corners * (length + 1)
        corners = np.concatenate(
            [corners + np.resize(begins[:, dim], len(corners))]
            + [corners + np.resize(ends[:, dim], len(corners))]
        )
        signs = np.concatenate([signs, -signs])
    found, index = np.unique(corners, return_inverse=True)
    wrong = found[np.bincount(index, signs) != 0]
    if not len(wrong):
        return None
    return [int(i) for i in np.unravel_index(wrong[0], [length + 1 for length in size])]


class _Pickled:
    """Writes pickled `Metadata` with the numbers of shards filled into patterns.

    A pattern is a pickled shard whose numbers are known, so that they are found in its bytes. What
    all shards have, such as classes, is pickled once, and referred to by its number in the memo.
    """

    def __init__(self, files: list[str]) -> None:
        shard = ChunkStorageMetadata(torch.Size([]), torch.Size([]))
        shared = [ChunkStorageMetadata, MetadataIndex, _StorageInfo, torch.Size, *vars(shard)]
        shared += [*vars(MetadataIndex("", [])), *vars(_StorageInfo("", 0, 0))]
        self._memo = {_fast(value): number for number, value in enumerate(dict.fromkeys(shared))}
        self._files = len(self._memo)
        self._begin = [b"\x80\x02"]  # protocol 2, whose numbers have one form
        for number, value in enumerate([*self._memo, *map(_fast, files)]):
            self._begin.append(value + _PUT + _as_bytes(number, 4) + _POP)
        self._names = self._files + len(files)
        self._entries: list[bytes] = []
        self._places: list[bytes] = []

    def add(
        self,
        name: str,
        entry: Any,
        at: np.ndarray,
        offsets: np.ndarray | None = None,
        sizes: np.ndarray | None = None,
    ) -> None:
        """Add a name and its shards.

        Args:
            at: as `Places.numbers`, but with the numbers of `files`.
            offsets, sizes: of the shards, `[shards, dims]`; None: it is no tensor.
        """
        number, dims = self._names, 0 if offsets is None else offsets.shape[1]
        self._names += 1
        pickled = _fast(entry)
        if offsets is not None and sizes is not None:
            chunk = ChunkStorageMetadata(_unknown(0, dims), _unknown(dims, dims))
            chunks = self._filled(chunk, np.concatenate([offsets, sizes], axis=1))
            empty = _fast("chunks") + b"]"
            assert pickled.count(empty) == 1
            pickled = pickled.replace(empty, empty + b"(" + chunks + b"e")
        self._entries.append(_fast(name) + _PUT + _as_bytes(number, 4) + pickled)
        index = MetadataIndex(_NAME, None if offsets is None else _unknown(3, dims))
        info = _StorageInfo(_FILE, *_unknown(1, 2))
        values = at if offsets is None else np.concatenate([at, offsets], axis=1)
        self._places.append(self._filled((index, info), values, number))

    def _filled(self, pattern: Any, values: np.ndarray, name: int = 0) -> bytes:
        """Return a pattern once for each row of values, `[rows, number of unknowns]`."""
        parts = pattern if isinstance(pattern, tuple) else (pattern,)
        record = b"".join(map(_fast, parts))
        for value, number in self._memo.items():
            record = record.replace(value, _GET + _as_bytes(number, 4))
        record = record.replace(_fast(_NAME), _GET + _as_bytes(name, 4))
        file = record.find(_fast(_FILE))
        record = record.replace(_fast(_FILE), _GET + _as_bytes(0, 4))
        out = np.tile(np.frombuffer(record, np.uint8), (len(values), 1))
        first = 0
        if file >= 0:
            first, numbers = 1, (values[:, 0] + self._files).astype("<u4")
            out[:, file + 1 : file + 5] = numbers[:, None].view(np.uint8)
        for column in range(first, values.shape[1]):
            begin = record.index(_as_bytes(_UNKNOWN + column, 8))
            filled = np.ascontiguousarray(values[:, column, None].astype("<i8"))
            out[:, begin : begin + 8] = filled.view(np.uint8)
        return out.tobytes()

    def finish(self, outline: Metadata) -> bytes:
        """Return the metadata: `outline` with the names and shards added."""
        parts = [*self._begin, _fast(Metadata), b")\x81}("]  # an instance, and a dict of its fields
        many = {"state_dict_metadata": self._entries, "storage_data": self._places}
        for field in dataclasses.fields(Metadata):
            parts.append(_fast(field.name))
            if field.name in many:
                parts += [b"}(", *many[field.name], b"u"]
            else:
                parts.append(_fast(getattr(outline, field.name)))
        return b"".join([*parts, b"ub."])


_PUT, _GET, _POP = b"r", b"j", b"0"
"""Opcodes of `pickle`; the first two are followed by a number of 4 bytes."""
_UNKNOWN = 1 << 62
"""In a pattern, the first of the numbers to fill in: pickled as 8 bytes, as they are."""
_NAME, _FILE = "<name>", "<file>"


def _unknown(first: int, count: int) -> torch.Size:
    return torch.Size(range(_UNKNOWN + first, _UNKNOWN + first + count))


def _as_bytes(number: int, size: int) -> bytes:
    return number.to_bytes(size, "little")


def _fast(value: Any) -> bytes:
    """Return `value` pickled without a memo, to be part of another pickle."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out, protocol=2)
    pickler.fast = True
    pickler.dump(value)
    return out.getvalue()[2:-1]


def _head(item: WriteItem) -> TensorStorageMetadata | BytesStorageMetadata:
    data = item.tensor_data
    if data is None:
        return BytesStorageMetadata()
    return TensorStorageMetadata(data.properties, data.size, [])


def _box(item: WriteItem) -> tuple[torch.Size, torch.Size]:
    data = item.tensor_data
    return (data.chunk.offsets, data.chunk.sizes) if data else (torch.Size(), torch.Size())


def _kind(head: Any) -> Any:
    """Return what ranks that write parts of one item have in common."""
    return (head.size, head.properties.dtype) if isinstance(head, TensorStorageMetadata) else None


def _element_bytes(entry: Any) -> int:
    return entry.properties.dtype.itemsize if isinstance(entry, TensorStorageMetadata) else 1
