"""Traces of the right steps, and memory snapshots on CUDA."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError
from torchtitan.tools import profiling
from torchtitan.tools.profiling import Profiler, check_profiling


@pytest.fixture
def config(tmp_path: Path) -> JobConfig:
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    return config


def train(config: JobConfig, first: int, last: int, rank: int = 0) -> None:
    """Steps `first` to `last`; step N multiplies matrices of size N, so that its trace tells."""
    with Profiler(config, rank, first - 1) as profiler:
        for step in range(first, last + 1):
            matrix = torch.ones(step, step)
            torch.mm(matrix, matrix)
            profiler.step(step)


def written(config: JobConfig) -> list[str]:
    folder = Path(config.job.dump_folder)
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def mm_shapes(path: Path) -> list[list[list[int]]]:
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return [event["args"]["Input Dims"] for event in events if event.get("name") == "aten::mm"]


def test_trace_holds_the_operations_of_its_step(config: JobConfig, tmp_path: Path) -> None:
    config.profiling.enable_profiling = True
    config.profiling.profile_freq = 4
    train(config, 1, 11, rank=3)
    assert written(config) == [
        "profile/step-4/rank-3.json.gz",
        "profile/step-8/rank-3.json.gz",
    ]
    for step in (4, 8):
        path = tmp_path / "profile" / f"step-{step}" / "rank-3.json.gz"
        assert mm_shapes(path) == [[[step, step], [step, step]]]


def test_resumed_run_traces_the_same_steps(config: JobConfig, tmp_path: Path) -> None:
    config.profiling.enable_profiling = True
    config.profiling.profile_freq = 4
    train(config, 7, 9)
    assert written(config) == ["profile/step-8/rank-0.json.gz"]
    path = tmp_path / "profile" / "step-8" / "rank-0.json.gz"
    assert mm_shapes(path) == [[[8, 8], [8, 8]]]


def test_steps_after_a_rollback_are_named_by_their_number(
    config: JobConfig, tmp_path: Path
) -> None:
    config.profiling.enable_profiling = True
    config.profiling.profile_freq = 4
    with Profiler(config, 0, 0) as profiler:
        for step in (1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9):  # after step 6 back to step 4
            torch.mm(torch.ones(step, step), torch.ones(step, step))
            profiler.step(step)
    assert written(config) == ["profile/step-4/rank-0.json.gz", "profile/step-8/rank-0.json.gz"]
    path = tmp_path / "profile" / "step-8" / "rank-0.json.gz"
    assert mm_shapes(path) == [[[8, 8], [8, 8]]]


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_several_steps_are_in_one_trace(
    config: JobConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, warmup: int
) -> None:
    caplog.set_level("INFO", "torchtitan")
    config.profiling.enable_profiling = True
    config.profiling.profile_freq, config.profiling.profiler_active = 5, 3
    config.profiling.profiler_warmup = warmup
    train(config, 1, 14)
    assert written(config) == ["profile/step-10/rank-0.json.gz", "profile/step-5/rank-0.json.gz"]
    for step in (5, 10):
        path = tmp_path / "profile" / f"step-{step}" / "rank-0.json.gz"
        assert mm_shapes(path) == [[[n, n], [n, n]] for n in range(step - 2, step + 1)]
        assert f"profiler trace of 3 steps up to step {step}: {path}" in caplog.text


def test_all_steps_are_traced(config: JobConfig, tmp_path: Path) -> None:
    config.profiling.enable_profiling = True
    config.profiling.profile_freq = config.profiling.profiler_active = 2
    train(config, 1, 4)
    for step in (2, 4):
        path = tmp_path / "profile" / f"step-{step}" / "rank-0.json.gz"
        assert mm_shapes(path) == [[[n, n], [n, n]] for n in (step - 1, step)]


def test_a_rollback_while_several_steps_are_recorded(config: JobConfig, tmp_path: Path) -> None:
    config.profiling.enable_profiling = True
    config.profiling.profile_freq, config.profiling.profiler_active = 4, 2
    with Profiler(config, 0, 0) as profiler:
        steps = (1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9)
        for done, step in enumerate(steps, start=1):
            torch.mm(torch.ones(step, step), torch.ones(step, step))
            profiler.step(4 if done == 7 else step)  # the first step 7 goes back to step 4
    path = tmp_path / "profile" / "step-8" / "rank-0.json.gz"
    assert mm_shapes(path) == [[[n, n], [n, n]] for n in (7, 8)]


@pytest.mark.parametrize("freq", [1, 2])
def test_short_intervals(config: JobConfig, tmp_path: Path, freq: int) -> None:
    config.profiling.enable_profiling = True
    config.profiling.profile_freq = freq
    train(config, 1, 4)
    steps = range(freq, 5, freq)
    assert written(config) == [f"profile/step-{step}/rank-0.json.gz" for step in steps]
    for step in steps:
        path = tmp_path / "profile" / f"step-{step}" / "rank-0.json.gz"
        assert mm_shapes(path) == [[[step, step], [step, step]]]


def test_nothing_is_written_unless_asked(config: JobConfig) -> None:
    config.profiling.profile_freq = 1
    train(config, 1, 2)
    assert written(config) == []


def test_an_error_in_training_passes_through(config: JobConfig) -> None:
    config.profiling.enable_profiling = True
    config.profiling.profile_freq = 2
    with pytest.raises(ValueError, match="of the model"), Profiler(config, 0, 0) as profiler:
        profiler.step(1)
        raise ValueError("of the model")
    assert written(config) == []


@pytest.mark.parametrize("obstacle", ["a file", "a full disk"])
def test_a_trace_that_cannot_be_written_does_not_end_the_run(
    config: JobConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, obstacle: str
) -> None:
    if obstacle == "a file":
        (tmp_path / "profile").write_text("not a folder")
    else:
        (tmp_path / "profile" / "step-3").mkdir(parents=True)
        (tmp_path / "profile" / "step-3" / "rank-0.json.gz").symlink_to("/dev/full")
    config.profiling.enable_profiling = True
    config.profiling.profile_freq = 3
    with Profiler(config, 0, 0) as profiler:
        for step in range(1, 7):
            torch.mm(torch.ones(step, step), torch.ones(step, step))
            profiler.step(step)
            if step == 3 and obstacle == "a file":
                (tmp_path / "profile").unlink()
    path = tmp_path / "profile" / "step-3" / "rank-0.json.gz"
    [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith(f"profiler trace of step 3: cannot write {path}: [Errno ")
    assert written(config) == ["profile/step-6/rank-0.json.gz"]


def test_memory_snapshots_need_cuda(config: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "device_type", lambda: "cpu")
    check_profiling(config)
    config.profiling.enable_memory_snapshot = True
    with pytest.raises(ConfigError, match=r"profiling\.enable_memory_snapshot.*CUDA"):
        check_profiling(config)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for CUDA's memory recording."""
    state = SimpleNamespace(recording=False)

    def record(enabled: str | None = "all", max_entries: int = 0) -> None:
        state.recording = enabled is not None

    def dump(path: str) -> None:
        assert state.recording
        Path(path).write_text("snapshot")

    monkeypatch.setattr(profiling, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return state


def test_memory_snapshot_every_freq_steps(config: JobConfig, cuda: SimpleNamespace) -> None:
    config.profiling.enable_memory_snapshot = True
    config.profiling.profile_freq = 2
    train(config, 2, 5, rank=1)
    assert written(config) == [
        "profile/step-2/memory-rank-1.pickle",
        "profile/step-4/memory-rank-1.pickle",
    ]
    assert not cuda.recording


@pytest.mark.parametrize(
    ("ranks", "rank", "writes"),
    [([], 63, True), ([], 64, False), ([70], 70, True), ([70], 0, False)],
)
def test_not_all_of_thousands_of_ranks_write(
    config: JobConfig, cuda: SimpleNamespace, ranks: list[int], rank: int, writes: bool
) -> None:
    config.profiling.enable_memory_snapshot = True
    config.profiling.profile_freq = 2
    config.profiling.ranks = ranks
    train(config, 1, 2, rank)
    assert written(config) == writes * [f"profile/step-2/memory-rank-{rank}.pickle"]


def test_other_ranks_trace_nothing(config: JobConfig) -> None:
    config.profiling.enable_profiling = True
    config.profiling.profile_freq = 1
    config.profiling.ranks = [3]
    train(config, 1, 1, rank=2)
    train(config, 1, 1, rank=3)
    assert written(config) == ["profile/step-1/rank-3.json.gz"]


@pytest.mark.parametrize("ranks", [[], [70]])
@pytest.mark.parametrize(
    ("error", "files"),
    [
        (torch.OutOfMemoryError, ["profile/step-3/out-of-memory-rank-64.pickle"]),
        (RuntimeError, []),
    ],
)
def test_memory_snapshot_when_memory_runs_out(
    config: JobConfig,
    cuda: SimpleNamespace,
    error: type[Exception],
    files: list[str],
    ranks: list[int],
) -> None:
    config.profiling.enable_memory_snapshot = True
    config.profiling.ranks = ranks
    with pytest.raises(error), Profiler(config, 64, 0) as profiler:
        profiler.step(1)
        profiler.step(2)
        raise error("CUDA out of memory")
    assert written(config) == files
    assert not cuda.recording


def test_running_out_of_memory_is_told_where_no_snapshot_can_be_written(
    config: JobConfig, cuda: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("not a folder")
    config.profiling.enable_memory_snapshot = True
    config.profiling.profile_freq = 2
    with pytest.raises(torch.OutOfMemoryError), Profiler(config, 0, 0) as profiler:
        profiler.step(1)
        profiler.step(2)
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert caplog.text.count("cannot write") == 2
    assert not cuda.recording
