"""Every file of a checkpoint, damaged at random places: all damage is found, nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from harness import read_lines
from kills import SAVED_EVERY, STEPS, Job, curve

from torchtitan.components.checkpoint.opened import OpenCheckpoint
from torchtitan.errors import DamagedCheckpointError

JOB = Job(2, "disabled")
TIMES = 12
"""That each file is damaged in each way."""


def flip_bit(file: Path, random: Random) -> None:
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, random: Random) -> None:
    with file.open("ab") as opened:
        opened.truncate(random.randrange(file.stat().st_size))


def fill_with_zeros(file: Path, random: Random) -> None:
    """What a file system may leave of a block that was not yet written."""
    content = bytearray(file.read_bytes())
    # From a byte that is not 0, else nothing changes.
    start = random.choice([i for i in range(0, len(content), 97) if content[i]])
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    file.write_bytes(content)


def swap(file: Path, random: Random) -> None:
    """Two neighbouring bytes that differ."""
    content = bytearray(file.read_bytes())
    while True:
        i = random.randrange(len(content) - 1)
        if content[i] != content[i + 1]:
            break
    content[i : i + 2] = content[i + 1], content[i]
    file.write_bytes(content)


def remove(file: Path, random: Random) -> None:
    file.unlink()


WAYS: list[Callable[[Path, Random], None]] = [flip_bit, truncate, fill_with_zeros, swap, remove]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    JOB.finish(folder)
    return folder


def test_every_damaged_file_is_found(run: Path, tmp_path: Path, figures: dict[str, object]) -> None:
    good = run / "checkpoint" / f"step-{STEPS}"
    copy = tmp_path / good.name
    shutil.copytree(good, copy)
    OpenCheckpoint.open(copy, None, verify=True)
    random, damaged, missed = Random(7), 0, []
    for name in sorted(path.name for path in good.iterdir()):
        for damage in WAYS:
            for _ in range(1 if damage is remove else TIMES):
                damage(copy / name, random)
                damaged += 1
                try:
                    OpenCheckpoint.open(copy, None, verify=True)
                except DamagedCheckpointError as error:
                    assert name in str(error) or name == "manifest.json"
                else:
                    missed.append(f"{name}: {damage.__name__}")
                shutil.copyfile(good / name, copy / name)
    figures["damaged files found"] = f"{damaged - len(missed)} of {damaged}"
    assert not missed


@pytest.mark.parametrize("damage", WAYS)
def test_a_run_goes_on_from_the_newest_good_checkpoint(
    damage: Callable[[Path, Random], None], run: Path, tmp_path: Path
) -> None:
    folder, random = tmp_path / "run", Random(damage.__name__)
    shutil.copytree(run, folder)
    files = sorted((folder / "checkpoint" / f"step-{STEPS}").iterdir())
    damage(random.choice(files), random)
    log = JOB.finish(folder).err
    assert f"resumed from {folder}/checkpoint/step-{STEPS - SAVED_EVERY}" in log
    assert curve(read_lines(folder / "metrics.jsonl")) == curve(read_lines(run / "metrics.jsonl"))
