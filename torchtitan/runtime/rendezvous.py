"""Let many hosts meet: wait for the first one, and give way to each other."""

from __future__ import annotations

import random
import socket
import sys
import time
from typing import Any

from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, Token
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import parse_args

from torchtitan.runtime.own_address import own_address_towards, own_name_is_loopback

_PORT = 29400
"""Default port of torch's c10d rendezvous, if `--rdzv-endpoint` has none."""
_PAUSE = 1.0
_FIRST_BACKOFF = 0.4
"""Seconds within which a host that has lost a race tries again, the first time."""
_SECONDS_PER_HOST = 0.02
"""The same, at most, for each host. With 1,250 hosts a change of the state takes a host 10 ms."""
_HOSTS_PER_READ = 250
"""Hosts that may read the state once a second."""


def wait_for_first_host(argv: list[str]) -> None:
    """Wait until the host at `--rdzv-endpoint` listens, at most `join_timeout` seconds.

    That host may still wait for its image, or its name may have no address yet. torch itself tries
    for a minute, and still does so after this function returns, whatever the outcome. Only hosts
    with `is_host=0` wait, and only if `join_timeout` is given.
    """
    options = parse_args(argv)
    settings = dict(pair.partition("=")[::2] for pair in options.rdzv_conf.split(","))
    seconds = settings.get("join_timeout", "")
    if options.rdzv_backend != "c10d" or settings.get("is_host") != "0" or not seconds.isdigit():
        return
    address = parse_rendezvous_endpoint(options.rdzv_endpoint, _PORT)
    end = time.monotonic() + int(seconds)
    said = False
    while time.monotonic() < end:
        try:
            socket.create_connection(address, timeout=10).close()
            return
        except OSError as error:  # also if the name does not resolve yet
            if not said:
                sys.stderr.write(
                    f"waiting for the first host at {options.rdzv_endpoint}: {error}\n"
                )
                said = True
        time.sleep(_PAUSE)


def own_address_option(argv: list[str]) -> list[str]:
    """Return a `--local-addr` of torchrun for a host whose own name has a loopback address.

    Otherwise torch takes this name, and if it is `localhost` and this host comes first in the order
    of names, all hosts look for the ranks' store on themselves. Call `wait_for_first_host` before.
    """
    options = parse_args(argv)
    if options.rdzv_backend != "c10d" or options.local_addr or not own_name_is_loopback():
        return []
    head, _ = parse_rendezvous_endpoint(options.rdzv_endpoint, _PORT)
    address = own_address_towards(head)
    return ["--local-addr", address] if address else []


def spare_the_store(handler: Any) -> None:
    """Make many hosts meet through torch's c10d rendezvous without overloading its store.

    All hosts share one state, 147 kB for 1,250 of them, and a host replaces it to join or to leave.
    It then fails if another one was first, and tries again at once, as all others do: each success
    costs as many attempts as there are hosts. For 1,250 of them to leave and to join again, as
    after a crash, the store would move 600 GB. So here a loser waits. Hosts also read the state
    less often than once a second.
    """
    holder = getattr(handler, "_state_holder", None)
    if holder is None:  # another kind of rendezvous
        return
    hosts = handler.settings.max_nodes
    holder._backend = PatientBackend(holder._backend, hosts)
    holder._cache_duration = max(holder._cache_duration, hosts / _HOSTS_PER_READ)


class PatientBackend(RendezvousBackend):
    """A backend whose callers, if another host was first, wait before they try again.

    They wait for a random time, up to a limit that doubles each time.
    """

    def __init__(self, backend: RendezvousBackend, hosts: int) -> None:
        self._backend = backend
        self._longest = _SECONDS_PER_HOST * hosts
        self._limit = _FIRST_BACKOFF

    @property
    def name(self) -> str:
        return self._backend.name

    def get_state(self) -> tuple[bytes, Token] | None:
        return self._backend.get_state()

    def set_state(
        self, state: bytes, token: Token | None = None
    ) -> tuple[bytes, Token, bool] | None:
        """Return the state, its token, and whether it is `state`. If not, wait first."""
        answer = self._backend.set_state(state, token)
        if answer is None or answer[2]:
            self._limit = _FIRST_BACKOFF
            return answer
        time.sleep(random.uniform(0, min(self._limit, self._longest)))
        self._limit *= 2
        now = self.get_state()  # others have gone on meanwhile
        return answer if now is None else (*now, False)
