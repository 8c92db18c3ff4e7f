import errno
import os

import pytest

from torchtitan.components.run_folder import CONFIG_FILE, write_description
from torchtitan.config import load_config
from torchtitan.errors import TitanError


def test_a_full_disk_leaves_the_description_of_the_run(tmp_path, monkeypatch):
    config = load_config([f"--job.dump_folder={tmp_path}", "--training.steps=7"])
    write_description(config, 1)
    before = (tmp_path / CONFIG_FILE).read_text()

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    config.training.steps = 8
    with pytest.raises(TitanError, match=r"job\.dump_folder.*No space left"):
        write_description(config, 1)
    assert (tmp_path / CONFIG_FILE).read_text() == before
    assert "steps = 7" in before
