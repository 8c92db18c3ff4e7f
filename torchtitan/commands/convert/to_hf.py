"""Converts a checkpoint of ours to a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchtitan.components.checkpoint.converted import by_layer
from torchtitan.components.checkpoint.huggingface import (
    ExportAssets,
    export_config,
    name_of_weights,
    write_assets,
)
from torchtitan.components.checkpoint.model_identity import warn_of_other_tokenizer
from torchtitan.components.checkpoint.model_tensors import (
    buffer_names,
    dtype_of_copy,
    model_state,
    tied_embeddings,
)
from torchtitan.components.checkpoint.opened import OpenCheckpoint
from torchtitan.components.checkpoint.reader import (
    check_keys_and_shapes,
    check_no_more,
    read_whole,
)
from torchtitan.components.checkpoint.safetensors_files import (
    SafetensorsWriter,
    TensorSpec,
    plan_files,
    write_index,
)
from torchtitan.components.checkpoint.saved_tensors import SavedTensor
from torchtitan.components.checkpoint.tokenizer_files import chat_template_of
from torchtitan.components.run_folder import CONFIG_FILE
from torchtitan.components.tokenizer import open_tokenizer
from torchtitan.config import load_config
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import DataError
from torchtitan.models.plugins import load_plugins
from torchtitan.models.which_model import KnownModel
from torchtitan.preflight.model_fit import require_vocabulary
from torchtitan.protocols.model_converter import convert_to_load
from torchtitan.tools.foreign_files import is_file

from .output import new_folder, with_progress
from .parts import copy_elements, source_of

PREFIX = "model."


def convert_to_hf(
    folder: Path,
    out: Path,
    known: KnownModel,
    dtype: torch.dtype | None,
    tokenizer: str | None = None,
) -> int:
    """Write the model in the checkpoint `folder` into the Hugging Face folder `out`.

    Args:
        dtype: of floating-point tensors, with the exceptions of `dtype_of_copy`; None: as saved.
        tokenizer: `bytes` or a folder; None: the run's tokenizer, if the model uses one.

    Returns:
        Bytes of all tensors.
    """
    checkpoint = OpenCheckpoint.open(folder, None)
    metadata = checkpoint.metadata
    adapter = known.adapter(folder)
    export_config(known.args)
    model = known.build()
    if checkpoint.config.get("model", {}).get("converters"):
        config = load_config(["--job.config_file", str(folder / CONFIG_FILE)])
        load_plugins(config.job.custom_import)
        convert_to_load(model, config, ParallelDims(world_size=1))
    state, tied = model_state([model]), tied_embeddings([model])
    saved = {PREFIX + name: tensor for name, tensor in state.items()}
    check_keys_and_shapes(folder, metadata, saved)
    check_no_more(folder, metadata, saved, lambda key: key.startswith(PREFIX))

    layers = _as_saved({name: t for name, t in state.items() if name not in tied}, metadata)
    specs, buffers = {}, buffer_names([model])
    for layer in layers:
        exact = adapter.to_hf({name: t for name, t in layer.items() if name in buffers})
        for key, part in adapter.to_hf(layer).items():
            target = dtype_of_copy(part.dtype, dtype, key in exact)
            specs[key] = TensorSpec(target, tuple(part.shape))
    files = plan_files(specs, name=name_of_weights(known.args))
    file_of = {key: file for file, of_file in files.items() for key in of_file}
    assets = _assets(checkpoint, known, tokenizer)
    with new_folder(out) as partial:
        writers = {file: SafetensorsWriter(partial / file, files[file]) for file in files}
        for layer in with_progress(layers, len(layers)):
            changed = []
            for key, part in adapter.to_hf(layer).items():
                name, writer = source_of(part, layer), writers[file_of[key]]
                saved_tensor = name and SavedTensor.find(folder, metadata, PREFIX + name)
                if saved_tensor:
                    first, place = part.storage_offset(), writer.place_of(key)
                    copy_elements(saved_tensor, first, part.numel(), *place, specs[key].dtype)
                else:
                    changed.append(key)
            if changed:
                whole = read_whole(folder, metadata, [PREFIX + name for name in layer])
                converted = adapter.to_hf(dict(zip(layer, whole.values(), strict=True)))
                for key in changed:
                    writers[file_of[key]].write(key, converted[key].to(specs[key].dtype))
                del whole, converted
        for writer in writers.values():
            writer.close()
        write_index(partial, files)
        floating = [spec.dtype for spec in specs.values() if spec.dtype.is_floating_point]
        write_assets(partial, known.args, dtype or floating[0], assets)
    return sum(spec.nbytes for spec in specs.values())


def _as_saved(state: dict[str, torch.Tensor], metadata: Any) -> list[dict[str, torch.Tensor]]:
    """Return meta tensors in the dtypes of the checkpoint, by layer.

    An adapter gets a whole layer, as in a run's export: it may merge tensors, such as LoRA's.
    """
    entries = metadata.state_dict_metadata
    saved = {
        name: torch.empty(t.shape, dtype=entries[PREFIX + name].properties.dtype, device="meta")
        for name, t in state.items()
    }
    return list(by_layer(saved).values())


def _assets(checkpoint: OpenCheckpoint, known: KnownModel, tokenizer: str | None) -> ExportAssets:
    """Return the other inputs of the folder. Args: tokenizer: as in `convert_to_hf`."""
    described = checkpoint.manifest.model
    told = tokenizer is not None
    reads_texts = told or known.spec.build_tokenizer_fn is not None
    tokenizer = described.get("tokenizer", "") if tokenizer is None else tokenizer
    like = () if tokenizer in ("", "bytes") else (Path(tokenizer).expanduser(),)
    if told or any(is_file(folder / "tokenizer.json", DataError) for folder in like):
        opened = open_tokenizer(tokenizer)
        require_vocabulary(opened, known.args, str(known))
        warn_of_other_tokenizer(checkpoint.folder, described, opened)
    own = described.get("own_tokenizer", {}) if not tokenizer else {}
    assets = ExportAssets(
        tokenizer if reads_texts else "",
        described.get("seq_len", 0),
        like,
        bos_id=own.get("bos_id"),
        eos_id=own.get("eos_id"),
    )
    data = checkpoint.config.get("data")
    if data is None:  # not from a run, so no more is known
        return assets
    file = data.get("chat_template")
    # A loader of one's own may not tell. With a template, it is assumed to have had conversations.
    conversations = checkpoint.manifest.data.get("has_conversations", bool(file))
    return replace(
        assets,
        chat_template=chat_template_of(file, tokenizer) if conversations else "",
        conversations=conversations,
        add_bos=bool(data.get("add_bos", False)),
    )
