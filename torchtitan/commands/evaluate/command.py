"""`torchtitan eval`: perplexity on a dataset, or tasks of lm-evaluation-harness."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import tyro

from torchtitan.commands.evaluate.lm_eval_adapter import TaskModel, require_lm_eval, run_tasks
from torchtitan.commands.evaluate.perplexity import evaluate
from torchtitan.config.options import flag, parse_options, require_at_least_one, shown_as
from torchtitan.data.build import open_on_all_ranks
from torchtitan.data.sources import HUB_DATASETS, Source, open_dataset
from torchtitan.errors import ConfigError, begin_errors_with
from torchtitan.generation.load import (
    CheckpointSource,
    LoadedModel,
    ModelOptions,
    load_model,
    open_source,
    process_group,
)
from torchtitan.runtime.world import rank, world_size
from torchtitan.tools.logging import init_logger
from torchtitan.tools.result_file import require_folder, write_json

DESCRIPTION = """\
Evaluate a trained model, from a torchtitan checkpoint or a Hugging Face folder: its perplexity on
a dataset, or tasks of lm-evaluation-harness (pip install lm_eval). See docs/generating.md.

  torchtitan eval --checkpoint outputs --dataset stdlib_validation
  torchtitan eval --checkpoint Qwen3-0.6B --dataset text \\
    --dataset-path notes.txt --json loss.json
  torchrun --nproc-per-node 8 -m torchtitan eval \\
    --checkpoint Llama-3.1-8B --dataset c4_validation
  torchtitan eval --checkpoint Qwen3-0.6B --tasks hellaswag arc_easy --limit 100

Exit code: 0, or 2 for a mistake in the command, the checkpoint or the data."""

DEFAULT_SEQ_LEN = 2048
ONLY_WITH = {
    "--tasks": ("num_fewshot", "limit", "include_path"),
    "--dataset": ("dataset_path", "split", "max_tokens"),
}
"""Option -> those that have an effect only beside it."""
BosFlag = Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help_behavior_hint="")]
"""Of two, neither of which is the default."""


@dataclass
class Options(ModelOptions):
    dataset: Annotated[str | None, shown_as("NAME")] = None
    """Dataset name, as in training.dataset."""
    dataset_path: Annotated[str | None, shown_as("PATH")] = None
    """File, glob or folder of the dataset, as in training.dataset_path."""
    text_key: str = "text"
    """Field that holds the text, in formats with fields."""
    split: Annotated[str | None, shown_as("NAME")] = None
    """Part of a dataset that has several, as in training.split. Default: as in training"""
    seq_len: Annotated[int | None, shown_as("N")] = None
    """Tokens per sequence. Default: the model's longest sequence, with a dataset at most 2048; 2048
    if the model's limit is unknown"""
    batch_size: int = 4
    """Sequences per forward pass of a data rank."""
    max_tokens: Annotated[int | None, shown_as("N")] = None
    """Stop after predicting this many tokens, even within a document. Default: all documents"""
    tasks: Annotated[list[str], shown_as("[TASK ...]")] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, instead of a dataset."""
    num_fewshot: Annotated[int | None, shown_as("N")] = None
    """Number of examples in a task's context. Default: as the task defines"""
    limit: Annotated[int | None, shown_as("N")] = None
    """Number of documents per task. Default: all"""
    include_path: Annotated[str | None, shown_as("FOLDER")] = None
    """Folder with your own task definitions."""
    add_bos: BosFlag = False
    """Prepend bos to documents and to the contexts of tasks."""
    no_add_bos: BosFlag = False
    """Do not prepend bos. With neither, as in the run, or as the tokenizer of a Hugging Face folder
    specifies."""
    json: Annotated[str | None, shown_as("FILE")] = None
    """Write the result to this file as JSON."""


