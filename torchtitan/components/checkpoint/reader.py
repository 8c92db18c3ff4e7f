"""Read torchtitan checkpoints and Hugging Face safetensors; each rank reads only its slices.

Reading cannot run code from a file: pickles may contain only plain data.
"""

from __future__ import annotations

import dataclasses
import enum
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from functools import partial
from io import BytesIO
from itertools import compress
from pathlib import Path
from typing import IO, Any, cast, get_args

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from torchtitan.config.checkpoint import ExcludablePart
from torchtitan.distributed.dtensor import finding_once
from torchtitan.errors import CheckpointError, DamagedCheckpointError
from torchtitan.tools.foreign_files import is_file, parse_json
from torchtitan.tools.garbage_collection import without_collection
from torchtitan.tools.text import few, first_line

from .manifest import METADATA
from .retry import NO_DAMAGE, parse_again, read_again
from .safetensors_files import SafetensorsFile, weights_files
from .shared_reading import SharedReading
from .storage import CheckpointFiles, RemotePath, StoragePath


class CheckpointReader(dcp.FileSystemReader):
    """Reads the files of a torchtitan checkpoint. Errors name the file.

    Args:
        folder: the `step-N` folder.
        metadata: locations of the tensors, from `read_metadata`.
    """

    path: StoragePath

    def __init__(self, folder: StoragePath, metadata: Metadata) -> None:
        super().__init__(str(folder))
        self.fs = CheckpointFiles()
        self.path = folder
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        items_of_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            items_of_file[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in items_of_file.items():
            items.sort(key=lambda item: self.storage_data[item.storage_index].offset)
            part = dataclasses.replace(plan, items=items)
            parse_again(self.path / name, partial(self.read_file, name, part, planner))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_file(self, name: str, plan: LoadPlan, planner: LoadPlanner) -> None:
        super().read_data(plan, planner)

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        if not isinstance(self.path, RemotePath):
            return super()._slice_file(file, sinfo)
        # `torch.load` seeks several times. In a remote file, each seek is a request that reads
        # ahead more than needed.
        file.seek(sinfo.offset)
        return BytesIO(file.read(sinfo.length))


class SafetensorsReader(CheckpointReader):
    """Reads the files of a Hugging Face folder; `metadata` is from `read_safetensors_metadata`."""

    path: Path

    def read_file(self, name: str, plan: LoadPlan, planner: LoadPlanner) -> None:
        with SafetensorsFile(self.path / name) as file:
            for item in plan.items:
                starts_and_lengths = zip(item.storage_offsets, item.lengths, strict=True)
                part = tuple(slice(start, start + length) for start, length in starts_and_lengths)
                target = planner.resolve_tensor(item).detach()
                file.read_part(item.storage_index.fqn, part, target)
                planner.commit_tensor(item, target)


class ExactLoadPlanner(dcp.DefaultLoadPlanner):
    """Accepts a checkpoint only if it has the keys and shapes of the state to load.

    PyTorch sends the plans of all ranks to rank 0. Here these are empty, since each rank knows by
    itself what to read. Of replicas, one reads a tensor; `share` gives it to the others.

    Args:
        folder: for messages.
        is_wanted: returns whether some rank must read a key of the checkpoint.
        group: the ranks that load, with the same `metadata`; None: a single process.
    """

    def __init__(
        self,
        folder: StoragePath,
        is_wanted: Callable[[str], bool],
        group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        self._folder = folder
        self._is_wanted = is_wanted
        self._group = group
        self._own = LoadPlan([])
        self._shared = SharedReading({})

    @finding_once()
    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None  # set_up_planner() has set it
        check_keys_and_shapes(self._folder, self.metadata, self.state_dict)
        self._own = create_default_local_load_plan(self.state_dict, self.metadata)
        if self._group is not None:
            self._shared = SharedReading(self.state_dict)
        return LoadPlan([])

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        # Either all ranks get here or none, so the all-reduce cannot hang.
        metadata = cast(Metadata, self.metadata)
        own = {item.dest_index.fqn for item in self._own.items}
        keys = list(metadata.state_dict_metadata)
        is_read = torch.tensor([key in own for key in keys], dtype=torch.uint8)
        if self._group is not None:
            dist.all_reduce(is_read, op=dist.ReduceOp.MAX, group=self._group)
        read = set(compress(keys, is_read.tolist()))
        check_no_more(self._folder, metadata, read, self._is_wanted)
        others = self._shared.of_others
        return LoadPlan([item for item in self._own.items if item.dest_index.fqn not in others])

    def share(self) -> None:
        """Give the tensors that were read to the replicas. All ranks of the group call this."""
        self._shared.send()

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        # The base class would run any code in the pickle.
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            key = read_item.storage_index.fqn
            raise ValueError(f"{key} is damaged or more than plain data") from None
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, loaded)


def read_state(
    state: dict[str, Any],
    reader: CheckpointReader,
    is_wanted: Callable[[str], bool],
    group: dist.ProcessGroup | None,
) -> None:
    """Load `state` (nested dicts of tensors, DTensors and plain values) in place.

    All ranks of `group` call this together; with None, this process reads alone.

    Raises:
        CheckpointError: on all ranks: on some rank, a file is damaged or does not fit.
        OutageError, MemoryError, OutOfMemoryError, AcceleratorError: on all ranks: a file cannot be
            read, though it may be good.
    """
    planner = ExactLoadPlanner(reader.path, is_wanted, group)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                state,
                storage_reader=reader,
                planner=planner,
                process_group=group,
                no_dist=group is None,
            )
        planner.share()
    except CheckpointException as failure:
        error = first_failure(failure)
        if isinstance(error, (CheckpointError, *NO_DAMAGE)) or not isinstance(error, Exception):
            raise error from None
        raise CheckpointError(f"{reader.path} cannot be read: {first_line(error)}") from error


