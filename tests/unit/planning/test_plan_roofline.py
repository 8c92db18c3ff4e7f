"""Durations of operations and collectives on a device with round figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import register_flop_formula

from torchtitan.errors import ConfigError
from torchtitan.planning.collectives import Collective
from torchtitan.planning.devices import DEVICES, Device, get_device
from torchtitan.planning.operations import Operation, OperationRecorder
from torchtitan.planning.records import PassTrace, StageTrace
from torchtitan.planning.roofline import FUSED, FUSED_QUANTIZED, Roofline
from torchtitan.planning.schedule import StageCost

DEVICE = Device(
    "round",
    memory=1e9,
    flops=1e12,
    float8_flops=3e12,
    float32_flops=1e11,
    bandwidth=1e9,
    link=100e6,
    network=10e6,
    capability=(9, 0),
    matmul_efficiency=1.0,
    bandwidth_efficiency=1.0,
    link_efficiency=1.0,
    latency=0.0,
    hop=0.0,
    launch=0.0,
)
MATMUL = Operation("mm", flops=10**12, moved=10**6)  # 1 s
COPY = Operation("add", flops=0, moved=10**9)  # 1 s


def roofline(compiled: bool = False) -> Roofline:
    return Roofline(DEVICE, 8, compiled)


def test_operations_add_up() -> None:
    trace = PassTrace(Counter({MATMUL: 3, COPY: 2}))
    assert roofline().compute(trace) == pytest.approx((3.0, 2.0))
    assert roofline(compiled=True).compute(trace) == pytest.approx((3.0, 2.0 * FUSED))
    quantized = Roofline(DEVICE, 8, compiled=True, quantized=True)
    assert quantized.compute(trace) == pytest.approx((3.0, 2.0 * FUSED_QUANTIZED))


def test_rates_are_those_that_a_device_reaches() -> None:
    reached = {"matmul_efficiency": 0.5, "bandwidth_efficiency": 0.25, "link_efficiency": 0.2}
    slow = Roofline(replace(DEVICE, **reached, latency=3.0), 8, compiled=False)
    assert slow.compute(PassTrace(Counter({MATMUL: 1, COPY: 1}))) == pytest.approx((2.0, 4.0))
    sent = PassTrace(Counter(), Counter({Collective("send", "tp", 2, 100_000_000): 1}))
    assert slow.seconds(sent, {"tp": [0, 1]}) == pytest.approx(3.0 + 5.0)


def test_a_kernel_takes_at_least_its_launch() -> None:
    """Compiled, other operations are parts of few kernels."""
    trace = PassTrace(Counter({MATMUL: 3, COPY: 2}))
    for compiled, other in ((False, 10.0), (True, 2 * FUSED)):
        found = Roofline(replace(DEVICE, launch=5.0), 8, compiled).compute(trace)
        assert found == pytest.approx((15.0, other))


def test_the_optimizer_is_not_compiled_with_the_model() -> None:
    trace = PassTrace(Counter({MATMUL: 3, COPY: 2}))
    assert roofline(compiled=True).compute(trace, eager=True) == pytest.approx((3.0, 2.0))


@pytest.mark.parametrize("suffix", ["", "_backward"])
def test_attention_has_a_rate_of_its_own(suffix: str) -> None:
    name = f"aten::_scaled_dot_product_flash_attention_for_cpu{suffix}"
    attention = Operation(name, flops=10**12, moved=10**6)
    trace = PassTrace(Counter({attention: 3}))
    assert roofline().compute(trace)[0] == pytest.approx(3.0 / DEVICE.attention_efficiency)


@pytest.mark.parametrize("name", ["aten::_scaled_mm", "aten::_scaled_grouped_mm"])
def test_products_of_8_bits_have_a_rate_of_their_own(name: str) -> None:
    product = Operation(name, flops=10**12, moved=10**6)
    assert roofline().compute(PassTrace(Counter({product: 3})))[0] == pytest.approx(1.0)


def test_products_in_float32_take_the_time_of_float32() -> None:
    in_float32 = Operation("mm", flops=10**12, moved=10**6, float32=True)
    assert roofline().compute(PassTrace(Counter({in_float32: 3})))[0] == pytest.approx(30.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_recorded_with_their_dtype(dtype: torch.dtype) -> None:
    """The dtype of the factors decides, not that of the sum to which their product is added."""
    a, b, total = torch.zeros(8, 8, dtype=dtype), torch.zeros(8, 8, dtype=dtype), torch.zeros(8, 8)
    with FakeTensorMode(allow_non_fake_inputs=True), OperationRecorder() as recorder:
        total.addmm_(a, b)
    (operation,) = (o for o in recorder.operations if o.flops)
    assert operation.float32 == (dtype == torch.float32)


def test_grouped_products_are_counted_by_their_rows() -> None:
    """Of experts in the forward pass, and of their weights' gradients."""
    rows, experts = torch.zeros(48, 32).bfloat16(), torch.zeros(2, 32, 64).bfloat16()
    ends = torch.tensor([16, 48], dtype=torch.int32)
    with FakeTensorMode(allow_non_fake_inputs=True), OperationRecorder() as recorder:
        out = torch._grouped_mm(rows, experts, offs=ends)
        assert torch._grouped_mm(rows.t(), out, offs=ends).shape == experts.shape
        assert torch._grouped_mm(rows.view(2, 24, 32), experts).shape == (2, 24, 64)
    flops = [o.flops for o in recorder.operations.elements() if o.name == "aten::_grouped_mm"]
    assert flops == [2 * 48 * 32 * 64] * 3


