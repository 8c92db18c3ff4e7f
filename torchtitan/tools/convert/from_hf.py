"""A Hugging Face folder becomes a checkpoint of ours, tensor by tensor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from torchtitan.components.checkpoint.agreement import first_failure
from torchtitan.components.checkpoint.folder import Manifest
from torchtitan.components.checkpoint.load import (
    first_names,
    model_args,
    model_state,
    tied_names,
    wanted_keys,
)
from torchtitan.components.checkpoint.reader import (
    check_keys_and_shapes,
    check_no_more,
    read_safetensors_metadata,
)
from torchtitan.components.checkpoint.safetensors_files import SafetensorsFile
from torchtitan.components.checkpoint.writer import cause_of_failed_write
from torchtitan.errors import begin_errors_with

from .output import new_folder, with_progress
from .which_model import KnownModel

FILE = "__0_0.distcp"


def convert_from_hf(
    folder: Path, out: Path, known: KnownModel, dtype: torch.dtype | None
) -> Manifest:
    """Write the weights in `folder` as the model-only checkpoint `out`, of step 0.

    What the files have no place for belongs to training, such as a router's load; it begins at 0.

    Args:
        dtype: of floating-point tensors; None: as in the files.

    Raises:
        CheckpointError: a file is missing or damaged, keys or shapes do not fit the model, `out`
            exists or cannot be written.
    """
    adapter = known.adapter(folder)
    metadata = read_safetensors_metadata(folder)
    entries = metadata.state_dict_metadata
    with begin_errors_with(str(folder)):
        adapter.check_names(entries)
    model = known.build()
    state, tied = model_state([model]), tied_names([model])
    hf_state = adapter.to_hf({name: t for name, t in state.items() if name not in tied})
    wanted = wanted_keys(adapter, metadata, tied)
    check_keys_and_shapes(folder, metadata, hf_state)
    check_no_more(folder, metadata, hf_state, wanted.__contains__)
    first_name = first_names(model)

    sources = {}
    for name, tensor in state.items():
        sources[name] = list(adapter.to_hf({first_name.get(name, name): tensor}))

    def dtype_of(name: str) -> torch.dtype:
        own = entries[sources[name][0]].properties.dtype if sources[name] else state[name].dtype
        return dtype if dtype is not None and own.is_floating_point else own

    file_of = {index.fqn: at.relative_path for index, at in metadata.storage_data.items()}
    files: dict[str, SafetensorsFile] = {}

    def read(name: str) -> torch.Tensor:
        if not sources[name]:
            return torch.zeros(state[name].shape, dtype=dtype_of(name))
        parts = {}
        for key in sources[name]:
            path = file_of[key]
            if path not in files:
                files[path] = SafetensorsFile(folder / path)
            parts[key] = files[path].read(key)
        converted = adapter.from_hf(parts)[first_name.get(name, name)]
        return converted.to(dtype_of(name)).contiguous()

    planned = {
        name: torch.empty(tensor.shape, dtype=dtype_of(name), device="meta")
        for name, tensor in state.items()
    }
    manifest = Manifest(
        step=0,
        model_only=True,
        model={
            "name": known.name,
            "flavor": known.flavor,
            "args": model_args(model),
            "tokenizer": str(folder.absolute()),
        },
    )
    try:
        with new_folder(out) as partial:
            _save(planned, read, partial, manifest)
    finally:
        for file in files.values():
            file.close()
    return manifest


def _save(
    planned: dict[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    folder: Path,
    manifest: Manifest,
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(
                {"model": planned},
                storage_writer=_Writer(folder, manifest),
                planner=_ReadingPlanner(read),
                no_dist=True,
            )
        except CheckpointException as failure:
            raise first_failure(failure) from failure


class _ReadingPlanner(dcp.DefaultSavePlanner):
    """Gets each tensor when it is to be written. The state's own are on the meta device."""

    def __init__(self, read: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._read(write_item.index.fqn.removeprefix("model."))


class _Writer(FileSystemWriter):
    """Writes one file, and keeps no tensor that it has written.

    PyTorch's own writers keep all tensors of a file until it is done.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder)
        self._manifest = manifest

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with open(self.path / FILE, "wb") as file:
            for item in with_progress(plan.items, len(plan.items), "converting"):
                tensor = planner.resolve_data(item)
                start = file.tell()
                try:
                    torch.save(tensor, file)
                except Exception as error:
                    raise cause_of_failed_write(error) from None
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(FILE, start, length)))
                del tensor
            file.flush()
            os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # without the folder, which is renamed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self._manifest.write(self.path)