def read_whole(folder: StoragePath, metadata: Metadata, keys: Iterable[str]) -> dict[str, Any]:
    """Return the values of some keys, with at most one saved shard of a tensor besides them.

    Raises the errors of `read_state`.
    """
    state: dict[str, Any] = {}
    for key in keys:
        entry: Any = metadata.state_dict_metadata[key]
        is_tensor = isinstance(entry, TensorStorageMetadata)
        state[key] = torch.empty(entry.size, dtype=entry.properties.dtype) if is_tensor else None
    read_state(state, CheckpointReader(folder, metadata), lambda key: False, None)
    return state


def first_failure(failure: CheckpointException) -> BaseException:
    """Return the error of the lowest rank that failed to save or load.

    torch.distributed.checkpoint collects errors from all ranks and raises them on all.
    """
    error, _ = failure.failures[min(failure.failures)]
    return error


def files_of(metadata: Metadata) -> dict[str, str]:
    """Map each key to the file that holds it, or the last of several."""
    return {index.fqn: at.relative_path for index, at in metadata.storage_data.items()}


class MisfitError(CheckpointError):
    """A checkpoint has other keys or shapes than the state to load."""


def check_keys_and_shapes(folder: StoragePath, metadata: Metadata, state: dict[str, Any]) -> None:
    """Raise `MisfitError` if the checkpoint lacks a key of `state` or has other shapes."""
    saved: dict[str, Any] = metadata.state_dict_metadata
    missing = [key for key in state if key not in saved]
    if missing:
        raise MisfitError(f"{folder} lacks {few(missing)}{_way_out(missing)}")
    needed = {key: value.shape for key, value in state.items() if isinstance(value, torch.Tensor)}
    misfits = [
        key
        for key, shape in needed.items()
        if isinstance(saved[key], TensorStorageMetadata) and saved[key].size != shape
    ]
    if misfits:
        files = files_of(metadata)
        found = [
            f"{key} (saved {list(saved[key].size)} in {files[key]}, needed {list(needed[key])})"
            for key in misfits
        ]
        raise MisfitError(f"{folder} has different shapes for {few(found)}{_way_out(misfits)}")


