"""Checks that every parallelism trains like one process: losses, gradients and weights.

Each layout trains for a few steps in float64 from the same seed, and is compared with the run on
one process, tensor by tensor. The verdict uses the loss, the norm of the gradients, the gradients
of the first step and the weights after the last one: these are well defined in every layout.
The outputs of modules only show where a difference begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from torchtitan.distributed.dtensor import whole_tensor
from torchtitan.errors import ConfigError, ContextParallelError
from torchtitan.tools.text import few, first_line
from torchtitan.train import Trainer

from .batches import BATCH, same
from .check import CheckFailedError, Checks, NotApplicableError
from .dtypes import NARROW, Dtypes
from .effects import compiled_graphs, require_effect
from .reference import (
    LEARNING_RATE,
    STEPS,
    Recording,
    build_trainer,
    train,
    trainer_or_skip,
    without_dropout,
)
from .subject import Subject
from .verdict import Comparison, compare_runs, hint_of, judge

CHECKS = Checks()

PRECISION = "layouts.precision"
REFERENCE = "layouts.one_device"
DOCUMENTS = "layouts.one_device_documents"
"""The reference of layouts whose rows are packed documents."""
FLOAT32 = "layouts.one_device_float32"
"""The reference of layouts that compute in float32."""


@dataclass(frozen=True)
class Layout:
    """A number of ranks, and how they divide the work."""

    ranks: int = 1
    parts: int = 1
    """Equal parts of a batch, for data ranks and for the accumulation of gradients."""
    options: tuple[str, ...] = ()
    quick: bool = False
    timeout: float = 120.0
    float64: bool = True

    @property
    def reference(self) -> str:
        if not self.float64:
            return FLOAT32
        return DOCUMENTS if DOCUMENT_MASK in self.options else REFERENCE


TP2 = "--parallelism.tensor_parallel_degree=2"
CP2 = "--parallelism.context_parallel_degree=2"
PP2 = "--parallelism.pipeline_parallel_degree=2"
EP2 = "--parallelism.expert_parallel_degree=2"
DOCUMENT_MASK = "--training.document_mask"
REPLICATE2 = "--parallelism.data_parallel_replicate_degree=2"
COMPILE = ("--compile.enable", "--compile.backend=aot_eager")
AC = "--activation_checkpoint.mode="
SCHEDULE = "--parallelism.pipeline_parallel_schedule="

LAYOUTS = {
    "accumulation": Layout(parts=4),
    "fsdp2": Layout(2, 2, quick=True),
    "ddp2": Layout(2, 2, (REPLICATE2, "--parallelism.data_parallel_shard_degree=1")),
    "hsdp2x2": Layout(4, 4, (REPLICATE2,)),
    "tp2": Layout(2, 1, (TP2,), quick=True),
    "tp2_whole_sequence": Layout(2, 1, (TP2, "--parallelism.disable_sequence_parallel")),
    "cp2": Layout(2, 1, (CP2,), quick=True),
    "cp2_ulysses": Layout(2, 1, (CP2, "--parallelism.context_parallel_method=ulysses")),
    "cp2_ring": Layout(2, 1, (CP2, "--parallelism.context_parallel_method=ring")),
    "pp2": Layout(2, 1, (PP2,), quick=True),
    # To a model, schedules differ in a rank's stages, and in whether backward passes are split.
    "pp2_interleaved": Layout(2, 1, (PP2, SCHEDULE + "Interleaved1F1B")),
    "pp2_zbv": Layout(2, 1, (PP2, SCHEDULE + "ZBVZeroBubble")),
    "ep2": Layout(2, 2, (EP2,), quick=True),
    "ac_full": Layout(options=(AC + "full",)),
    "ac_selective_op": Layout(options=(AC + "selective",), quick=True),
    "compile_aot_eager": Layout(options=COMPILE, quick=True),
    # The code generator has tables by dtype, so that none may stand for another.
    "compile_inductor": Layout(options=("--compile.enable",), timeout=240.0, float64=False),
    "ac_memory_budget": Layout(options=(*COMPILE, AC + "memory_budget")),
    "fsdp2_ac_full_compile": Layout(2, 2, (*COMPILE, AC + "full")),
    "pp2_compile": Layout(2, 1, (PP2, *COMPILE)),
    "fsdp2_tp2": Layout(4, 2, (TP2, AC + "selective"), timeout=180.0),
    "fsdp2_cp2": Layout(4, 2, (CP2,), timeout=180.0),
    "fsdp2_ep2": Layout(4, 4, (EP2,), timeout=180.0),
    "pp2_tp2": Layout(4, 1, (PP2, TP2), timeout=180.0),
    "pp2_fsdp2": Layout(4, 2, (PP2,), timeout=180.0),
    "pp2_fsdp2_tp2": Layout(8, 2, (PP2, TP2), timeout=240.0),
    "tp2_documents": Layout(2, 1, (TP2, DOCUMENT_MASK)),
    "cp2_documents": Layout(2, 1, (CP2, DOCUMENT_MASK)),
    "pp2_documents": Layout(2, 1, (PP2, DOCUMENT_MASK)),
}


def options_of(layout: Layout) -> list[str]:
    return [f"--training.local_batch_size={BATCH // layout.parts}", *layout.options]


@CHECKS.of(
    PRECISION, "the model can compute in float64, in which layouts are compared", float64=True
)
def computes_in_float64(subject: Subject) -> str:
    """Let checks compare layouts in float32 if the model, its loss or a kernel needs that."""
    try:
        model, example = subject.build().train(), subject.example(2).in_float64()
        with ModuleTracker() as tracker, Dtypes(tracker, NARROW) as narrow:
            example.loss(example.run(model)).backward()
    except NotApplicableError:
        raise
    except Exception as error:
        reason = first_line(error)
    else:
        if not narrow.found:
            return f"{narrow.operations} operations in float64"
        module, operation, dtype = next(iter(narrow.found))
        reason = f"{operation} in {module} makes a {dtype} tensor"
    subject.use_float32()
    return f"it cannot, so layouts are compared in float32: {reason}"


@CHECKS.of(
    REFERENCE,
    "the model trains on one process, and a forward pass can be repeated",
    float64=True,
    needs=(PRECISION,),
)
def one_device(subject: Subject) -> str:
    """Leave the reference in `subject.folder`."""
    try:
        trainer = build_trainer(subject, f"--training.local_batch_size={BATCH}")
    except ConfigError as error:
        raise CheckFailedError(
            f"the model cannot be trained on one process: {error}",
            "Train it: torchtitan train --model.name ...",
        ) from error
    _require_same_batches(subject)
    losses = _leave_reference(trainer, reference_path(subject))
    return losses + _require_repeatable(trainer, subject)


def _leave_reference(trainer: Trainer, path: Path) -> str:
    """Train, and save a recording of whole tensors. Return the losses."""
    recording = train(trainer)
    for tensors in (recording.initial, recording.gradients, recording.weights):
        tensors.update({name: whole_tensor(tensor) for name, tensor in tensors.items()})
    recording.save(path)
    return f"losses {' '.join(f'{loss:.4f}' for loss in recording.losses)}"


def reference_path(subject: Subject, reference: str = REFERENCE) -> Path:
    return subject.folder / f"{reference.partition('.')[2]}.pt"


def _require_repeatable(trainer: Trainer, subject: Subject) -> str:
    """Require two equal forward passes in training mode, else no layouts can be compared.

    Returns a note on randomness that was removed for that.
    """
    with without_dropout():
        first, same_seed, other_seed = (_outputs(trainer, subject, seed) for seed in (0, 0, 1))
    if differing := _unequal(first, same_seed):
        a, b = differing
        by = float((a - b).norm() / a.norm())
        raise CheckFailedError(
            f"two forward passes of the same tokens differ by {by:.2g} of the logits' norm",
            "forward() must not keep state from one call to the next: activation checkpointing, "
            "pipelines and gradient accumulation call it more than once per step.",
        )
    if _unequal(first, other_seed):
        noise = ", and let the data loader draw noise" if subject.own_batches else ""
        raise NotApplicableError(
            "NO LAYOUT IS CHECKED: in training mode, forward() draws random numbers other than "
            "those of torch.nn.functional.dropout, and layouts draw different ones. Set the rates "
            f"of this flavor to 0 so that its layouts are checked{noise}"
        )
    drops = _unequal(first, _outputs(trainer, subject, 1))
    return ". Dropout is disabled here and in all layouts" if drops else ""


def _outputs(trainer: Trainer, subject: Subject, seed: int) -> list[torch.Tensor]:
    """Run a forward pass in training mode; an author's loss may take several output tensors."""
    example = subject.example(2)
    torch.manual_seed(seed)
    with torch.no_grad():
        output = trainer.model_parts[0](example.tokens, **example.inputs)
    return [whole_tensor(t) for t in tree_leaves(output) if isinstance(t, torch.Tensor)]