def test_both_forms_of_a_product_in_float8_are_counted() -> None:
    whole = nn.functional.ScalingType.TensorWise
    with FakeTensorMode(allow_non_fake_inputs=True), OperationRecorder() as recorder:
        a = torch.zeros(32, 64).to(torch.float8_e4m3fn)
        b, scale = torch.zeros(48, 64).to(torch.float8_e4m3fn).t(), torch.ones(())
        torch._scaled_mm(a, b, scale, scale, out_dtype=torch.bfloat16)
        F.scaled_mm(a, b, scale, whole, scale, whole, output_dtype=torch.bfloat16)
    products = [operation for operation in recorder.operations if "scaled_mm" in operation.name]
    assert [operation.flops for operation in products] == [2 * 32 * 64 * 48] * 2
    for product in products:
        work = replace(product, flops=3 * 10**12, moved=0)
        assert roofline().compute(PassTrace(Counter({work: 1})))[0] == pytest.approx(1.0)


def test_products_of_integers_and_of_lists_are_counted() -> None:
    a, b = torch.zeros(32, 64), torch.zeros(64, 48)
    products = {"aten::_int_mm": lambda: torch._int_mm(a.to(torch.int8), b.to(torch.int8))}
    if hasattr(torch, "_foreach_mm"):  # since 2.13
        products["aten::_foreach_mm"] = lambda: torch._foreach_mm([a, a], [b, b])
    with FakeTensorMode(allow_non_fake_inputs=True), OperationRecorder() as recorder:
        for product in products.values():
            product()
    once = 2 * 32 * 64 * 48
    flops = {o.name: o.flops for o in recorder.operations if o.flops}
    assert flops == dict(zip(products, (once, 2 * once), strict=False))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_each_gradient_of_a_convolution_costs_what_its_forward_pass_does(groups: int) -> None:
    """Also of one that treats channels alone, as in state-space models."""
    x, weight = torch.zeros(2, 8, 100), nn.Parameter(torch.zeros(8, 8 // groups, 4))
    with FakeTensorMode(allow_non_fake_inputs=True), OperationRecorder() as recorder:
        out = F.conv1d(x.requires_grad_(), weight, groups=groups, padding=3)
        out.sum().backward()
    flops = {o.name: o.flops for o in recorder.operations if o.flops}
    forward = 2 * out.numel() * 8 // groups * 4
    assert flops == {"aten::convolution": forward, "aten::convolution_backward": 2 * forward}


def test_each_gradient_of_a_transposed_convolution_costs_what_its_forward_pass_does() -> None:
    x, weight = torch.zeros(2, 8, 100), nn.Parameter(torch.zeros(8, 4, 6))
    with FakeTensorMode(allow_non_fake_inputs=True), OperationRecorder() as recorder:
        F.conv_transpose1d(x.requires_grad_(), weight, stride=3, groups=2).sum().backward()
    flops = {o.name: o.flops for o in recorder.operations if o.flops}
    forward = 2 * x.numel() * 4 * 6
    assert flops == {"aten::convolution": forward, "aten::convolution_backward": 2 * forward}


def test_a_part_and_an_expanded_tensor_move_the_bytes_they_have() -> None:
    part, one = torch.zeros(64)[:8], torch.zeros(1).expand(8)
    with FakeTensorMode(allow_non_fake_inputs=True), OperationRecorder() as recorder:
        part + one
    assert [operation.moved for operation in recorder.operations] == [4 * (8 + 1 + 8)]


def test_kernels_of_other_libraries_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """By their own formula; without one, by their bytes, with a warning."""
    library = torch.library.Library("of_an_author", "DEF")
    for name in ("product", "unknown"):
        library.define(f"{name}(Tensor a, Tensor b) -> Tensor")
        library.impl(name, lambda a, b: a @ b, "CPU")
        torch.library.register_fake(f"of_an_author::{name}", lambda a, b: a @ b, lib=library)
    product, unknown = torch.ops.of_an_author.product, torch.ops.of_an_author.unknown
    register_flop_formula(product)(lambda a, b, **others: 2 * a[0] * a[1] * b[1])
    a, b = torch.zeros(8, 16), torch.zeros(16, 4)
    with FakeTensorMode(allow_non_fake_inputs=True), OperationRecorder() as recorder:
        product(a, b)
        unknown(a, b)
        unknown(a, b)
    moved = 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert recorder.operations == {
        Operation("of_an_author::product", 2 * 8 * 16 * 4, moved, float32=True): 1,
        Operation("of_an_author::unknown", 0, moved): 2,
    }
    (message,) = caplog.messages
    assert message.startswith("of_an_author::unknown has no formula of its FLOPs")


def test_a_thin_matrix_product_is_bound_by_memory() -> None:
    thin = Operation("mm", flops=10, moved=2 * 10**9)
    assert roofline().compute(PassTrace(Counter({thin: 1})))[0] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("group", "seconds"),
    [("fsdp", 3.0), ("expert_dp", 3.0), ("expert_dp_replicate", 3.0), ("tp", 5.0)],
)
def test_only_collectives_of_data_parallel_overlap(group: str, seconds: float) -> None:
    """2 s of sending beside 3 s of computing."""
    sent = Collective("send", group, 2, payload=200_000_000)
    trace = PassTrace(Counter({MATMUL: 3}), Counter({sent: 1}))
    assert roofline().seconds(trace, {group: [0, 1]}) == pytest.approx(seconds)


def test_waiting_leaves_time_for_what_overlaps() -> None:
    """3 s of computing and 2 s of waiting, beside 4 s."""
    waited, overlapped = (Collective("send", g, 2, 200_000_000) for g in ("tp", "fsdp"))
    trace = PassTrace(Counter({MATMUL: 3}), Counter({waited: 1, overlapped: 2}))
    assert roofline().seconds(trace, {"tp": [0, 1], "fsdp": [0, 1]}) == pytest.approx(5.0)


def test_nothing_overlaps_with_the_optimizer() -> None:
    """3 s of computing, and 2 s of each group."""
    sent = [Collective("all_to_all", g, 2, 0, to_others=200_000_000) for g in ("tp", "fsdp")]
    trace = PassTrace(Counter({MATMUL: 3}), Counter(sent))
    groups = {"tp": [0, 1], "fsdp": [0, 1]}
    assert roofline().seconds_of_optimizer(trace, groups) == pytest.approx(3 + 2 + 2)


def test_overlapped_communication_shows_where_it_is_longer() -> None:
    sent = Collective("send", "fsdp", 2, payload=200_000_000)
    trace = PassTrace(Counter({MATMUL: 3}), Counter({sent: 4}))
    assert roofline().seconds(trace, {"fsdp": [0, 1]}) == pytest.approx(8.0)


@pytest.mark.parametrize(("pipeline", "seconds"), [(False, 1.0), (True, 4.0)])
def test_gradients_postponed_to_the_last_micro_batch_overlap_with_it(
    pipeline: bool, seconds: float
) -> None:
    """4 s of sending beside a backward pass of 3 s; a pipeline reduces them after it."""
    sent = Collective("all_reduce", "dp_replicate", 2, payload=400_000_000)
    stage = StageTrace(backward=PassTrace(Counter({MATMUL: 3})))
    stage.finish = PassTrace(Counter(), Counter({sent: 1}))
    cost = roofline().cost(stage, {"dp_replicate": [0, 1]}, pipeline)
    assert (cost.backward, cost.finish) == pytest.approx((3.0, seconds))


def test_the_cost_of_each_part_of_a_stage() -> None:
    def products(count: int) -> PassTrace:
        return PassTrace(Counter({MATMUL: count}))

    gathered = PassTrace(Counter(), Counter({Collective("send", "fsdp", 2, 200_000_000): 1}))
    parts = {name: products(n) for n, name in enumerate(("backward", "inputs", "weights"), 2)}
    stage = StageTrace(
        forward=PassTrace(Counter({MATMUL: 3}), gathered.collectives),
        **parts,
        hidden_in=2e8,
        hidden_out=1e8,
        start=gathered,
        finish=gathered,
    )
    found = roofline().cost(stage, {"fsdp": [0, 1], "pp": [0, 2]})
    # Parameters come in 2 s beside a forward pass of 3 s, and in 4 s if some are gathered first.
    assert found == StageCost(3.0, 2.0, 3.0, 4.0, send=1.0, start=1.0, finish=2.0)


LINKS = {
    "within a host": ([0, 1, 2, 3], "host", 1.0),
    "one rank a host": ([0, 8, 16, 24], "network", 10.0),
    # Two ranks of a host in the ring have two network cards.
    "two ranks a host": ([0, 4, 8, 12], "network", 5.0),
    "whole hosts": (list(range(16)), "network", 1.25),
    # The host with one rank has one.
    "unequal hosts": ([6, 7, 8], "network", 10.0),
}


@pytest.mark.parametrize("name", LINKS)
def test_the_link_of_a_group(name: str) -> None:
    ranks, link, seconds = LINKS[name]
    share = len(ranks) / (len(ranks) - 1)
    sent = Collective("all_gather", "g", len(ranks), payload=round(share * 100_000_000))
    (traffic,) = roofline().traffic({sent: 1}, {"g": ranks})
    assert (traffic.link, traffic.seconds) == (link, pytest.approx(seconds))
    assert traffic.sent == pytest.approx(100_000_000)


def test_a_ring_over_large_hosts_is_no_faster_than_within_one() -> None:
    """Their network cards together are faster than the link from rank to rank."""
    sent = Collective("broadcast", "g", 32, payload=100_000_000)
    (traffic,) = Roofline(DEVICE, 16, compiled=False).traffic({sent: 1}, {"g": list(range(32))})
    assert traffic.seconds == pytest.approx(1.0)


def test_one_rank_sends_to_another_by_its_own_network_card() -> None:
    sent = Collective("send", "g", 16, payload=100_000_000)
    for ranks, seconds in ((list(range(16)), 10.0), (list(range(8)), 1.0)):
        (traffic,) = roofline().traffic({sent: 1}, {"g": ranks})
        assert traffic.seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("kind", "hops"),
    [("all_gather", 1016), ("reduce_scatter", 1016), ("all_reduce", 0), ("send", 0)],
)
def test_a_ring_over_hosts_is_as_slow_as_it_is_long(kind: str, hops: int) -> None:
    far = Roofline(replace(DEVICE, hop=1.0), 8, compiled=False)
    empty = Collective(kind, "g", 1024, payload=0)
    for ranks, seconds in ((list(range(1024)), hops), (list(range(8)), 0)):
        (traffic,) = far.traffic({empty: 1}, {"g": ranks})
        assert traffic.seconds == seconds


