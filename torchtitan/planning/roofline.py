"""Estimates the time of operations and collectives on a device with a roofline.

A matrix product takes its FLOPs over the device's rate, any other operation its bytes over the
memory's rate, a collective its bytes over the link's rate. Of computing and overlapped
communication, the longer one counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from .collectives import DATA_PARALLEL, Collective
from .devices import Device
from .operations import ATTENTION, FLOAT8_PRODUCTS
from .records import PassTrace, StageTrace
from .schedule import StageCost

_FLOAT8, _ATTENTION = (
    tuple(f"aten::{name}" for name in names) for names in (FLOAT8_PRODUCTS, ATTENTION)
)
FUSED = 0.7
"""Remaining share of the bytes of element-wise operations when they are compiled together."""
FUSED_QUANTIZED = 0.25
"""The same for a model with 8-bit products: rounding takes many operations, which fuse into one or
two kernels."""

Groups = dict[str, list[int]]
"""Group name -> its ranks."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends to a group in a step."""

    group: str
    kind: str
    ranks: int
    link: str
    """`host` if the group is within one host, else `network`."""
    calls: float
    sent: float
    """Bytes."""
    seconds: float


class Roofline:
    """Computes durations on one kind of device."""

    def __init__(
        self, device: Device, host_size: int, compiled: bool, quantized: bool = False
    ) -> None:
        self._device = device
        self._host_size = host_size
        self._compiled = compiled
        self._fused = FUSED_QUANTIZED if quantized else FUSED

    def cost(self, stage: StageTrace, groups: Groups, pipeline: bool = True) -> StageCost:
        """Args: pipeline: whether the reduction of gradients waits for the last backward pass."""
        finish = stage.finish
        return StageCost(
            forward=self.seconds(stage.forward, groups),
            backward=self.seconds(stage.backward, groups),
            inputs=self.seconds(stage.inputs, groups),
            weights=self.seconds(stage.weights, groups),
            send=self.transfer("send", stage.hidden_out, groups.get("pp", [0]))
            if stage.hidden_out
            else 0,
            start=self._more(stage.forward, stage.start, groups),
            finish=self.seconds(finish, groups)
            if pipeline
            else self._more(stage.backward, finish, groups),
        )

    def _more(self, trace: PassTrace, more: PassTrace, groups: Groups) -> float:
        """Return the seconds that a pass takes longer with the collectives of another."""
        both = PassTrace(trace.operations, trace.collectives + more.collectives)
        return self.seconds(both, groups) - self.seconds(trace, groups)

    def seconds(self, trace: PassTrace, groups: Groups) -> float:
        """Return the time of a pass; overlapped communication counts if longer than computing."""
        waited, overlapped = self._communication(trace.collectives, groups)
        return max(sum(self.compute(trace)) + waited, overlapped)

    def seconds_of_optimizer(self, trace: PassTrace, groups: Groups) -> float:
        """Return the time of work that is not compiled with the model, and does not overlap."""
        return sum(self.compute(trace, eager=True)) + sum(
            self._communication(trace.collectives, groups)
        )

    def compute(self, trace: PassTrace, eager: bool = False) -> tuple[float, float]:
        """Return the seconds of matrix products, and of everything else.

        Args:
            eager: for work that is not compiled with the model, such as the optimizer.
        """
        device = self._device
        byte_rate = device.bandwidth * device.bandwidth_efficiency
        matrix = other = 0.0
        for operation, calls in trace.operations.items():
            if operation.flops:
                flops = device.float32_flops if operation.float32 else device.flops
                if operation.name in _FLOAT8:
                    flops = device.float8_flops
                efficiency = device.matmul_efficiency
                if operation.name.removesuffix("_backward") in _ATTENTION:
                    efficiency = device.attention_efficiency
                flops_rate = flops * efficiency
                seconds = max(operation.flops / flops_rate, operation.moved / byte_rate)
                matrix += calls * max(seconds, device.launch)
            else:
                compiled = self._compiled and not eager
                share = self._fused if compiled else 1.0
                launch = 0.0 if compiled else device.launch
                other += calls * max(share * operation.moved / byte_rate, launch)
        return matrix, other

    def _communication(
        self, collectives: Mapping[Collective, float], groups: Groups
    ) -> tuple[float, float]:
        """Return the seconds of collectives that are waited for, and of those that overlap."""
        waited = overlapped = 0.0
        for collective, calls in collectives.items():
            ranks = groups.get(collective.group, [0])
            seconds = calls * self.transfer(collective.kind, collective.sent, ranks)
            if collective.group in DATA_PARALLEL:
                overlapped += seconds
            else:
                waited += seconds
        return waited, overlapped

    def transfer(self, kind: str, sent: float, ranks: list[int]) -> float:
        """Return the seconds until a rank has sent this many bytes to its group.

        In a ring, few ranks of a host send to another host, so they share its network cards. A
        single rank that sends to another has only its own share. In an all-to-all, each rank sends
        to all others: at the same time within the host, and by its own share of the network.
        """
        device = self._device
        hosts: dict[int, int] = defaultdict(int)
        for rank in ranks:
            hosts[rank // self._host_size] += 1
        mates = min(hosts.values())
        if len(hosts) == 1:
            seconds = sent / device.link
        elif kind == "all_to_all":
            near = sent * (mates - 1) / (len(ranks) - 1)
            seconds = max(near / device.link, (sent - near) / device.network)
        elif kind == "send":
            seconds = sent / device.network
        else:
            seconds = sent / min(device.link, mates * device.network)
        hops = len(ranks) - mates if kind in ("all_gather", "reduce_scatter") else 0
        return device.latency + hops * device.hop + seconds / device.link_efficiency

    def link(self, ranks: list[int]) -> str:
        return "host" if len({rank // self._host_size for rank in ranks}) <= 1 else "network"

    def traffic(self, collectives: Mapping[Collective, float], groups: Groups) -> list[Traffic]:
        totals: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for collective, times in collectives.items():
            total = totals[collective.group, collective.kind, collective.ranks]
            ranks = groups.get(collective.group, [0])
            total[0] += times
            total[1] += times * collective.sent
            total[2] += times * self.transfer(collective.kind, collective.sent, ranks)
        return [
            Traffic(group, kind, ranks, self.link(groups.get(group, [0])), *total)
            for (group, kind, ranks), total in totals.items()
        ]
