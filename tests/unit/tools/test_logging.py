"""Who logs what, and in which form."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from torchtitan.tools.logging import init_logger

logger = logging.getLogger("torchtitan")


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


def log_three_levels() -> None:
    logger.debug("detail")
    logger.info("news")
    logger.warning("trouble")


def test_rank_0_logs_info_with_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    init_logger(rank=0)
    log_three_levels()
    news, trouble = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d news", news)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d WARNING trouble", trouble)


def test_other_ranks_log_only_warnings_under_their_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    init_logger(rank=3)
    log_three_levels()
    (trouble,) = capsys.readouterr().err.splitlines()
    assert trouble.endswith(" [rank 3] WARNING trouble")


def test_rank_comes_from_torchrun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "2")
    init_logger()
    log_three_levels()
    error = capsys.readouterr().err
    assert "[rank 2]" in error
    assert "news" not in error


def test_level_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    init_logger(rank=3, level=logging.DEBUG)
    log_three_levels()
    assert "[rank 3] DEBUG detail" in capsys.readouterr().err


def test_second_call_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    init_logger(rank=0)
    init_logger(rank=1)
    log_three_levels()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_traceback_of_a_logged_exception_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    init_logger(rank=0)
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logger.exception("saving failed")
    error = capsys.readouterr().err
    assert "ERROR saving failed\nTraceback" in error
    assert "RuntimeError: broken" in error


def test_import_does_not_import_torch() -> None:
    code = "import sys, torchtitan.tools.logging; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
