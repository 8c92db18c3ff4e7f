from types import SimpleNamespace

import torch

from torchtitan.components import fault_tolerance
from torchtitan.config import JobConfig


def test_buckets_hold_all_gradients_in_order_of_one_dtype_each(monkeypatch):
    monkeypatch.setattr(fault_tolerance, "_BUCKET_BYTES", 40)
    grads = [torch.ones(4), torch.ones(5), torch.ones(1), torch.ones(3).bfloat16(), torch.ones(99)]
    buckets = list(fault_tolerance._buckets(grads))
    assert [[len(grad) for grad in bucket] for bucket in buckets] == [[4, 5, 1], [3], [99]]
    assert list(fault_tolerance._buckets([])) == []


def test_a_state_is_taken_over_in_place():
    own = {"a": torch.zeros(2), "b": {"step": 1, "text": "x"}}
    taken = fault_tolerance._take_over(own, {"b": {"text": "y", "step": 7}, "a": torch.ones(2)})
    assert taken["a"] is own["a"] and own["a"].tolist() == [1, 1]
    assert taken["b"] == {"step": 7, "text": "y"}


def test_groups_that_are_missing_have_no_tokens():
    config = JobConfig()
    replicas = fault_tolerance.Replicas(config)
    assert replicas.present(4096) == 4096
    config.fault_tolerance.group_size = 4
    replicas._manager = SimpleNamespace(num_participants=lambda: 3)
    assert replicas.present(4096) == 3072
