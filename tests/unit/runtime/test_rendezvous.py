"""Hosts that are there before the one where all meet."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from torchtitan.runtime import rendezvous


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
