"""The address at which other hosts reach this one, where its own name has a loopback address.

Many hosts have such a line in /etc/hosts: the installers of Debian and Ubuntu write `127.0.1.1` and
the host's name.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from contextlib import suppress

import torch.distributed as dist

from torchtitan.runtime.world import local_world_size, world_size

_INTERFACE = "GLOO_SOCKET_IFNAME"
_KEY = "torchtitan/address_of_another_host"
_SIOCGIFADDR = 0x8915  # netdevice(7)


def own_name_is_loopback() -> bool:
    """Return whether this host knows itself by an address that means another host to others."""
    with suppress(OSError):
        return _is_loopback(str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0]))
    return True  # gloo then takes such an address


def own_address_towards(host: str) -> str:
    """Return this host's IPv4 address in packets to another one; "" for this host itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, suppress(OSError):
        udp.connect((host, 1))  # sends nothing
        address = str(udp.getsockname()[0])
        return "" if _is_loopback(address) else address
    return ""


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def listen_for_other_hosts(store: dist.Store) -> None:
    """Let gloo listen where other hosts reach it, unless the user has set GLOO_SOCKET_IFNAME.

    It would listen at the address of the host's own name. All ranks of a torchrun call this.
    """
    if world_size() == local_world_size() or _INTERFACE in os.environ:
        return
    is_first = os.environ.get("GROUP_RANK") == "0"  # MASTER_ADDR, by a name that may be its own
    own = "" if is_first else own_address_towards(os.environ["MASTER_ADDR"])
    if not is_first:
        store.set(_KEY, own)
    if not own_name_is_loopback():
        return
    if is_first:
        own = own_address_towards(store.get(_KEY).decode())
    if name := _interface_at(own):
        os.environ[_INTERFACE] = name


def _interface_at(address: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no IPv4 address
                found = fcntl.ioctl(udp, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
