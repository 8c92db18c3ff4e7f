"""Checks pipeline stages in one process: run one after the other, they equal the model."""

from __future__ import annotations

import inspect
from collections import ChainMap
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from torchtitan.distributed.init import initialize_weights
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_parallel import modules_around_layers, pipeline_of
from torchtitan.distributed.pipeline_split import stages_of_rank, stages_per_rank
from torchtitan.errors import ConfigError
from torchtitan.models.common.attention import places_in_documents
from torchtitan.preflight.validate import validate
from torchtitan.runtime.fake_world import fake_world

from .check import CheckFailedError, Checks, NotApplicableError
from .diagnose import problem_and_place
from .probe import accepts, named_layers, packed_documents, recorded_outputs, vary_constants
from .subject import Subject

CHECKS = Checks("contract.layers")

SPLITS = {
    "two stages": ("1F1B",),
    "four stages": ("Interleaved1F1B",),
    "a V": ("DualPipeV",),
    "layers and the rest": ("1F1B", "END"),
}
"""Name -> schedule, and the split point unless split by cost; `END` stands for the first module
after the layers. All use two ranks."""

_HINT = (
    "A stage has some of the layers, under their original names, and runs once: a loop over all "
    "layers needs pipeline_fn=None. Code that depends on a layer must use its own number, never "
    "its place in self.layers or their count. Only embedding, norm and output may be None (`h = "
    "self.norm(h) if self.norm is not None else h`), and between modules that may be absent "
    "forward() does nothing else, such as scaling. Every stage must use the positions and "
    "document_ids that forward() is given, and pass on what later stages need: a tensor, or a "
    "tuple of tensors, which are the first arguments of the next stage's forward()."
)


@CHECKS.of(
    "stages.numbers",
    "the stages of any pipeline split, run one after the other, equal the whole model bit by bit",
)
def numbers_are_kept(subject: Subject) -> str:
    """Test rows of one document; if the model takes them, also restarting positions and documents.

    The positions restart within a row, and the documents are packed. A stage may hand on a tuple.
    """
    if subject.spec.pipeline_fn is None:
        raise NotApplicableError(f"{subject.name} has no pipeline_fn in its TrainSpec")
    example = subject.example(2)
    whole = subject.build_varied()
    inputs = _inputs(subject, example.tokens) if subject.reads_text else {"its batch": {}}
    if example.inputs:
        *_, packed = inputs.values()
        inputs["its batch"] = packed | example.inputs
    done, refused = [], ""
    for split, layout in SPLITS.items():
        try:
            stages = _stages(subject, *layout)
        except ConfigError as error:
            refused = str(error)
            continue
        _require_same_names(whole, stages, split)
        for rows, given in inputs.items():
            for training in (False, True):
                for part in (whole, *stages):
                    part.train(training)
                if problem := _problem_with(stages, whole, example.tokens, given):
                    mode = " in training" * training
                    raise CheckFailedError(f"split in {split}, with {rows}{mode}, {problem}", _HINT)
        done.append(split)
    if not done and len(whole.layers) > 1:
        raise CheckFailedError(
            f"there is a pipeline_fn, but no pipeline is possible: {refused}",
            "Mend it, or set pipeline_fn=None in the TrainSpec.",
        )
    if not done:
        raise NotApplicableError(refused)
    return f"exact for {', '.join(done)}"


@torch.no_grad()
def _problem_with(
    stages: list[nn.Module],
    whole: nn.Module,
    tokens: torch.Tensor,
    inputs: dict[str, torch.Tensor],
) -> str:
    """Return how the stages differ from the whole model; "" if they do not."""
    expected = _run([whole], tokens, inputs)
    try:
        actual = _run(stages, tokens, inputs)
    except ConfigError as error:  # about the output of a stage
        return str(error)
    except Exception as error:
        return f"forward() fails: {problem_and_place(error)}"
    if _kinds(actual) != _kinds(expected):
        return f"they return {_kinds(actual)}, not {_kinds(expected)}"
    for a, b in zip(actual, expected, strict=True):
        if isinstance(b, torch.Tensor) and not torch.equal(a, b):
            return (
                f"the logits differ by {float((a - b).norm() / b.norm()):.2g} of their norm; the "
                "first layer whose output differs is "
                f"{_first_part_that_differs(whole, stages, tokens, inputs)}"
            )
    return ""


