"""Saves in the background hold the state of their step, whatever training does meanwhile."""

import threading
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from checkpoint_run import Run, TinyArgs, TinyModel, world_of_one  # noqa: F401
from harness import checkpoints_in
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import torchtitan.models  # noqa: F401  (fills the registry)
from torchtitan.components.checkpoint import background
from torchtitan.components.checkpoint.background import HostCopy, _pieces
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.train import Trainer


def test_a_copy_is_of_the_same_values_and_types():
    state = {
        "a": {"w": torch.randn(3, 4), "t": torch.randn(4, 3).t(), "n": torch.tensor(3)},
        "half": torch.randn(5).bfloat16(),
        "empty": torch.empty(0, 2),
    }
    plain = [1, "x", {"y": 2.0}]
    stager = HostCopy()
    copied = stager.stage(state | {"plain": plain}).result()
    of_plain = copied.pop("plain")
    assert of_plain == plain and of_plain is not plain
    torch.testing.assert_close(copied, state, rtol=0, atol=0)
    state["a"]["w"].zero_()
    assert copied["a"]["w"].any()
    stager.close()


def test_memory_is_kept_for_the_next_copy_if_it_fits():
    stager = HostCopy()
    state = {"w": torch.randn(8, 8), "other": torch.randn(3)}
    place = stager.stage(state).result()["w"].data_ptr()
    state["w"] += 1
    second = stager.stage(state).result()
    assert second["w"].data_ptr() == place
    torch.testing.assert_close(second, state, rtol=0, atol=0)
    for other in (torch.randn(4), torch.randn(3).bfloat16(), torch.randn(3).bfloat16()):
        changed = {"first": torch.randn(len(other))} | state | {"other": other}
        copied = stager.stage(changed).result()
        torch.testing.assert_close(copied, changed, rtol=0, atol=0)
        assert copied["w"].data_ptr() == place
    stager.close()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tensors count as those of a GPU; the sizes of memory that is pinned for them."""
    pinned: list[int] = []

    def pin(size: int) -> torch.Tensor:
        pinned.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(background, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(background, "_pin", pin)
    return pinned


def test_pinned_memory_holds_the_same_values_and_is_in_few_pieces(gpu: list[int]) -> None:
    weights = {f"w{n}": torch.randn(n + 1, 3) for n in range(40)}
    state = weights | {
        "t": torch.randn(4, 3).t(),
        "half": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(3),
        "flag": torch.tensor(True),
        "empty": torch.empty(0, 2),
        "part": torch.randn(6, 6)[::2, 1],
    }
    stager = HostCopy()
    copied = stager.stage(state).result()
    torch.testing.assert_close(copied, state, rtol=0, atol=0)
    assert copied["t"].stride() == state["t"].stride()
    for tensor in copied.values():  # or saving copies it
        assert tensor.untyped_storage().size() == tensor.nbytes
    places = sorted((t.data_ptr(), t.nbytes) for t in copied.values() if t.numel())
    assert all(a + size <= b for (a, size), (b, _) in pairwise(places))
    assert len(gpu) < 6 and all(size & (size - 1) == 0 for size in gpu)
    pieces = list(gpu)
    stager.stage(state).result()
    assert gpu == pieces
    stager.close()


@pytest.mark.parametrize("flavor", ["1B", "3B", "8B"])
def test_pinned_memory_is_not_rounded_up(flavor: str) -> None:
    """As it is for weights and moments of 3B, one by one: to 50.6 GiB instead of 35.9."""
    spec = get_train_spec("llama3", flavor)
    weights = spec.meta_model(spec.model_args).parameters()
    sizes = [weight.nbytes for weight in weights for _ in range(3)]
    pieces, places = _pieces(sizes)
    assert sum(pieces) < 1.02 * sum(sizes)
    assert len(pieces) < 12 and len(places) == len(sizes)
    assert all(piece & (piece - 1) == 0 for piece in pieces)


def test_the_template_of_a_dtensor_is_no_copy_of_its_values(world_of_one) -> None:  # noqa: F811
    """Of a meta tensor there are none to be copied."""
    mesh = init_device_mesh("cpu", (1,))
    stager = HostCopy()
    for how in (Shard(0), Replicate()):
        weight = DTensor.from_local(torch.empty(4, 3, device="meta"), mesh, [how])
        stager._make_room([weight])
        [host] = stager._host
        assert isinstance(host, DTensor) and host.device.type == "cpu"
        assert host.placements == weight.placements and host.to_local().shape == (4, 3)
    stager.close()


class CountingModel(TinyModel):
    """Has a buffer that each forward pass changes, as batch norm and routers do."""

    def __init__(self, args: TinyArgs) -> None:
        super().__init__(args)
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return super().forward(tokens)


@pytest.fixture
def slow_copies(monkeypatch):
    """Copies that begin only when they are told to, or after a while."""
    begin, copy = threading.Event(), HostCopy._copy

    def copy_late(self, *args):
        begin.wait(timeout=0.3)
        return copy(self, *args)

    monkeypatch.setattr(HostCopy, "_copy", copy_late)
    return begin


def test_the_optimizer_waits_for_the_copy_and_buffers_are_copied_before(tmp_path, slow_copies):
    expected = Run(tmp_path / "whole", enable=False, model=model()).train(5)
    run = Run(tmp_path, async_mode="async", model=model())
    assert run.train(5) == expected
    run.manager.close()
    resumed = Run(tmp_path, seed=1, load_step=2, model=model(seed=1))
    assert resumed.manager.load() == 2
    assert resumed.model.passes.item() == 2
    assert resumed.train(5) == expected[2:]


def test_what_changes_before_the_optimizer_is_copied_before(tmp_path, slow_copies):
    """As the state of the numerical guard does, in place."""
    run = Run(tmp_path, async_mode="async")
    history = torch.zeros(2)
    run.state.state_dict = lambda: {"step": run.state.step, "history": history}
    run.train(2)
    history += 1
    slow_copies.set()
    run.manager.close()
    loaded = Run(tmp_path)
    loaded.state.state_dict = lambda: {"step": 0, "history": torch.ones(2)}
    found = []
    loaded.state.load_state_dict = lambda state: found.append(state["history"].tolist())
    assert loaded.manager.load() == 2
    assert found == [[0.0, 0.0]]


def test_replica_groups_wait_for_the_copy(tmp_path, slow_copies):
    """Its own state, as large as the weights, is not copied before."""
    run = Run(tmp_path, async_mode="async")
    start = torch.zeros(2)
    other = SimpleNamespace(state_dict=lambda: {"weights": start}, load_state_dict=lambda _: None)
    run.manager._state._stateful["semi_sync"] = other
    run.train(2)
    weights = [run.model.output.weight.detach(), start]
    before = [weight.clone() for weight in weights]
    trainer = SimpleNamespace(checkpointer=run.manager, run_state=run.manager._state)
    Trainer._state_of_replicas(trainer)  # to take over that of another
    for weight in weights:
        weight.fill_(7.0)
    run.manager.close()
    loaded = Run(tmp_path, seed=1)
    loaded.manager._state._stateful["semi_sync"] = other
    assert loaded.manager.load() == 2
    assert torch.equal(loaded.model.output.weight, before[0]) and torch.equal(start, before[1])


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return CountingModel(TinyArgs())


def test_a_copy_that_fails_stops_training(tmp_path, monkeypatch):
    """As an error in the save itself would not: there is no state to write."""

    def fail(self, *args):
        raise RuntimeError("out of memory")

    run = Run(tmp_path, async_mode="async")
    run.train(2)
    run.manager.wait()
    monkeypatch.setattr(HostCopy, "_copy", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train(6)
    assert checkpoints_in(tmp_path / "checkpoint") == ["step-2"]
