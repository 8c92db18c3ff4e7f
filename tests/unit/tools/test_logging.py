"""Who logs what, and in which form."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch._higher_order_ops import wrap

from torchtitan.config import load_config
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models import llama3
from torchtitan.models.llama3.infra.parallelize import parallelize_llama
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.runtime.fake_world import fake_world
from torchtitan.tools.logging import init_logger, rank0

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
    init_logger()
    log_three_levels()
    news, trouble = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d news", news)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d WARNING trouble", trouble)


def test_other_ranks_log_only_warnings_under_their_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "2")
    init_logger()
    log_three_levels()
    (trouble,) = capsys.readouterr().err.splitlines()
    assert trouble.endswith(" [rank 2] WARNING trouble")


def test_rank_0_alone_shows_what_the_compiler_asks_of_checkpointed_blocks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn() -> str:
        init_logger()
        wrap.log.warning("no in-place operations, please")
        return capsys.readouterr().err

    handler = logging.StreamHandler(sys.stderr)
    wrap.log.addHandler(handler)
    try:
        assert "please" in warn()
        monkeypatch.setenv("RANK", "2")
        assert not warn()
    finally:
        wrap.log.removeHandler(handler)


@pytest.mark.parametrize(
    ("environment", "logs"), [(None, True), ("0", True), ("3", False), ("two", False)]
)
def test_of_a_message_that_all_ranks_have_rank_0_logs_one(
    environment: str | None,
    logs: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without torchrun, a process is rank 0. `RANK` may be set after the import.

    If it is no number, `runtime.world` says so, in a log that works.
    """
    monkeypatch.delenv("RANK", raising=False)
    if environment is not None:
        monkeypatch.setenv("RANK", environment)
    init_logger()
    rank0.warning("trouble")
    rank0.debug("detail")
    shown = [line.partition("WARNING ")[2] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["trouble"] * logs


def test_rank_0_of_a_fake_world_logs(caplog: pytest.LogCaptureFixture) -> None:
    for rank in (0, 4321):
        with fake_world(8192, rank):
            rank0.warning("trouble on %d", rank)
    assert [record.getMessage() for record in caplog.records] == ["trouble on 0"]


def test_a_sharded_embedding_under_tensor_parallelism_does_not_warn() -> None:
    options = ["parallelism.tensor_parallel_degree=2", "training.mixed_precision_param=float32"]
    config = load_config([f"--{option}" for option in options])
    with fake_world(4, rank=0), warnings.catch_warnings(record=True) as shown:
        init_logger()
        dims = ParallelDims.from_config(config.parallelism, 4)
        model = Llama3Model(llama3.MODEL_CONFIGS["debugmodel"])
        parallelize_llama(model, dims.world_mesh, dims, config)
        model(torch.zeros(1, 32, dtype=torch.long))
    assert [str(warning.message) for warning in shown] == []


def test_second_call_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    init_logger()
    init_logger()
    logger.warning("trouble")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_traceback_of_a_logged_exception_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    init_logger()
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
