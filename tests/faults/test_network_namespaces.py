"""The hosts that tests make: they reach each other, until one is cut off; nothing is left."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from network_namespaces import Hosts, require_namespaces


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    require_namespaces()


CONNECT = """
import socket, sys
print(socket.gethostname(), socket.gethostbyname(socket.gethostname()))
with socket.create_connection((sys.argv[1], 8000), timeout=2) as connection:
    print(connection.recv(100).decode())
"""
SERVE = """
import socket
server = socket.create_server(("", 8000))
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(b"hello from " + socket.gethostname().encode())
    connection.close()
"""


def test_hosts_have_names_and_reach_each_other_until_one_is_cut_off() -> None:
    with Hosts(2) as hosts:
        server = hosts[1].start(["python", "-c", SERVE], stdout=subprocess.PIPE)
        server.stdout.readline()
        ask = ["python", "-c", CONNECT, "host1"]
        code, output = hosts[0].run(ask)
        assert code == 0 and output == "host0 10.77.0.1\nhello from host1\n", output
        hosts[1].cut_off()
        code, output = hosts[0].run(ask)
        assert code != 0 and "TimeoutError" in output
        hosts[1].reconnect()
        assert hosts[0].run(ask)[0] == 0
        namespaces = [host.namespace for host in hosts]
    assert server.wait(timeout=1) != 0
    assert not any(Path("/run/netns", name).exists() for name in namespaces)
    assert not any(Path("/etc/netns", name).exists() for name in namespaces)
