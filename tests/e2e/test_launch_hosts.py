"""The script of `torchtitan launch --ssh` on two hosts, which are network namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import read_lines, train
from network_namespaces import Hosts, require_namespaces

from torchtitan.launching.command import main
from torchtitan.runtime.stop_request import PREEMPTED

JOB = """\
[job]
dump_folder = "{folder}"

[model]
flavor = "debugmodel"

[training]
seq_len = 64
local_batch_size = 2
global_batch_size = 4
steps = {steps}

[metrics]
log_freq = 1
"""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    require_namespaces()
    with Hosts(2) as hosts:
        yield hosts


def script(hosts: Hosts, folder: Path, steps: int, *options: str) -> Path:
    """The rendered script; a stand-in for ssh goes to a host by its namespace."""
    folder.mkdir()
    ssh = folder / "ssh"
    cases = "".join(f"{host.name}) namespace={host.namespace};;\n" for host in hosts)
    ssh.write_text(
        f"#!/bin/sh\nhost=$1; shift\ncase $host in\n{cases}esac\n"
        'exec ip netns exec "$namespace" unshare --uts '
        'sh -c \'hostname $0; exec "$@"\' "$host" "$@"\n'
    )
    ssh.chmod(0o755)
    job = folder / "job.toml"
    job.write_text(JOB.format(folder=folder, steps=steps))
    out = folder / "launch.sh"
    names = ",".join(host.name for host in hosts)
    words = ["--ssh", str(job), "--hosts", names, "--ssh-command", str(ssh), "--out", str(out)]
    words += ["--gpus-per-node=0", "--processes-per-node=1", f"--python={sys.executable}"]
    words += [f"--env=PYTHONPATH={os.pathsep.join(sys.path)}", "--env=OMP_NUM_THREADS=1"]
    words += ["--env=CUDA_VISIBLE_DEVICES="]
    assert main([*words, "--dry-run", *options]) == 0
    return out


def test_two_hosts_have_the_losses_of_one(hosts: Hosts, tmp_path: Path, capfd) -> None:
    path = script(hosts, tmp_path / "two", 3)
    done = subprocess.run(
        ["bash", path], cwd=path.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[host0] " in done.stdout and "on 2 ranks" in done.stdout
    two = read_lines(tmp_path / "two" / "metrics.jsonl")
    (tmp_path / "job.toml").write_text(JOB.format(folder="", steps=3))
    one = train(tmp_path / "one", "--job.config_file", str(tmp_path / "job.toml"), ranks=2)
    assert [line["loss"] for line in two] == [line["loss"] for line in one]


@pytest.mark.long
def test_a_signal_saves_on_all_hosts(hosts: Hosts, tmp_path: Path, capfd) -> None:
    folder = tmp_path / "stopped"
    path = script(hosts, folder, 10_000, "--", "--checkpoint.enable")
    with subprocess.Popen(
        ["bash", path], cwd=path.parent, stdout=subprocess.PIPE, text=True
    ) as process:
        _wait_for_a_step(folder, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, output
    steps = len(read_lines(folder / "metrics.jsonl"))
    assert (folder / "checkpoint" / f"step-{steps}").is_dir(), output
    assert not any(host.pids() for host in hosts)


@pytest.mark.long
def test_a_host_that_fails_ends_the_job(hosts: Hosts, tmp_path: Path, capfd) -> None:
    path = script(hosts, tmp_path / "failed", 10_000, "--max-restarts=0")
    with subprocess.Popen(
        ["bash", path], cwd=path.parent, stdout=subprocess.PIPE, text=True
    ) as process:
        _wait_for_a_step(tmp_path / "failed", process)
        hosts[1].kill()
        output, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, 2, 75), output
    assert not any(host.pids() for host in hosts)


def _wait_for_a_step(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").is_file() or not (folder / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
