"""Load model weights from a torchtitan checkpoint or a Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor

from torchtitan.distributed.init import initialize_weights
from torchtitan.errors import ConfigError, begin_errors_with
from torchtitan.runtime.collective_calls import on_rank_zero
from torchtitan.tools.logging import rank0
from torchtitan.tools.text import few

from .converted import (
    adapter_of,
    by_layer,
    check_copies,
    convert_sharded,
    require_converted,
    wanted_keys,
)
from .huggingface import TRAINING_ONLY, check_same_model
from .manifest import MANIFEST, is_hf_weights, no_checkpoint
from .model_tensors import all_first_names, buffer_names, model_state
from .opened import OpenCheckpoint
from .reader import SafetensorsReader, read_safetensors_metadata, read_state
from .storage import StoragePath, sizes_in, storage_path

if TYPE_CHECKING:
    from torchtitan.protocols import ModelProtocol


_BALANCE = (".router.load", ".router.selection_bias")
"""Suffixes of the names of buffers that balance experts; they start as zeros."""
_BALANCE_ALONE = (".router.load",)
"""Those of them that the logits do not depend on."""


def load_model_weights(model: ModelProtocol, path: str | Path) -> None:
    """Load the weights in the folder `path` into a model, in place.

    The folder is a torchtitan `step-N`, by path or URL, or holds `model.safetensors` or
    `model.safetensors.index.json`. A model on the meta device is first allocated on the CPU. A
    sharded model reads only its shards, and all ranks call this together. In others, `init_weights`
    sets the buffers that no checkpoint holds.

    Raises:
        CheckpointError: a file is missing or damaged, or keys or shapes do not fit the model.
        OutageError: a file cannot be read.
        ConfigError: the model is sharded, and some ranks have not called this.
    """
    if any(param.is_meta for param in model.parameters()):
        initialize_weights(model, seed=0, device=torch.device("cpu"))
    sharded = any(isinstance(param, DTensor) for param in model.parameters())
    if sharded:
        _wait_for_all_ranks()
    elif dict(model.named_buffers()).keys() - model.state_dict().keys():
        _init_weights_once(model)
    load_weights_of_parts([model], storage_path(path), dist.group.WORLD if sharded else None)


def _init_weights_once(model: ModelProtocol) -> None:
    """Call `init_weights`, unless it is what calls this."""
    if "init_weights" in vars(model):
        return
    init_weights, vars(model)["init_weights"] = model.init_weights, lambda: None
    try:
        with torch.no_grad():
            init_weights()
    finally:
        del vars(model)["init_weights"]


def _wait_for_all_ranks() -> None:
    """Raise `ConfigError` if some ranks do not come before the timeout of their collectives.

    Such ranks would take part in ours by collectives of another kind.
    """
    store = dist.PrefixStore("torchtitan/load_checkpoint", distributed_c10d._get_default_store())
    ranks, patience = dist.get_world_size(), distributed_c10d.default_pg_timeout * 0.8
    before, called = divmod(store.add("calls", 1) - 1, ranks)
    if called + 1 == ranks:
        store.set(f"complete {before}", "")
    try:
        store.wait([f"complete {before}"], patience)
    except dist.DistStoreError:
        called = store.add("calls", 0) - before * ranks
        raise ConfigError(
            f"load_checkpoint: the model is sharded, so all {ranks} ranks must call it together, "
            f"but only {called} did within {patience.total_seconds():g} s. It cannot read a "
            "sharded model that only some stages of a pipeline have"
        ) from None


def load_weights_of_parts(
    model_parts: list[nn.Module],
    path: StoragePath,
    group: dist.ProcessGroup | None,
    verify: bool = True,
    exclude: str = "",
) -> None:
    """Load weights into the parts of one model that each rank of `group` has.

    See `load_model_weights`. Buffers that balance experts keep their initial values if they were
    not saved, since the experts were then balanced in another way.

    Args:
        verify: read and check whole files first, see `OpenCheckpoint.open`.
        exclude: pattern of names of parameters that are not loaded, of a tied one the first.
    """
    first = all_first_names(model_parts)

    def is_unneeded(name: str) -> bool:
        return bool(exclude and re.search(exclude, first.get(name, name)))

    if on_rank_zero(lambda: is_huggingface(path), group):
        _load_huggingface(model_parts, cast(Path, path), group, is_unneeded)
    else:
        checkpoint = OpenCheckpoint.open(path, group, verify)
        saved = checkpoint.metadata.state_dict_metadata
        state = {
            # A model without the module of a second name, such as `mtp_embeddings`, has the first.
            name if f"model.{name}" in saved else first.get(name, name): tensor
            for name, tensor in model_state(model_parts).items()
            if (f"model.{name}" in saved or not name.endswith(_BALANCE)) and not is_unneeded(name)
        }
        blocks = tuple(f"{name}." for name in getattr(model_parts[0], "training_blocks", ()))

        def may_lack(name: str) -> bool:
            unused = name.endswith(_BALANCE_ALONE) or name.startswith(blocks)
            return unused or is_unneeded(name)

        checkpoint.read_into({"model": state}, model_parts[0], group, may_lack)
        if others := checkpoint.differences_from(model_parts[0], TRAINING_ONLY):
            rank0.warning("%s was saved from another model: %s", path, few(others))


def is_huggingface(path: StoragePath) -> bool:
    """Return True for a Hugging Face folder, False for a torchtitan checkpoint.

    Raises:
        CheckpointError: the folder is neither.
        OutageError: it cannot be read now.
    """
    if MANIFEST in sizes_in(path):
        return False
    if is_hf_weights(path):
        return True
    raise no_checkpoint(path)


def _load_huggingface(
    model_parts: list[nn.Module],
    path: Path,
    group: dist.ProcessGroup | None,
    is_unneeded: Callable[[str], bool],
) -> None:
    names = adapter_of(model_parts[0], path)
    if (args := getattr(model_parts[0], "args", None)) is not None:
        on_rank_zero(lambda: check_same_model(path, args), group)
    metadata = on_rank_zero(lambda: read_safetensors_metadata(path), group)
    with begin_errors_with(str(path)):
        names.check_names(metadata.state_dict_metadata)
    on_rank_zero(lambda: check_copies(path, metadata, names, model_parts), group)
    tied = all_first_names(model_parts)

    def is_left_out(name: str) -> bool:
        return name in tied or is_unneeded(name)

    state = {name: t for name, t in model_state(model_parts).items() if not is_left_out(name)}
    # One layer after another, since tensors that were split, such as experts, are joined in new
    # memory. Adapters may keep what they convert, so each layer has its own adapter.
    layers = []
    for part in by_layer(state).values():
        adapter = adapter_of(model_parts[0], path)
        layers.append((part, adapter, convert_sharded(adapter.to_hf, part)))

    wanted = wanted_keys(names, metadata, is_left_out)
    hf_state = {key: tensor for *_, hf_part in layers for key, tensor in hf_part.items()}
    read_state(hf_state, SafetensorsReader(path, metadata), wanted.__contains__, group)
    del hf_state
    buffers = buffer_names(model_parts)
    while layers:
        part, adapter, hf_part = layers.pop()
        converted = convert_sharded(adapter.from_hf, hf_part)
        for name, tensor in part.items():
            require_converted(name, tensor, converted, buffers)
            if name in converted:
                tensor.copy_(converted[name])
        del converted, hf_part