def check_no_more(
    folder: StoragePath, metadata: Metadata, read: Collection[str], is_wanted: Callable[[str], bool]
) -> None:
    """Raise `MisfitError` if a wanted key is not read."""
    keys = metadata.state_dict_metadata
    unread = [key for key in keys if key not in read and is_wanted(key)]
    if unread:
        raise MisfitError(
            f"{folder} has {few(unread)}, which this run does not use{_way_out(unread)}"
        )


@without_collection()
def read_metadata(folder: StoragePath) -> Metadata:
    """Return the locations of the tensors in a torchtitan checkpoint.

    Raises:
        DamagedCheckpointError: the metadata file is missing or damaged.
        OutageError: the metadata file cannot be read.
    """
    path = folder / METADATA
    metadata = parse_again(path, lambda: _PlainDataUnpickler(BytesIO(path.read_bytes())).load())
    if not isinstance(metadata, Metadata):
        raise DamagedCheckpointError(f"{path} is damaged: it holds no checkpoint metadata")
    return metadata


class _PlainDataUnpickler(pickle.Unpickler):
    """Unpickles only the classes that checkpoint metadata consists of."""

    _ALLOWED = frozenset(
        {
            "torch.Size",
            "torch.serialization._get_layout",
            "torch.distributed.checkpoint.filesystem._StorageInfo",
            "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
            "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
            "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
            "torch.distributed.checkpoint.metadata.Metadata",
            "torch.distributed.checkpoint.metadata.MetadataIndex",
            "torch.distributed.checkpoint.metadata.StorageMeta",
            "torch.distributed.checkpoint.metadata.TensorProperties",
            "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
        }
    )

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("builtins", "getattr"):
            return _enum_member
        is_dtype = module_name == "torch" and isinstance(
            getattr(torch, global_name, None), torch.dtype
        )
        if not is_dtype and f"{module_name}.{global_name}" not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def _enum_member(owner: type, name: str) -> Any:
    """Stand in for `getattr`, by which Python 3.11 to 3.11.3 pickle enum members by name."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum)):
        raise pickle.UnpicklingError(f"it refers to an attribute of {owner}")
    return owner[name]


def read_safetensors_metadata(folder: Path) -> Metadata:
    """Return the locations of the tensors in a Hugging Face folder.

    The folder has one file, or an index and its shards.

    Raises:
        CheckpointError: a file is missing or damaged, or the folder has both forms.
    """
    metadata = Metadata(state_dict_metadata={}, storage_data={})
    for name in _safetensors_files(folder):
        with SafetensorsFile(folder / name) as file:
            specs, starts = file.specs, file.starts
        for key, spec in specs.items():
            place = _StorageInfo(name, starts[key], spec.nbytes)
            add_whole_tensor(metadata, key, spec.dtype, torch.Size(spec.shape), place)
    return metadata


def add_whole_tensor(
    metadata: Metadata, key: str, dtype: torch.dtype, size: torch.Size, place: _StorageInfo
) -> None:
    """Add a tensor that is in one piece to `metadata`."""
    start = torch.Size([0] * len(size))
    whole = ChunkStorageMetadata(start, size)
    entry = TensorStorageMetadata(TensorProperties(dtype), size, [whole])
    metadata.state_dict_metadata[key] = entry
    metadata.storage_data[MetadataIndex(key, start)] = place


def _safetensors_files(folder: Path) -> list[str]:
    single, index = weights_files(folder)
    if not is_file(index, CheckpointError):
        return [single.name]
    try:
        files = set(parse_json(read_again(index, index.read_text))["weight_map"].values())
        names = sorted(str(Path(name)) for name in files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {first_line(error)}") from error
    if is_file(single, CheckpointError) and single.name not in names:
        raise CheckpointError(
            f"{folder} holds two models: {single.name}, which Hugging Face would load, and the "
            f"files that {index.name} names. Delete the one that you do not need"
        )
    return names


def _way_out(keys: list[str]) -> str:
    part = keys[0].partition(".")[0]
    if part not in get_args(ExcludablePart):
        return ""
    cause = ""
    if part == "optimizer":
        cause = " (has the optimizer changed, or which parameters are frozen? Does its first step "
        cause += "create all of its state?)"
    return f'{cause}; checkpoint.exclude_from_loading = ["{part}"] would reset it'
