"""Hosts on one network, on this machine: each is a network namespace of Linux with its own name.

    with Hosts(3) as hosts:
        done = hosts[0].run(["ping", "-c1", hosts[1].name])
        server = hosts[1].start(["torchrun", ...])
        hosts[1].cut_off()

All of it is in namespaces that are made here, also the bridge between the hosts, so the machine's
own network is neither used nor seen. The hosts share its files and its process numbers.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

_NUMBERS = itertools.count()
_FILES = Path("/etc/netns")
"""`ip netns exec NAME` puts the files in `/etc/netns/NAME` in the place of those in `/etc`."""


def require_namespaces() -> None:
    """Skip the test where network namespaces cannot be made: it takes root, and `ip`."""
    missing = [tool for tool in ("ip", "unshare", "hostname") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no command {', '.join(missing)} (apt-get install iproute2)")
    try:
        with Hosts(1):
            pass
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted: {error.stderr.strip()}")


class Hosts:
    """`count` hosts on one network, `host0` at 10.77.0.1 and so on; they know each other by name.

    Args:
        names: of the hosts.
        own_line: what the /etc/hosts of a host says of its own name; default: as for the others.

    Leaving the `with` block kills whatever runs on them, and takes them away.
    """

    def __init__(self, count: int, names: str = "host{}", own_line: str = "") -> None:
        self._own_line = own_line
        # Of other test processes, and of other tests.
        prefix = f"titan{os.getpid()}-{next(_NUMBERS)}"
        self._bridge = f"{prefix}-bridge"
        self._hosts = [
            Host(names.format(i), f"10.77.0.{i + 1}", f"{prefix}-host{i}", self._bridge)
            for i in range(count)
        ]

    def __enter__(self) -> Hosts:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._remove()

    def __getitem__(self, number: int) -> Host:
        return self._hosts[number]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    def _build(self) -> None:
        _ip("netns", "add", self._bridge)
        _ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._bridge, "link", "set", "bridge", "up")
        table = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in self._hosts)]
        for host in self._hosts:
            folder = _FILES / host.namespace
            folder.mkdir(parents=True)
            own = f"{host.address} {host.name}"
            told = self._own_line.format(host.name) or own
            lines = [told if line == own else line for line in table]
            (folder / "hosts").write_text("\n".join(lines) + "\n")
            _ip("netns", "add", host.namespace)
            cable = ("link", "add", host.name, "type", "veth", "peer", "name", "eth0")
            _ip("-n", self._bridge, *cable, "netns", host.namespace)
            _ip("-n", self._bridge, "link", "set", host.name, "master", "bridge", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", interface, "up")

    def _remove(self) -> None:
        for host in self._hosts:
            with suppress(subprocess.CalledProcessError):
                host.kill()
            shutil.rmtree(_FILES / host.namespace, ignore_errors=True)
        for namespace in (*(host.namespace for host in self._hosts), self._bridge):
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", namespace)


class Host:
    """One of `Hosts`."""

    def __init__(self, name: str, address: str, namespace: str, bridge: str) -> None:
        self.name = name
        self.address = address
        self.namespace = namespace
        self._bridge = bridge

    def start(self, words: list[str], **options: Any) -> subprocess.Popen:
        """Start a command here. `options` are those of `subprocess.Popen`.

        Programs of the running Python environment (`torchrun`) are found first. The command gets
        a process group of its own, so that a signal to the tests does not reach it.
        """
        program = Path(sysconfig.get_path("scripts"), words[0])
        words = [str(program) if program.exists() else words[0], *words[1:]]
        # gloo finds its interface by the name of the host.
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh"]
        command = ["ip", "netns", "exec", self.namespace, *named, *words]
        return subprocess.Popen(command, **{"process_group": 0} | options)

    def run(self, words: list[str], timeout: float = 60, **options: Any) -> tuple[int, str]:
        """Run a command here. Returns its exit code, and its stdout and stderr as one text."""
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with self.start(words, **options) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        return process.returncode, output

    def pids(self) -> list[int]:
        """Of all processes that run here."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """Kill all processes here, as a power failure does. Returns when they are gone."""
        while pids := self.pids():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def cut_off(self) -> None:
        """Pull the cable: packets from and to this host vanish, and nobody is told."""
        _ip("-n", self._bridge, "link", "set", self.name, "down")

    def reconnect(self) -> None:
        _ip("-n", self._bridge, "link", "set", self.name, "up")


def _ip(*arguments: str) -> str:
    """The command `ip`. Raises `subprocess.CalledProcessError`, with its stderr."""
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout
