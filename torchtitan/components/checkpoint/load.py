"""Load model weights from a torchtitan checkpoint or a Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from torchtitan.distributed.names import canonical_name
from torchtitan.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpointError,
    begin_errors_with,
)
from torchtitan.protocols.train_spec import MODEL_REGISTRY, model_flavors
from torchtitan.runtime.collective_calls import on_all_ranks, on_rank_zero
from torchtitan.tools.logging import rank0
from torchtitan.tools.text import few

from .converted import by_layer, convert_sharded, require_converted, wanted_keys
from .folder import list_checkpoints
from .manifest import MANIFEST, Manifest, nested_differences, plain_args
from .reader import (
    CheckpointReader,
    SafetensorsReader,
    read_metadata,
    read_safetensors_metadata,
    read_state,
)
from .retry import parse_again
from .safetensors_files import (
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    is_hf_weights,
)
from .shard_table import ShardTable
from .storage import StoragePath, storage_path
from .tied import check_copies, tied_names

if TYPE_CHECKING:
    from torchtitan.protocols import BaseStateDictAdapter, ModelProtocol


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
        from torchtitan.distributed.init import initialize_weights

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
        exclude: pattern of parameter names that are not loaded.
    """

    def is_unneeded(name: str) -> bool:
        return bool(exclude and re.search(exclude, name))

    if on_rank_zero(lambda: is_huggingface(path), group):
        _load_huggingface(model_parts, cast(Path, path), group, is_unneeded)
    else:
        checkpoint = OpenCheckpoint.open(path, group, verify)
        saved = checkpoint.metadata.state_dict_metadata
        state = {
            name: tensor
            for name, tensor in model_state(model_parts).items()
            if (f"model.{name}" in saved or not name.endswith(_BALANCE)) and not is_unneeded(name)
        }
        checkpoint.read_into(
            {"model": state},
            model_parts[0],
            group,
            lambda name: name.endswith(_BALANCE_ALONE) or is_unneeded(name),
        )
        from .huggingface import TRAINING_ONLY

        if others := checkpoint.differences_from(model_parts[0], TRAINING_ONLY):
            rank0.warning("%s was saved from another model: %s", path, few(others))


def model_state(model_parts: list[nn.Module]) -> dict[str, Any]:
    """Map canonical names to parameters and persistent buffers (the tensors, not copies)."""
    return {k: v for part in model_parts for k, v in get_model_state_dict(part).items()}