ALL_TO_ALL = {
    # 3 of 4 shares are sent, each rank at its own link's rate.
    "within a host": ([0, 1, 2, 3], 0.75),
    # Of 16 shares a rank sends 8 to the other host, by its own part of the network cards.
    "whole hosts": (list(range(16)), 5.0),
    "one rank a host": ([0, 8, 16, 24], 7.5),
}


@pytest.mark.parametrize("name", ALL_TO_ALL)
def test_ranks_of_an_all_to_all_do_not_share_their_network_cards(name: str) -> None:
    ranks, seconds = ALL_TO_ALL[name]
    sent = Collective("all_to_all", "ep", len(ranks), payload=100_000_000)
    trace = PassTrace(Counter(), Counter({sent: 1}))
    assert roofline().seconds(trace, {"ep": ranks}) == pytest.approx(seconds)
    (traffic,) = roofline().traffic({sent: 1}, {"ep": ranks})
    assert traffic.seconds == pytest.approx(seconds)


def test_a_ring_sends_its_share() -> None:
    sizes = {"all_gather": 75, "reduce_scatter": 75, "all_reduce": 150, "send": 100}
    sizes |= {"all_to_all": 75, "broadcast": 100}
    for kind, sent in sizes.items():
        assert Collective(kind, "g", 4, payload=100).sent == sent


def test_devices() -> None:
    assert get_device("h100") is DEVICES["h100"]
    with pytest.raises(ConfigError, match=r"--device h10.*Did you mean 'h100'\?"):
        get_device("h10")