def _run(models: list[nn.Module], x: Any, inputs: dict[str, torch.Tensor]) -> list[Any]:
    """Call each model with the result of the one before, a tensor or a tuple, and the inputs that
    it takes; return the tensors of the last result.
    """
    torch.manual_seed(0)  # the stages, one after the other, draw what the whole model draws
    for model in models:
        accepted = inspect.signature(model.forward).parameters
        entry = x if isinstance(x, tuple | list) else (x,)
        if not all(isinstance(part, torch.Tensor) for part in entry):
            kinds = ", ".join(type(part).__name__ for part in entry)
            raise ConfigError(f"a stage passes on {kinds}, not a tensor or a tuple of tensors")
        x = model(*entry, **{name: value for name, value in inputs.items() if name in accepted})
    return tree_leaves(x)


def _kinds(values: list[Any]) -> str:
    shapes = (list(v.shape) if isinstance(v, torch.Tensor) else type(v).__name__ for v in values)
    return " and ".join(map(str, shapes)) or "nothing"


def _inputs(subject: Subject, tokens: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Return kind of rows -> inputs of `forward` besides tokens."""
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    inputs = {"one document": {"positions": positions}}
    document_ids = packed_documents(*tokens.shape)
    places = places_in_documents(document_ids)
    if accepts(subject.spec.model_cls, "positions"):
        inputs["positions that restart"] = {"positions": places}
    if accepts(subject.spec.model_cls, "document_ids"):
        inputs["packed documents"] = {"positions": places, "document_ids": document_ids}
    return inputs


def _require_same_names(whole: nn.Module, stages: list[nn.Module], split: str) -> None:
    expected = {n for n, _ in whole.named_parameters(remove_duplicate=False)}
    found = [n for stage in stages for n, _ in stage.named_parameters(remove_duplicate=False)]
    missing, extra = sorted(expected - set(found)), sorted(set(found) - expected)
    twice = sorted({name for name in found if found.count(name) > 1})
    for problem, names in (("has", missing), ("should have", extra), ("alone has", twice)):
        if names:
            raise CheckFailedError(
                f"split in {split}, no stage {problem} {', '.join(names[:4])}",
                "pipeline.py: every parameter must be in one stage, under its name in the whole "
                "model. Name the modules before and after the layers to build_pipeline.",
            )


def _first_part_that_differs(
    whole: nn.Module,
    stages: list[nn.Module],
    tokens: torch.Tensor,
    inputs: dict[str, torch.Tensor],
) -> str:
    with recorded_outputs(whole) as expected:
        _run([whole], tokens, inputs)
    with ExitStack() as stack:
        found = ChainMap(*(stack.enter_context(recorded_outputs(stage)) for stage in stages))
        _run(stages, tokens, inputs)
    layers = dict(named_layers(whole))
    for name, output in expected.items():
        if name in layers and not (name in found and torch.equal(found[name], output)):
            return name
    return "after the layers (norm or output)"


def _stages(subject: Subject, schedule: str, cut: str = "") -> list[nn.Module]:
    """Return the stages made by the model's own `pipeline_fn`, each with its weights, in order.

    Raises:
        ConfigError: the model cannot be split like this.
    """
    pipeline_fn: Any = subject.spec.pipeline_fn
    degree, cuts = 2, []
    if cut:
        _, last = modules_around_layers(pipeline_fn)
        model = subject.spec.meta_model(subject.args)
        first = next((name for name in last if getattr(model, name, None) is not None), cut)
        cuts = [f"--parallelism.pipeline_parallel_split_points={first}"]
    config = subject.config(
        *cuts,
        f"--parallelism.pipeline_parallel_degree={degree}",
        f"--parallelism.pipeline_parallel_schedule={schedule}",
        "--training.local_batch_size=8",
    )
    validate(config, degree)
    loss_fn = subject.spec.build_loss_fn(config)
    stages = {}
    for rank in range(degree):
        with fake_world(degree, rank):
            dims = ParallelDims.from_config(config.parallelism, degree)
            model = subject.spec.meta_model(subject.spec.updated_args(config))
            layout = dims.world_mesh, dims, config
            built = pipeline_fn(model, *layout, lambda part, *layout: part, loss_fn)
            pipeline = pipeline_of(built, config)
            numbers = stages_of_rank(config, rank)
            for number, part in zip(numbers, pipeline.model_parts, strict=True):
                initialize_weights(part, subject.seed, torch.device("cpu"))
                vary_constants(part, subject.seed)
                stages[number] = part
    return [stages[number] for number in range(degree * stages_per_rank(config))]
