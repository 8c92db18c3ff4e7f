"""Hosts meet whose own names have loopback addresses, as on Debian, Ubuntu and others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from network_namespaces import Hosts, require_namespaces

from torchtitan.runtime.own_address import own_address_towards
from torchtitan.runtime.rendezvous import own_address_option

SUM = """
import os, torch, torch.distributed as dist
from torchtitan.runtime.process_group import init_distributed
init_distributed(timeout_seconds=30)
total = torch.ones(1)
dist.all_reduce(total)
print("sum", total.item(), os.environ["MASTER_ADDR"], os.environ["GLOO_SOCKET_IFNAME"], flush=True)
dist.barrier()
"""


def test_ranks_of_two_hosts_add_up(tmp_path: Path) -> None:
    require_namespaces()
    script = tmp_path / "add_up.py"
    script.write_text(SUM)
    # The second host's name for itself is `localhost`, which comes before that of the first.
    with Hosts(2, names="node{}", own_line="127.0.0.1 localhost {}") as hosts:
        head = hosts[0].name
        words = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=0", "--rdzv-backend=c10d"]
        words += [f"--rdzv-endpoint={head}:29500", "--rdzv-id=job"]
        starts = []
        for number, host in enumerate(hosts):
            own = [f"--rdzv-conf=is_host={int(number == 0)},join_timeout=60"]
            own += [f"--local-addr={head}"] if number == 0 else []
            starts.append(
                host.start(
                    [sys.executable, "-m", "torchtitan.runtime.torchrun", *words, *own, script],
                    env=os.environ
                    | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for start in starts:
            output, errors = start.communicate(timeout=100)
            assert output == "sum 2.0 10.77.0.2 eth0\n", errors


def test_a_host_has_no_address_towards_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtitan.runtime.rendezvous.own_name_is_loopback", lambda: True)
    for head in ("localhost", "127.0.0.1", "no.such.host.invalid"):
        assert own_address_towards(head) == ""
        assert own_address_option(["--rdzv-backend=c10d", f"--rdzv-endpoint={head}:1", "x"]) == []
