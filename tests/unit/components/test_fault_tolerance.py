from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from torchtitan.components import fault_tolerance
from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError, OutageError


def test_buckets_hold_all_gradients_in_order_of_one_dtype_each(monkeypatch):
    monkeypatch.setattr(fault_tolerance, "_BUCKET_BYTES", 40)
    grads = [torch.ones(4), torch.ones(5), torch.ones(1), torch.ones(3).bfloat16(), torch.ones(99)]
    buckets = list(fault_tolerance._buckets(grads))
    assert [[len(grad) for grad in bucket] for bucket in buckets] == [[4, 5, 1], [3], [99]]
    assert list(fault_tolerance._buckets([])) == []
    small = [torch.ones(1), torch.ones(1).bfloat16(), torch.ones(1)]
    assert list(fault_tolerance._buckets(small)) == [[grad] for grad in small]


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
    replicas._manager = SimpleNamespace(num_participants=lambda: 0)  # before the first meeting
    assert replicas.present(4096) == 4096


def test_groups_have_the_data_ranks_of_the_whole_run_in_turn():
    config = JobConfig()
    assert fault_tolerance.Replicas(config).data_share(1, 2) == (1, 2)
    config.fault_tolerance.enable, config.fault_tolerance.group_size = True, 3
    shares = []
    for config.fault_tolerance.replica_id in range(3):
        replicas = fault_tolerance.Replicas(config)
        shares += [replicas.data_share(rank, 2) for rank in range(2)]
    assert shares == [(rank, 6) for rank in range(6)]


def test_gradients_are_summed_in_place_and_numbers_in_a_copy(monkeypatch):
    monkeypatch.setattr(fault_tolerance, "_BUCKET_BYTES", 40)

    def allreduce(tensor, reduce_op):
        tensor.mul_(3 if reduce_op == dist.ReduceOp.SUM else 0)
        return SimpleNamespace(wait=lambda: None)

    replicas = fault_tolerance.Replicas(JobConfig())
    params = [torch.zeros(2, 3), torch.zeros(()), torch.zeros(4, 5).bfloat16(), torch.zeros(9)]
    number = torch.tensor(2)
    for replicas._manager, times in (None, 1), (SimpleNamespace(allreduce=allreduce), 3):
        for param in params[:3]:
            param.grad = torch.arange(param.numel(), dtype=param.dtype).view_as(param)
        params[0].grad = params[0].grad.t().contiguous().t()  # as some kernels lay it out
        before = [(param.grad, param.grad * times) for param in params[:3]]
        replicas.sum_gradients(params)
        for param, (grad, expected) in zip(params, before, strict=False):
            assert param.grad is grad and torch.equal(grad, expected)
        assert params[3].grad is None
        assert (replicas.sum(number), number) == (2 * times, 2)


def test_a_group_waits_for_others_with_its_progress(monkeypatch):
    monkeypatch.setattr(fault_tolerance, "_SECONDS_BETWEEN_QUORUMS", 0.0)
    config = JobConfig()
    config.fault_tolerance.group_size = config.fault_tolerance.min_replica_size = 2
    replicas = fault_tolerance.Replicas(config)
    present, told = iter([1, 1, 1, 2]), []
    replicas._manager = SimpleNamespace(
        load_state_dict=lambda state: told.append(state["step"]),
        start_quorum=lambda: told.append("quorum"),
        num_participants=lambda: next(present),
    )
    assert not replicas.agree(7)
    assert told == [7, "quorum", "quorum", "quorum"]


def waiting(num_participants, start_quorum=lambda: None):
    """Replica groups of at least two, which train in step."""
    config = JobConfig()
    config.fault_tolerance.group_size = config.fault_tolerance.min_replica_size = 2
    replicas = fault_tolerance.Replicas(config)
    replicas._manager = SimpleNamespace(
        start_quorum=start_quorum,
        num_participants=num_participants,
        allreduce=lambda tensor, reduce_op: SimpleNamespace(wait=lambda: None),
        errored=lambda: None,
    )
    return replicas


def test_a_group_that_waits_for_others_can_be_stopped(monkeypatch):
    monkeypatch.setattr(fault_tolerance, "_SECONDS_BETWEEN_QUORUMS", 0.0)
    monkeypatch.setattr(fault_tolerance, "sum_over_ranks", lambda stops: stops)
    stop = SimpleNamespace(received=False)
    assert not waiting(iter([1, 1, 1, 2, 2]).__next__).begin_step(stop)
    stop.received = True
    assert waiting(lambda: 1).begin_step(stop)
    assert not waiting(lambda: 2).begin_step(stop)  # that step is done first


def test_a_group_that_has_caught_up_is_not_behind_at_the_next_meeting():
    """Else what it learns from then on would never count."""
    takes_over, replicas = iter([True, False]), waiting(lambda: 2)

    def start_quorum():
        replicas._took_over |= next(takes_over)

    replicas._manager.start_quorum = start_quorum
    assert [replicas.agree(), replicas.agree()] == [True, False]


def test_a_lighthouse_that_does_not_answer_is_an_outage(monkeypatch):
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://here:1")

    def start_quorum():
        raise TimeoutError("Timeout expired")

    with pytest.raises(OutageError, match=r"within 600 s .* \(http://here:1\) is away"):
        waiting(lambda: 1, start_quorum).agree()


def start_together(*groups):
    """The message of each group at its first meeting with the others; "" if it may train."""
    sums, messages = [], []
    for group in groups:  # what each would send, by a sum that fails
        group._manager = manager(sums.append, error="a group left")
        group.refuse_others()
    for group in groups:
        group._manager = manager(lambda tensor: tensor.copy_(torch.stack(sums).sum(0)))
        try:
            group.refuse_others()
            messages.append("")
        except ConfigError as error:
            messages.append(str(error))
    return messages


def manager(allreduce, error=None):
    def reduce(tensor, reduce_op):
        allreduce(tensor)
        return SimpleNamespace(wait=lambda: None)

    return SimpleNamespace(allreduce=reduce, errored=lambda: error)


def test_groups_of_other_layouts_or_weights_are_refused():
    """Sums of other parts of the weights may have the same shapes."""

    def group(number, lr=1e-3, degree=1):
        config = JobConfig()
        config.fault_tolerance.replica_id = number
        config.optimizer.lr, config.parallelism.tensor_parallel_degree = lr, degree
        return fault_tolerance.Replicas(config)

    first, second, third = (group(number) for number in range(3))
    assert start_together(first, second, third) == ["", "", ""]
    keys = "parallelism.tensor_parallel_degree"
    assert start_together(first, second, group(2, degree=2)) == [
        "",
        "",
        f"replica-2 differs from another replica group in {keys}. Start all replica groups with "
        "the same options and number of processes",
    ]
    both = start_together(group(0), group(1, lr=2e-3, degree=2))
    assert all(f"in optimizer.lr, {keys}." in message for message in both)
