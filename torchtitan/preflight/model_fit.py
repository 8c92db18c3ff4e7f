"""Check that a model supports the config, before weights are allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torchtitan.components.checkpoint.huggingface import check_exchange
from torchtitan.components.checkpoint.huggingface_save import check_export
from torchtitan.components.loss import warn_of_divided_samples
from torchtitan.components.optimizer import check_rules, warn_of_low_precision
from torchtitan.components.tokenizer import check_tokenizer, path_of
from torchtitan.config.load import fail
from torchtitan.distributed.names import require_match
from torchtitan.errors import ConfigError
from torchtitan.models.plugins import load_plugins
from torchtitan.preflight.likely_mistakes import unlikely
from torchtitan.preflight.validate import validate
from torchtitan.protocols.train_spec import TrainSpec, train_spec_of
from torchtitan.runtime.device import device_name
from torchtitan.tools.logging import logger, rank0
from torchtitan.tools.profiling import check_profiling

if TYPE_CHECKING:
    import torch.nn as nn

    from torchtitan.config import JobConfig
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.protocols.model import BaseModelArgs


class FittingModel(NamedTuple):
    spec: TrainSpec
    model_args: BaseModelArgs
    tokenizer: Any
    """None if the model reads no text."""


def fitting_model(job_config: JobConfig, world_size: int) -> FittingModel:
    """Return the model of a job on `world_size` processes, after checking the job.

    Raises:
        ConfigError: the job cannot run like this.
    """
    load_plugins(job_config.job.custom_import)
    spec = valid_spec(job_config, world_size)
    for doubt in unlikely(job_config):
        rank0.warning("%s", doubt)
    check_profiling(job_config)
    model_args = spec.updated_args(job_config)
    check_exchange(job_config, spec, model_args)
    tokenizer = spec.tokenizer(job_config)
    check_tokenizer(tokenizer, job_config)
    check_vocabulary(tokenizer, model_args, job_config)
    check_length(spec, model_args, job_config)
    return FittingModel(spec, model_args, tokenizer)


def check_model(model: nn.Module, job_config: JobConfig, accumulation_steps: int) -> None:
    """Check a whole model, converted and still on the meta device.

    Raises:
        ConfigError: patterns of the config match no parameter, or no file could hold the model.
    """
    check_rules(model, job_config)
    if pattern := job_config.checkpoint.initial_load_exclude:
        require_match(pattern, model, job_config, "checkpoint.initial_load_exclude")
    check_export(model, job_config)
    warn_of_low_precision(model)
    warn_of_divided_samples(model, job_config, accumulation_steps)


def log_model(model: nn.Module, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
    """Log what is trained, and where."""
    total = sum(param.numel() for param in model.parameters())
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    logger.info(
        "%s: %s parameters%s on %d rank%s (%s), %s",
        job_config.model,
        f"{total:,}",
        f", of which {trained:,} are trained," if trained < total else "",
        parallel_dims.world_size,
        "s" if parallel_dims.world_size > 1 else "",
        parallel_dims,
        device_name(),
    )


def valid_spec(job_config: JobConfig, world_size: int) -> TrainSpec:
    """Return the `TrainSpec` of a job whose plugins are loaded.

    Raises:
        ConfigError: there is no such model, it lacks a part, or options conflict.
    """
    spec = train_spec_of(job_config)
    validate(job_config, world_size)
    check_builders(spec, job_config)
    return spec


def check_vocabulary(tokenizer: Any, model_args: Any, job_config: JobConfig) -> None:
    """Refuse a tokenizer with ids beyond the embedding: an obscure index error on the device."""
    size = getattr(model_args, "vocab_size", None)
    if tokenizer is None or fits_vocabulary(tokenizer, size):
        return
    fail(
        job_config,
        "model.tokenizer_path",
        f"the tokenizer has {tokenizer.vocab_size} tokens, but the vocabulary of "
        f"{job_config.model} has only {size}. Use the model's own tokenizer or, to train from the "
        f"beginning, set model.args.vocab_size = {tokenizer.vocab_size} or more",
    )


def require_vocabulary(tokenizer: Any, model_args: Any, model: str) -> None:
    """Raise `ConfigError` if the model described as `model` cannot read the tokenizer's output."""
    size = getattr(model_args, "vocab_size", None)
    if not fits_vocabulary(tokenizer, size):
        raise ConfigError(
            f"the tokenizer {_name_of(tokenizer)} has {tokenizer.vocab_size} tokens, but the "
            f"vocabulary of the model {model} has only {size}. Give the model's own tokenizer: "
            "--tokenizer"
        )


def fits_vocabulary(tokenizer: Any, size: int | None) -> bool:
    """Return whether a model with `size` embeddings can read the tokenizer's output.

    It can if only special tokens lack an embedding, as with Gemma 3 1B, which shares its tokenizer
    with models that see images. A warning names them, and from then on the tokenizer refuses texts
    that contain them.
    """
    if size is None or tokenizer.vocab_size <= size:
        return True
    leave_out = getattr(tokenizer, "leave_out", None)
    names = None if leave_out is None else leave_out(size)
    if names is None:
        return False
    rank0.warning(
        "the tokenizer %s has special tokens without embeddings in the model, whose "
        "vocabulary is %d: %s. Text that contains one of them is refused",
        *(_name_of(tokenizer), size, ", ".join(names)),
    )
    return True


def _name_of(tokenizer: Any) -> str:
    return path_of(tokenizer) or type(tokenizer).__qualname__


def check_length(spec: TrainSpec, model_args: Any, job_config: JobConfig) -> None:
    """Refuse sequences longer than a text model's `max_seq_len`: an index error in its forward."""
    longest = getattr(model_args, "max_seq_len", None)
    if spec.build_tokenizer_fn is None or not isinstance(longest, int):
        return
    lengths = {"training.seq_len": job_config.training.seq_len}
    if job_config.validation.enable and job_config.validation.seq_len is not None:
        lengths["validation.seq_len"] = job_config.validation.seq_len
    for key, length in lengths.items():
        if length > longest:
            supports = f"supports sequences of at most {longest} tokens (max_seq_len)"
            fail(job_config, key, f"{job_config.model} {supports}")


def check_builders(spec: TrainSpec, job_config: JobConfig) -> None:
    """Check that a `TrainSpec` has the optional parts that the config needs."""
    if job_config.parallelism.pipeline_parallel_degree > 1 and spec.pipeline_fn is None:
        fail(
            job_config,
            "parallelism.pipeline_parallel_degree",
            f"{job_config.model.name} has no pipeline_fn in its TrainSpec",
        )
    if job_config.validation.enable and not (spec.build_tokenizer_fn or spec.build_validator_fn):
        fail(
            job_config,
            "validation.enable",
            f"{job_config.model.name} has neither build_tokenizer_fn, which the default validator "
            "needs, nor build_validator_fn in its TrainSpec",
        )
