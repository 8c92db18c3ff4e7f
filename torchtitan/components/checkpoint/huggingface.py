"""Write and check a Hugging Face folder's `config.json`, and write its other small files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchtitan.components.tokenizer import Tokenizer, path_of
from torchtitan.config.load import fail, origin
from torchtitan.data.chat import read_fields
from torchtitan.errors import CheckpointError, begin_errors_with
from torchtitan.protocols.changed_args import plain_args
from torchtitan.tools.differences import nested_differences, told
from torchtitan.tools.foreign_files import is_file, read_json
from torchtitan.tools.logging import logger, rank0
from torchtitan.tools.text import few

from .folder import final_folder
from .manifest import is_hf_weights
from .storage import StoragePath, storage_path
from .tokenizer_files import chat_template_of, end_of_turn, write_tokenizer

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.protocols import BaseModelArgs, TrainSpec

TRAINING_ONLY = frozenset(
    {
        "attention",
        "aux_loss_per_sequence",
        "aux_loss_weight",
        "bias_update_rate",
        "long_rotations",
        "mtp_loss_weight",
        "path",
        "text_len",
        "use_bias",
        "z_loss_weight",
    }
)
"""Args that have no counterpart in `config.json`."""
_IGNORED = TRAINING_ONLY | {"mtp_depth", "mtp_layers"}  # layers that Hugging Face leaves out
_ROTARY = ("rope_", "yarn", "window_rope_theta", "temperature_")
_LONGEST = "max_position_embeddings"
_OUTDATED = ("dtype", "transformers_version", "quantization_config", "_name_or_path")


@dataclasses.dataclass(frozen=True)
class ExportAssets:
    """Sources of the files of a Hugging Face folder other than weights."""

    tokenizer: str
    """`bytes` or a folder; "": none that Hugging Face can read."""
    max_seq_len: int
    """Longest sequence trained on; 0: unknown."""
    like: tuple[Path, ...] = ()
    """Folders whose `config.json` and `generation_config.json` are kept if they fit the model."""
    chat_template: str = ""
    """Text of `chat_template.jinja`, replacing the tokenizer's; "": keep the tokenizer's."""
    conversations: bool = False
    """Whether the model trained on conversations, so that the end of a turn ends a text."""
    add_bos: bool | None = None
    """Whether the training documents began with BOS; None: unknown."""
    bos_id: int | None = None
    """Id of a custom tokenizer without files, like `eos_id`."""
    eos_id: int | None = None

    @classmethod
    def of_job(cls, job_config: JobConfig, tokenizer: Tokenizer | None) -> ExportAssets:
        """Return the assets of a run with this config, whose model uses `tokenizer`."""
        path, max_seq_len = path_of(tokenizer), job_config.training.seq_len
        folders = [initial_load_path(job_config)]
        if path not in ("", "bytes"):
            folders.append(Path(path).expanduser())
        like = tuple(folder for folder in folders if isinstance(folder, Path))
        if tokenizer is None:
            return cls("", max_seq_len, like)
        if not path:
            return cls("", max_seq_len, like, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
        data = job_config.data
        template = chat_template_of(data.chat_template, path)
        return cls(path, max_seq_len, like, template, add_bos=data.add_bos)

    def after_training_on(self, dataloader: Any) -> ExportAssets:
        """Return a copy that has a chat template only if the loader has had conversations."""
        if getattr(dataloader, "has_conversations", False):
            return dataclasses.replace(self, conversations=True)
        return dataclasses.replace(self, chat_template="")


def initial_load_path(job_config: JobConfig) -> StoragePath | None:
    """Return the folder with the initial weights of a new run, if any."""
    checkpoint = job_config.checkpoint
    if checkpoint.initial_load_path:
        return storage_path(checkpoint.initial_load_path)
    if checkpoint.initial_load_in_hf:
        return Path(job_config.model.tokenizer_path).expanduser()
    return None


def check_exchange(job_config: JobConfig, spec: TrainSpec, args: BaseModelArgs) -> None:
    """Check before weights are allocated that a run can load and save Hugging Face weights.

    Raises:
        ConfigError: the model has no adapter.
        CheckpointError: the initial folder is of another model, or Hugging Face's format cannot
            express this one.
    """
    checkpoint = job_config.checkpoint
    for key in ("initial_load_in_hf", "last_save_in_hf"):
        if getattr(checkpoint, key) and spec.state_dict_adapter is None:
            fail(
                job_config,
                f"checkpoint.{key}",
                f"{job_config.model.name} has no state_dict_adapter in its TrainSpec",
            )
    path = initial_load_path(job_config)
    if path is not None and is_hf_weights(path):
        check_same_model(path, args)
    if checkpoint.last_save_in_hf:
        with begin_errors_with(origin(job_config, "checkpoint.last_save_in_hf")):
            export_config(args)


def check_same_model(folder: Path, args: BaseModelArgs) -> None:
    """Refuse a folder whose `config.json` describes another model than `args`.

    Different rotary positions only cause a warning: the run may be meant to extend the context. The
    vocabulary is left to the shapes, so that `checkpoint.initial_load_exclude` can replace it.

    Raises:
        CheckpointError: the folder is of another model, or has unknown fields.
    """
    saved = _read_args(folder, args)
    if saved is None:
        return
    found = list(differences(saved, args, _IGNORED | {"vocab_size"}))
    rotary = [text for name, text in found if name.startswith(_ROTARY)]
    others = [text for name, text in found if not name.startswith(_ROTARY)]
    if others:
        raise CheckpointError(f"{folder / 'config.json'} is of another model: {few(others)}")
    if rotary:
        rank0.warning("%s has other rotary positions: %s", folder / "config.json", few(rotary))


def export_config(args: BaseModelArgs) -> dict[str, Any] | None:
    """Return `args.to_hf_config()`, after checking that it expresses all of `args`.

    Raises:
        CheckpointError: Hugging Face's implementation lacks a feature of the model.
    """
    config = args.to_hf_config()
    if config is None or not hasattr(args, "from_hf_config"):
        return config
    back = type(args).from_hf_config(config)
    # A lost bias changes the choice of experts.
    lost = [text for _, text in differences(back, args, _IGNORED - {"use_bias"})]
    if lost:
        cls = config["_class_name"] if is_of_diffusers(config) else config["architectures"][0]
        raise CheckpointError(
            f"Hugging Face's {cls} cannot represent this model: it would have {few(lost)}"
        )
    return config


def is_of_diffusers(config: dict[str, Any] | None) -> bool:
    """Return whether `config.json` is of the library diffusers, not of transformers."""
    return "_class_name" in (config or {})


def name_of_weights(args: BaseModelArgs) -> str:
    """Return the beginning of the names of the files that hold weights."""
    return "diffusion_pytorch_model" if is_of_diffusers(args.to_hf_config()) else "model"


def write_assets(
    folder: Path, args: BaseModelArgs, dtype: torch.dtype, assets: ExportAssets
) -> None:
    """Write `config.json`, `generation_config.json` (if known) and the tokenizer's files.

    Raises:
        CheckpointError: see `export_config`.
    """
    tokenizer = write_tokenizer(folder, assets.tokenizer, assets.add_bos)
    if assets.chat_template:
        (folder / "chat_template.jinja").write_text(assets.chat_template, encoding="utf-8")
    if assets.eos_id is not None:
        path = final_folder(folder)
        logger.warning("%s is saved without a tokenizer: the run's is a custom one", path)
    ids = assets if tokenizer is None else tokenizer
    ends = [] if ids.eos_id is None else [ids.eos_id]
    turn = end_of_turn(folder) if assets.conversations else None
    if turn is not None and turn not in ends:
        ends.append(turn)
    config = _config(args, ids.bos_id, ends, assets)
    if config is None:
        name = type(args).__name__
        logger.warning("%s: no config.json, as %s has no to_hf_config", final_folder(folder), name)
    else:
        for name in _OUTDATED:
            config.pop(name, None)
        if not is_of_diffusers(config):  # both transformers 4 and 5 read this name
            config["torch_dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for other in assets.like:
        path = other / "generation_config.json"
        if is_file(path, CheckpointError):
            shutil.copyfile(path, folder / path.name)
            fields = read_fields(path)
            if _add_ends(fields, ends):
                (folder / path.name).write_text(json.dumps(fields, indent=2) + "\n")
            break


def _add_ends(fields: dict[str, Any], ends: list[int]) -> bool:
    """Add the tokens that ended texts in training to kept fields; return whether any were added.

    Fields without any end token stay so. Tokens already there stay too, since the weights may still
    end a text with one.
    """
    told = fields.get("eos_token_id")
    known = told if isinstance(told, list) else [told]
    new = [token for token in ends if token not in known]
    if told is None or not new:
        return False
    fields["eos_token_id"] = [*new, *known]
    return True


def _config(
    args: BaseModelArgs, bos_id: int | None, ends: list[int], assets: ExportAssets
) -> dict[str, Any] | None:
    ours = export_config(args)
    for folder in assets.like:
        path = folder / "config.json"
        try:
            saved = _read_args(folder, args)
        except CheckpointError:
            continue  # of another model
        same = saved is not None and not any(differences(saved, args, _IGNORED))
        if same or (ours is None and is_file(path, CheckpointError)):
            kept = read_json(path, CheckpointError)
            if "num_nextn_predict_layers" in kept:
                kept["num_nextn_predict_layers"] = getattr(args, "mtp_depth", 0)
            if isinstance(kept.get(_LONGEST), int):  # the run may have extended the context
                kept[_LONGEST] = max(kept[_LONGEST], assets.max_seq_len)
            _add_ends(kept, ends)
            return kept
    if ours is None or is_of_diffusers(ours):
        return ours
    scaling = ours.get("rope_scaling") or {}
    stretched = scaling.get("original_max_position_embeddings", 0) * scaling.get("factor", 0)
    # As trained, or as rotations are stretched.
    if longest := max(assets.max_seq_len, int(stretched)):
        ours.setdefault(_LONGEST, longest)  # a model with a table of positions states its own
    if ends:
        ours |= {"bos_token_id": bos_id, "eos_token_id": ends if ends[1:] else ends[0]}
    return ours


def _read_args(folder: Path, args: BaseModelArgs) -> BaseModelArgs | None:
    """Return the args in a folder's `config.json`; None if it or `from_hf_config` is missing."""
    from torchtitan.models.from_hf import args_of_hf_config, read_hf_config

    if not hasattr(args, "from_hf_config") or not is_file(folder / "config.json", CheckpointError):
        return None
    with begin_errors_with(str(folder)):
        return args_of_hf_config(type(args), read_hf_config(folder))


def differences(saved: Any, current: Any, ignored: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of each field in which two dataclasses differ, and a text with both values."""
    found = list(nested_differences(plain_args(saved), plain_args(current), ignored))
    yield from zip((name for name, *_ in found), told(found), strict=True)