def _unequal(
    first: list[torch.Tensor], second: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the first pair of tensors that differ."""
    pairs = zip(first, second, strict=True)
    return next((pair for pair in pairs if not torch.equal(*pair)), None)


def _require_same_batches(subject: Subject) -> None:
    """Require that two of the author's loaders give the same, else no layouts can be compared."""
    if subject.own_batches is None or subject.own_batches.error:
        return
    first, other = subject.own_batches.batch(1), subject.own_batches.again()
    second = other.batch(1)
    other.close()
    for name, tensor in first.items():
        if name not in second or not same(tensor, second[name]):
            raise CheckFailedError(
                f"two data loaders of the same job give a different {name!r} in the first batch",
                "Random numbers of a loader, such as noise, must be a function of debug.seed and "
                "the row: torch.Generator().manual_seed(...).",
            )


@CHECKS.of(
    "layouts.updates",
    "the optimizer changes every parameter that has a gradient",
    needs=(REFERENCE,),
)
def every_parameter_is_updated(subject: Subject) -> str:
    recording = Recording.load(reference_path(subject))
    trained = [name for name in recording.gradients if name in recording.weights]
    kept = [
        name
        for name in trained
        if torch.equal(recording.weights[name], recording.initial[name])
        and _moves(recording.initial[name], recording.gradients[name])
    ]
    if kept:
        raise CheckFailedError(
            f"{len(kept)} of {len(trained)} parameters have a gradient, but {STEPS} steps of the "
            f"optimizer leave them unchanged: {few(kept, 5)}",
            "build_optimizer_fn: every parameter of each model part must be in a group, with a "
            "learning rate.",
        )
    return f"{len(trained)} parameters"


def _moves(weight: torch.Tensor, gradient: torch.Tensor) -> bool:
    """Whether a step of gradient descent, the smallest of any optimizer, survives rounding.

    Adam's steps are larger where gradients are as small as here.
    """
    step = LEARNING_RATE * gradient.abs().double()
    return bool((step > 2 * torch.finfo(weight.dtype).eps * weight.abs().double()).any())


@CHECKS.of(
    DOCUMENTS,
    "the model trains on packed documents on one process",
    quick=False,
    float64=True,
    needs=(REFERENCE,),
)
def one_device_with_documents(subject: Subject) -> str:
    """Leave the reference of layouts with packed documents."""
    if not subject.reads_text:
        if subject.own_documents.error:
            raise NotApplicableError(f"no packed documents: {subject.own_documents.error}")
        if not {"positions", "document_ids"} <= set(subject.own_documents.batch(1)):
            raise NotApplicableError("its data loader gives no positions and document_ids")
    trainer = trainer_or_skip(subject, f"--training.local_batch_size={BATCH}", DOCUMENT_MASK)
    return _leave_reference(trainer, reference_path(subject, DOCUMENTS))


@CHECKS.of(FLOAT32, "the model trains on one process in float32", quick=False, needs=(REFERENCE,))
def one_device_in_float32(subject: Subject) -> str:
    """Leave the reference of layouts that compute in float32."""
    trainer = build_trainer(subject, f"--training.local_batch_size={BATCH}")
    return _leave_reference(trainer, reference_path(subject, FLOAT32))


def trains_like_one_device(name: str, subject: Subject) -> str:
    """Run the check of a layout, on each of its ranks."""
    layout = LAYOUTS[name]
    trainer = trainer_or_skip(subject, *options_of(layout))
    reference = Recording.load(reference_path(subject, layout.reference))
    with compiled_graphs(trainer.model_parts) as compiled:
        try:
            recording = train(trainer)
        except ContextParallelError as error:  # known only from the first batch
            raise NotApplicableError(str(error)) from error
        except RuntimeError as error:  # from an operation on tensors, most likely of wrong shapes
            error.add_note(hint_of("outputs", trainer.job_config))
            raise
    comparison = compare_runs(trainer, recording, reference)
    found: list[Comparison] = [comparison] * dist.get_world_size()
    dist.all_gather_object(found, comparison)
    notes = require_effect(trainer, comparison, compiled["graphs"])
    return judge(found, reference, trainer.job_config) + notes


@CHECKS.of(
    "layouts.fsdp2_bfloat16",
    "FSDP computes in the precision of the job",
    ranks=2,
    timeout=120.0,
    quick=False,
    needs=(REFERENCE,),
)
def fsdp_computes_in_bfloat16(subject: Subject) -> str:
    options = *options_of(LAYOUTS["fsdp2"]), "--training.mixed_precision_param=bfloat16"
    trainer = trainer_or_skip(subject, *options)
    outputs = train(trainer, steps=1).outputs
    inner = {name: tensors for name, tensors in outputs.items() if name}
    narrow = [n for n, tensors in inner.items() if any(t.dtype == torch.bfloat16 for t in tensors)]
    if inner and not narrow:
        raise CheckFailedError(
            "training.mixed_precision_param = bfloat16 has no effect: no module gives bfloat16",
            "fully_shard needs mp_policy=MixedPrecisionPolicy(param_dtype=...), as in apply_fsdp.",
        )
    return f"{len(narrow)} of {len(inner)} modules give bfloat16"


for _name, _layout in LAYOUTS.items():
    CHECKS.of(
        f"layouts.{_name}",
        "losses, gradients and weights equal those of one process",
        ranks=_layout.ranks,
        timeout=_layout.timeout,
        quick=_layout.quick,
        float64=_layout.float64,
        needs=(_layout.reference,),
    )(partial(trains_like_one_device, _name))
