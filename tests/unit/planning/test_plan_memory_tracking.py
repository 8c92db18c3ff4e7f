"""What is live at the peak, by number."""

from __future__ import annotations

import torch

from torchtitan.planning.memory import Memory, PeakMemory


def test_the_peak_and_what_was_live_then() -> None:
    memory = PeakMemory()
    with memory:
        kept = torch.ones(100)
        numbers = set(memory.live())
        gone = torch.ones(1000)
        del gone
        later = torch.ones(10)
    assert memory.peak == 4400 and memory.current == 440
    at_peak = memory.live_at_peak()
    assert sum(at_peak.values()) == 4400
    assert sum(size for number, size in at_peak.items() if number in numbers) == 400
    assert sum(memory.live().values()) == 440
    del kept, later


def test_a_reset_forgets_the_past_but_not_what_is_live() -> None:
    memory = PeakMemory()
    with memory:
        kept = torch.ones(100)
        torch.ones(1000)
        memory.reset_peak()
        more = torch.ones(50)
    assert memory.peak == 600
    assert sorted(memory.live_at_peak().values()) == [200, 400]
    del kept, more


def test_resized_storages_are_known() -> None:
    memory = PeakMemory()
    with memory:
        tensor, other = torch.ones(100), torch.ones(10)
        tensor.untyped_storage().resize_(0)
        assert memory.current == 40
        tensor.untyped_storage().resize_(400)
    assert memory.resized == {number for number, size in memory.live().items() if size == 400}
    del other


def test_memory_adds_up() -> None:
    both = Memory(parameters=1, activations=2) + Memory(parameters=3, temporary=4)
    assert both == Memory(parameters=4, activations=2, temporary=4) and both.total == 10
