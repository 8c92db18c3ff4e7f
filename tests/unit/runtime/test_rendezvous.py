"""Hosts that are there before the one where all meet, and hosts that come at once."""

from __future__ import annotations

import socket
import threading
import time
from unittest.mock import Mock

import pytest
from torch.distributed import HashStore
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousBackend,
    Token,
)

from torchtitan.runtime import rendezvous, torchrun


def wait(port: int, conf: str) -> None:
    words = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", f"--rdzv-conf={conf}"]
    rendezvous.wait_for_first_host([*words, "rank.py"])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_PAUSE", 0.05)


def test_it_waits_until_the_first_host_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        timer = threading.Timer(0.5, server.listen)
        timer.start()
        begin = time.monotonic()
        wait(server.getsockname()[1], "is_host=0,join_timeout=60")
        assert 0.4 < time.monotonic() - begin < 30
        timer.join()
    assert capsys.readouterr().err.count("waiting for the first host") == 1


def test_it_waits_no_longer_than_it_may() -> None:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        begin = time.monotonic()
        wait(server.getsockname()[1], "is_host=0,join_timeout=1")
        assert 0.9 < time.monotonic() - begin < 30


@pytest.mark.parametrize("conf", ["is_host=1,join_timeout=60", "is_host=0", ""])
def test_the_first_host_itself_does_not_wait(conf: str) -> None:
    begin = time.monotonic()
    wait(1, conf)
    assert time.monotonic() - begin < 10


def test_a_name_without_an_address_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(*_: object, **__: object) -> socket.socket:
        asked.append(1)
        if len(asked) < 3:
            raise socket.gaierror("Name or service not known")
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", resolve)
    wait(1, "is_host=0,join_timeout=60")
    assert len(asked) == 3


class Shared(RendezvousBackend):
    """The state of all hosts. A version is its token."""

    name = "shared"

    def __init__(self) -> None:
        self.state, self.version = b"", 0

    def get_state(self) -> tuple[bytes, Token] | None:
        return (self.state, self.version) if self.version else None

    def set_state(
        self, state: bytes, token: Token | None = None
    ) -> tuple[bytes, Token, bool] | None:
        won = (token or 0) == self.version
        if won:
            self.state, self.version = state, self.version + 1
        return self.state, self.version, won


def handler(shared: Shared, hosts: int) -> DynamicRendezvousHandler:
    made = DynamicRendezvousHandler.from_backend("test", HashStore(), shared, hosts, hosts)
    rendezvous.spare_the_store(made)
    return made


def test_a_host_that_others_were_faster_than_waits_longer_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared, waits, limits = Shared(), [], []
    own, other = (handler(shared, 100)._state_holder for _ in range(2))
    other._cache_duration = 0

    def join(holder: object, node: str) -> bool | None:
        holder.state.wait_list.add(node)
        holder.mark_dirty()
        return holder.sync()

    def draw(least: float, limit: float) -> float:
        limits.append(limit)
        return least + limit / 2

    def pause(seconds: float) -> None:
        waits.append(seconds)
        assert join(other, f"other-{len(waits)}")

    monkeypatch.setattr("random.uniform", draw)
    monkeypatch.setattr(time, "sleep", pause)
    assert join(other, "other-0")
    assert join(own, "own") is False
    # What came while it waited is there, so that its next attempt need not fail.
    assert own.state.wait_list == {"other-0", "other-1"}
    assert join(own, "own")
    for number in range(4):
        other.sync()
        assert join(other, f"faster-{number}")
        assert join(own, "own") is False
    assert limits == [0.4, 0.4, 0.8, 1.6, 2.0]
    assert waits == [limit / 2 for limit in limits]


def test_a_thousand_hosts_read_the_state_less_often_than_a_few() -> None:
    durations = [handler(Shared(), n)._state_holder._cache_duration for n in (4, 1250)]
    assert durations == [1, 5]


def test_the_agent_of_each_host_spares_the_store() -> None:
    made = DynamicRendezvousHandler.from_backend("test", HashStore(), Shared(), 2, 2)
    spec = WorkerSpec(role="", local_world_size=1, rdzv_handler=made, entrypoint="true")
    torchrun._Agent(Mock(), spec=spec, logs_specs=DefaultLogsSpecs())
    assert isinstance(made._state_holder._backend, rendezvous.PatientBackend)