@dataclass
class OpenCheckpoint:
    """A complete torchtitan checkpoint, all of whose files exist."""

    folder: StoragePath
    manifest: Manifest
    config: dict[str, Any]
    """Configuration of the run that saved it; empty: unknown."""
    metadata: Metadata
    """Without the places of shards, if `shards` has them."""
    shards: ShardTable | None = None

    @classmethod
    def open(
        cls, folder: StoragePath, group: dist.ProcessGroup | None, verify: bool = True
    ) -> OpenCheckpoint:
        """Open a checkpoint. All ranks of `group` call this; None: this process opens it alone.

        Args:
            verify: read all files and check their checksums, with the files divided among the
                ranks. Sizes are always checked.

        Raises:
            DamagedCheckpointError: on all ranks: a file is missing or has changed.
            OutageError: on all ranks: a file cannot be read.
        """
        manifest = on_rank_zero(lambda: Manifest.read_whole(folder), group)
        if verify:
            on_all_ranks(
                lambda rank, ranks: manifest.check_contents(folder, _share(manifest, rank, ranks)),
                group,
            )
        config = on_rank_zero(lambda: manifest.read_config(folder), group)

        def read() -> Metadata:
            metadata = read_metadata(folder)
            for info in metadata.storage_data.values():
                if info.relative_path not in manifest.files:
                    raise DamagedCheckpointError(
                        f"{folder / '.metadata'} is damaged: it names {info.relative_path!r}, "
                        f"which {MANIFEST} does not"
                    )
            return metadata

        if group is None:
            return cls(folder, manifest, config, read())

        def make() -> ShardTable:
            return parse_again(folder / ".metadata", lambda: ShardTable.of(read()))

        shards = ShardTable.share(make, group)
        return cls(folder, manifest, config, shards.outline, shards)

    def read_into(
        self,
        state: dict[str, Any],
        model: nn.Module,
        group: dist.ProcessGroup | None,
        is_unneeded: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Load the parts of `state` ("model", "optimizer", ...) in place; skip other parts.

        Args:
            is_unneeded: name within a part -> whether `state` may lack it.

        Raises:
            CheckpointError: a file is damaged, or keys or shapes do not fit. The message lists the
                hyperparameters in which `model` differs from the saved one.
            OutageError: a file cannot be read.
        """
        parts = set(state)
        metadata = self.shards.metadata_for(state) if self.shards else self.metadata
        reader = CheckpointReader(self.folder, metadata)

        def is_wanted(key: str) -> bool:
            part, _, name = key.partition(".")
            return part in parts and not is_unneeded(name)

        try:
            read_state(state, reader, is_wanted, group)
        except DamagedCheckpointError:
            raise
        except CheckpointError as error:
            others = self.differences_from(model)
            note = f". It was saved from another model: {few(others)}" if others else ""
            raise type(error)(f"{error}{note}") from error

    def differences_from(self, model: nn.Module, ignored: Collection[str] = ()) -> list[str]:
        """Return the hyperparameters in which `model`, if it has `args`, differs from the saved."""
        saved = self.manifest.model.get("args", {})
        current = plain_args(getattr(model, "args", None))
        if not (saved and current):
            return []
        found = nested_differences(saved, current, ignored)
        return [f"{name} = {a} (now {b})" for name, a, b in found]


def _share(manifest: Manifest, rank: int, ranks: int) -> list[str]:
    """Return the files that a rank checks, dealt out to the ranks by decreasing size."""
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    return by_size[rank::ranks]


def is_huggingface(path: StoragePath) -> bool:
    """Return True for a Hugging Face folder, False for a torchtitan checkpoint.

    Raises:
        CheckpointError: the folder is neither.
    """
    if (path / MANIFEST).is_file():
        return False
    if is_hf_weights(path):
        return True
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    steps = list_checkpoints(path)
    hint = f". Did you mean {steps[-1]}?" if steps else ""
    raise CheckpointError(
        f"{path} is not a checkpoint: it has neither {MANIFEST} (complete torchtitan checkpoint; "
        f"for upstream's see docs/migrating.md) nor {SAFETENSORS_FILE} or {SAFETENSORS_INDEX} "
        f"(Hugging Face){hint}"
    )


def _load_huggingface(
    model_parts: list[nn.Module],
    path: Path,
    group: dist.ProcessGroup | None,
    is_unneeded: Callable[[str], bool],
) -> None:
    from .huggingface import check_same_model

    names = adapter_of(model_parts[0], path)
    if (args := getattr(model_parts[0], "args", None)) is not None:
        on_rank_zero(lambda: check_same_model(path, args), group)
    metadata = on_rank_zero(lambda: read_safetensors_metadata(path), group)
    with begin_errors_with(str(path)):
        names.check_names(metadata.state_dict_metadata)
    on_rank_zero(lambda: check_copies(path, metadata, names, model_parts), group)
    tied = tied_names(model_parts)

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


def adapter_of(model: nn.Module, path: Path) -> BaseStateDictAdapter:
    """Return the adapter in the `TrainSpec` of the model's class, for the folder `path`.

    If there are several, prefer the most derived class, then the model's own type of args, then the
    one registered last, since users register after us.

    Raises:
        CheckpointError: there is no adapter.
    """
    model = cast(nn.Module, getattr(model, "_orig_mod", model))  # within torch.compile's wrapper
    found: list[tuple[int, bool, int, type[BaseStateDictAdapter]]] = []
    failed: list[str] = []  # factories that are wrong, such as that of a plugin of no concern here
    for order, (name, factory) in enumerate(MODEL_REGISTRY.items()):
        try:
            spec = factory(next(iter(model_flavors(name)), ""))
        except (KeyError, ConfigError):  # a factory whose flavors are unknown
            continue
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if isinstance(model, spec.model_cls) and spec.state_dict_adapter is not None:
            same_args = isinstance(cast(Any, model.args), type(spec.model_args))
            depth = len(spec.model_cls.__mro__)
            found.append((depth, same_args, order, spec.state_dict_adapter))
    if found:
        *_, adapter = max(found, key=lambda entry: entry[:3])
        return adapter(cast(Any, model.args), hf_assets_path=path)
    raise CheckpointError(
        f"{path} holds Hugging Face weights, but no registered TrainSpec of "
        f"{type(model).__name__} has a state_dict_adapter to read them"
        + "".join(f". And get_train_spec of {problem}" for problem in failed)
    )


def buffer_names(model_parts: list[nn.Module]) -> set[str]:
    """Return the names of buffers, such as a router's bias; see `dtype_of_copy`."""
    return {canonical_name(name) for part in model_parts for name, _ in part.named_buffers()}


def dtype_of_copy(own: torch.dtype, dtype: torch.dtype | None, is_buffer: bool) -> torch.dtype:
    """Return the dtype to save a tensor in if weights are saved in `dtype`; None: unchanged.

    Buffers are not rounded: the bias of DeepSeek-V3's router changes by 0.001 per step, which
    bfloat16 does not resolve, and `transformers` keeps it in float32.
    """
    if dtype is None or not own.is_floating_point:
        return own
    return torch.promote_types(own, dtype) if is_buffer else dtype