def main(argv: list[str]) -> int:
    """Run the command with the arguments after `torchtitan eval`; return the exit code."""
    options = parse_options(Options, argv, "torchtitan eval", DESCRIPTION)
    init_logger()
    require_folder(options.json, "--json")
    _check(options)
    source = open_source(options)
    seq_len, add_bos = _seq_len(source, options), _add_bos(source, options)
    with process_group():
        dataset = _open_dataset(options)
        loaded = load_model(source)
        if dataset is None:
            result = _evaluate_tasks(loaded, options, seq_len, add_bos)
        else:
            result = _evaluate_dataset(loaded, dataset, options, seq_len, add_bos)
        if rank() == 0 and options.json is not None:
            result |= {"seq_len": seq_len, "add_bos": add_bos, "checkpoint": str(source.folder)}
            write_json(options.json, result, "--json")
    return 0


def _check(options: Options) -> None:
    """Raise `ConfigError` for impossible values and combinations."""
    require_at_least_one(options, "seq_len", "batch_size", "max_tokens", "limit")
    if options.add_bos and options.no_add_bos:
        raise ConfigError("give either --add-bos or --no-add-bos")
    if bool(options.tasks) == (options.dataset is not None):
        raise ConfigError("give either --dataset NAME or --tasks TASK [TASK ...]")
    missing = "--dataset" if options.tasks else "--tasks"
    for name in ONLY_WITH[missing]:
        if getattr(options, name) is not None:
            raise ConfigError(f"{flag(name)} has no effect without {missing}; remove it")
    if options.tasks:
        require_lm_eval()
        if world_size() != options.tensor_parallel_degree:
            raise ConfigError(
                "--tasks shards the model over all processes: set --tensor-parallel-degree to "
                f"their number, {world_size()}"
            )


def _open_dataset(options: Options) -> Source | None:
    name = options.dataset
    if name is None:
        return None
    place = options.dataset_path, options.text_key, options.split
    with begin_errors_with(f"--dataset {name}"):
        return open_on_all_ranks(lambda: open_dataset(name, *place), name in HUB_DATASETS)


def _seq_len(source: CheckpointSource, options: Options) -> int:
    """Return `--seq-len` or its default. Raises `ConfigError` if the model supports fewer."""
    limit = source.max_seq_len
    if options.seq_len is None:
        default = limit or DEFAULT_SEQ_LEN
        return default if options.tasks else min(default, DEFAULT_SEQ_LEN)
    if limit is not None and options.seq_len > limit:
        raise ConfigError(
            f"--seq-len {options.seq_len}: {source.model_name} of {source.folder} supports "
            f"sequences of at most {limit} tokens"
        )
    return options.seq_len


def _add_bos(source: CheckpointSource, options: Options) -> bool:
    """Whether to add bos. Raises `ConfigError` if it is requested, but the tokenizer has none."""
    if options.add_bos and source.tokenizer.bos_id is None:
        path = source.job_config.model.tokenizer_path
        raise ConfigError(f"--add-bos: the tokenizer {path} has no bos token")
    return options.add_bos or (source.add_bos and not options.no_add_bos)


def _evaluate_dataset(
    loaded: LoadedModel, dataset: Source, options: Options, seq_len: int, add_bos: bool
) -> dict[str, Any]:
    with begin_errors_with(f"--dataset {options.dataset}"):
        result = evaluate(loaded, dataset, seq_len, options.batch_size, options.max_tokens, add_bos)
    if rank() == 0:
        bits = result.bits_per_byte
        sys.stdout.write(
            f"loss           {result.loss:.4f} nats a token\n"
            f"perplexity     {result.perplexity:.3f}\n"
            f"bits per byte  {'-' if bits is None else f'{bits:.4f}'}\n"
            f"tokens         {result.tokens:,} ({result.documents:,} documents, "
            f"{result.bytes:,} bytes), in sequences of {seq_len:,}\n"
        )
    return asdict(result) | {"dataset": options.dataset}


def _evaluate_tasks(
    loaded: LoadedModel, options: Options, seq_len: int, add_bos: bool
) -> dict[str, Any]:
    model = TaskModel(loaded, options.batch_size, seq_len, add_bos)
    results = run_tasks(
        model, options.tasks, options.num_fewshot, options.limit, options.include_path
    )["results"]
    if rank() == 0:
        for task, metrics in results.items():
            for name, value in metrics.items():
                if isinstance(value, float) and "stderr" not in name:
                    sys.stdout.write(f"{task}  {name.partition(',')[0]}  {value:.4f}\n")
    return {"results": results}
