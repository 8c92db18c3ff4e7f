"""Wait for the host of the rendezvous, which may start later than the others."""

from __future__ import annotations

import socket
import sys
import time

from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import parse_args

_PORT = 29400
"""Default port of torch's c10d rendezvous, if `--rdzv-endpoint` has none."""
_PAUSE = 1.0


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
