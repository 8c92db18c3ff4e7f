"""What a stage of a pipeline hands on."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.pipelining.stage as pipelining
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from torchtitan.config import JobConfig
from torchtitan.distributed.pipeline_stage import Stage, _refuse_all_but_tensors
from torchtitan.errors import ConfigError
from torchtitan.runtime.fake_world import fake_world

SCHEDULES = pytest.mark.parametrize("kind", [Schedule1F1B, ScheduleGPipe])


def test_what_is_handed_on_has_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks received it into a part of their buffers, and kept the rest."""
    monkeypatch.setattr(PipelineStage, "get_fwd_send_ops", lambda stage, chunk: [chunk])
    stage = object.__new__(Stage)
    stage.stage_index, stage.num_stages = 0, 2
    hidden = torch.zeros(1, 4, 8)
    stage.fwd_cache = {0: ((hidden, hidden[:, :3]), ()), 1: ((hidden, hidden[:, :2]), ())}
    assert stage.get_fwd_send_ops(0) == stage.get_fwd_send_ops(0) == [0]
    with pytest.raises(ConfigError, match=r"\[1, 4, 8\], \[1, 2, 8\]\], but of .*\[1, 3, 8\]\] in"):
        stage.get_fwd_send_ops(1)


@SCHEDULES
def test_validation_keeps_no_logits(kind: type[Schedule1F1B | ScheduleGPipe]) -> None:
    """PyTorch kept those of all micro-batches, through the training until the next validation."""
    batch, labels, losses = torch.ones(4, 8), torch.zeros(4), []
    with fake_world(1, 0), torch.no_grad():
        whole = torch.nn.Linear(8, 16)
        stage = Stage(whole, 0, 1, batch.device, group=dist.group.WORLD)
        schedule = kind(stage, 2, loss_fn=lambda outputs, labels: outputs.pop().sum())
        schedule.eval(batch, target=labels, losses=losses, return_outputs=False)
        assert not stage.fwd_cache
        torch.testing.assert_close(sum(losses), whole(batch).sum())


@SCHEDULES
def test_logits_do_not_wait_for_backward_passes(kind: type[Schedule1F1B | ScheduleGPipe]) -> None:
    """PyTorch held those of all micro-batches before the first."""
    logits, alive = [], []

    def loss_fn(outputs: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        logits.append(weakref.ref(outputs[0]))
        loss = outputs.pop().sum()
        loss.register_hook(lambda grad: alive.append(sum(ref() is not None for ref in logits)))
        return loss

    part = torch.nn.Linear(8, 16)
    with fake_world(1, 0):
        stage = Stage(part, 0, 1, torch.device("cpu"), group=dist.group.WORLD)
        schedule = kind(stage, 4, loss_fn=loss_fn, scale_grads=False)
        schedule.step(torch.ones(4, 8), target=torch.zeros(4), return_outputs=False)
    assert alive == [0, 0, 0, 0]
    assert torch.equal(part.weight.grad, torch.full((16, 8), 4.0))


class NoMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, now):
        return fail_with_no_memory() if now else x.clone()

    @staticmethod
    def backward(ctx, grad):
        fail_with_no_memory()


def fail_with_no_memory():
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("forward", [True, False])
def test_errors_of_a_stage_are_raised_as_they_are(forward: bool) -> None:
    """PyTorch put them into others, to which `add_memory_advice` and `compiled_pass` were blind."""

    class Part(torch.nn.Linear):
        def forward(self, x):
            return NoMemory.apply(super().forward(x), forward) if self.training else x

    with fake_world(1, 0):
        stage = Stage(Part(8, 8), 0, 1, torch.device("cpu"), group=dist.group.WORLD)
        schedule = Schedule1F1B(stage, 2, loss_fn=lambda outputs, labels: outputs.pop().sum())
        with pytest.raises(torch.OutOfMemoryError) as raised:
            schedule.step(torch.ones(4, 8), target=torch.zeros(4), return_outputs=False)
    assert str(raised.value) == "out of memory"
    assert raised.value.__suppress_context__ and raised.value.__cause__ is None


@pytest.mark.skipif(not hasattr(pipelining, "TensorMeta"), reason="torch 2.11 hands on zeros")
def test_shapes_are_inferred_with_zeros() -> None:
    """Uninitialised memory in place of token ids was beyond the embeddings, now and then."""
    stage = object.__new__(Stage)
    stage.device = torch.device("cpu")
    ids, hidden = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, requires_grad=True)
    metas = pipelining.extract_tensor_metas((ids, hidden))
    torch.use_deterministic_algorithms(True)  # fills new memory with large numbers
    try:
        made = [stage._to_tensor(meta) for meta in metas]
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(tensor.any() for tensor in made)
    assert [t.dtype for t in made] == [ids.dtype, hidden.dtype] and made[1].requires_grad
    assert stage._to_tensor(ids).all()


def test_a_stage_returns_tensors() -> None:
    """PyTorch's own error named neither the stage nor forward()."""
    hidden = torch.zeros(1)
    for fine in (hidden, (hidden, hidden), [hidden]):
        _refuse_all_but_tensors(1, JobConfig(), torch.nn.Module(), (), fine)
    for other, name in (({"h": hidden}, "dict"), ((hidden, None), "NoneType")):
        with pytest.raises(ConfigError, match=rf"pipeline stage 1 returns {name}\. A stage"):
            _refuse_all_but_tensors(1, JobConfig(), torch.nn.Module(), (), other)
