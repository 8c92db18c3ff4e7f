"""The metrics processor: what it computes, and what reaches the files and services."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from checkpoint_run import Run, world_of_one  # noqa: F401
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchtitan.components import metrics
from torchtitan.components.metric_sinks import WandbSink
from torchtitan.components.metrics import (
    MetricsProcessor,
    build_metrics_processor,
    check_metrics_processor,
    joined_metrics,
)
from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError, OutageError, TrainingError
from torchtitan.protocols.model import BaseModelArgs


class TinyArgs(BaseModelArgs):
    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        return 1_000_000, 1000 * seq_len


class Clock:
    """Stands in for `perf_counter`; time passes when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(metrics, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def config(tmp_path: Path) -> JobConfig:
    config = JobConfig()
    config.job.dump_folder = str(tmp_path / "run")
    config.training.steps = 100
    config.training.seq_len = 2000
    config.metrics.progress = "plain"
    return config


def build(config: JobConfig, world_size: int = 1) -> MetricsProcessor:
    return build_metrics_processor(config, ParallelDims(world_size=world_size), TinyArgs())


def log(processor: MetricsProcessor, step: int, **values: object) -> None:
    given = {"loss": 2.5, "grad_norm": 0.5, "lr": 3e-4, "ntokens_since_last": 1000}
    given |= {"data_wait_seconds": 0.25, "tokens_seen": 1000 * step}
    processor.log(step, **(given | values))


def rows(config: JobConfig, name: str = "metrics.jsonl") -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (Path(config.job.dump_folder) / name).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_throughput_counts_the_world_and_each_device(config: JobConfig, clock: Clock) -> None:
    processor = build(config, world_size=4)
    processor.start()
    clock.now += 2
    log(processor, 1, ntokens_since_last=8_000_000)
    (row,) = rows(config)
    assert row["tokens_per_second"] == pytest.approx(4_000_000)
    assert row["tokens_per_second_per_device"] == pytest.approx(1_000_000)
    # 2,000,000 FLOP a token at seq_len 2000
    assert row["tflops_per_second_per_device"] == pytest.approx(2.0)
    assert row["elapsed_seconds"] == pytest.approx(2)
    assert row["peak_memory_bytes"] > 10e6
    given = {key: row[key] for key in ("step", "loss", "grad_norm", "lr", "data_wait_seconds")}
    assert given == {
        "step": 1,
        "loss": 2.5,
        "grad_norm": 0.5,
        "lr": 3e-4,
        "data_wait_seconds": 0.25,
    }


@pytest.mark.parametrize("paused", [False, True])
def test_paused_time_does_not_count_in_the_throughput(
    config: JobConfig, clock: Clock, paused: bool
) -> None:
    processor = build(config)
    processor.start()
    clock.now += 1
    for seconds in (4, 5):
        with processor.pause() if paused else nullcontext():
            clock.now += seconds
    log(processor, 1)
    clock.now += 1
    log(processor, 2)
    first, second = rows(config)
    assert first["tokens_per_second"] == pytest.approx(1000 if paused else 100)
    assert first["elapsed_seconds"] == pytest.approx(10)
    assert second["tokens_per_second"] == pytest.approx(1000)  # the pause is over


def test_the_time_of_writing_does_not_count_in_the_throughput(
    config: JobConfig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = build(config)
    write = processor._write

    def write_slowly(*args: Any) -> None:
        write(*args)
        clock.now += 9

    monkeypatch.setattr(processor, "_write", write_slowly)
    processor.start()
    for step in (1, 2):
        clock.now += 1
        log(processor, step)
    assert [row["tokens_per_second"] for row in rows(config)] == [1000, 1000]


def test_setup_before_start_does_not_count_in_the_throughput(
    config: JobConfig, clock: Clock
) -> None:
    processor = build(config)
    clock.now += 60
    processor.start()
    clock.now += 1
    log(processor, 1)
    assert rows(config)[0]["tokens_per_second"] == pytest.approx(1000)


def test_mfu_is_the_share_of_the_peak(
    config: JobConfig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "this_device_peak_flops", lambda: 8e12)
    processor = build(config)
    processor.start()
    clock.now += 1
    log(processor, 1, ntokens_since_last=2_000_000)  # 4 TFLOP/s
    assert rows(config)[0]["mfu"] == pytest.approx(0.5)


def test_no_mfu_on_cpu(config: JobConfig) -> None:
    processor = build(config)
    processor.start()
    log(processor, 1)
    assert "mfu" not in rows(config)[0]


def test_no_mfu_in_fp32_whose_peak_is_another(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "this_device_peak_flops", lambda: 8e12)
    config.training.mixed_precision_param = "float32"
    processor = build(config)
    processor.start()
    log(processor, 1)
    assert "mfu" not in rows(config)[0]


def test_optional_values_are_written_when_given(config: JobConfig) -> None:
    processor = build(config)
    processor.start()
    log(processor, 1)
    log(processor, 2, max_loss=3.5, extra={"router_load": 0.75})
    first, second = rows(config)
    assert "max_loss" not in first
    assert second["max_loss"] == 3.5
    assert second["router_load"] == 0.75


def test_values_that_are_not_finite_become_null(config: JobConfig) -> None:
    processor = build(config)
    processor.start()
    log(processor, 1, loss=float("nan"), grad_norm=float("inf"))
    assert rows(config)[0]["loss"] is None
    assert rows(config)[0]["grad_norm"] is None


def test_resume_drops_later_steps_and_a_line_cut_off(config: JobConfig) -> None:
    first = build(config)
    first.start()
    for step in range(1, 6):
        log(first, step)
        first.log_validation(step, 2.0)
    first.close()
    path = Path(config.job.dump_folder) / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 2, "lo')

    second = build(config)
    second.start(step=3)
    log(second, 4, loss=1.5)
    assert [row["step"] for row in rows(config)] == [1, 2, 3, 4]
    assert rows(config)[-1]["loss"] == 1.5
    assert [row["step"] for row in rows(config, "validation.jsonl")] == [1, 2, 3]
    assert not list(path.parent.glob("*.tmp"))


def test_time_goes_on_where_a_run_goes_back(config: JobConfig, clock: Clock) -> None:
    processor = build(config)
    clock.now += 5  # set-up
    processor.start()
    clock.now += 10
    log(processor, 1)
    with processor.pause():  # a checkpoint after a step that is not logged
        clock.now += 3
    processor.start()  # back to step 0
    clock.now += 20
    log(processor, 1)
    [row] = rows(config)
    assert row["elapsed_seconds"] == 33 and row["tokens_per_second"] == 50
    started = row["started_at"]
    processor.close()
    clock.now += 1
    later = build(config)
    later.start(1)
    clock.now += 40
    log(later, 2)
    row = rows(config)[-1]
    assert row["elapsed_seconds"] == 40 and row["started_at"] >= started > 1.7e9


@pytest.mark.parametrize("line", [b'{"step": 2, "loss\xff', b"[" * 100_000])
def test_resume_drops_a_line_that_is_no_row(config: JobConfig, line: bytes) -> None:
    folder = Path(config.job.dump_folder)
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    processor = build(config)
    processor.start(step=3)
    log(processor, 4)
    assert [row["step"] for row in rows(config)] == [1, 3, 4]


def test_a_new_run_starts_a_new_file(config: JobConfig) -> None:
    for loss in (2.5, 1.5):
        processor = build(config)
        processor.start()
        log(processor, 1, loss=loss)
    assert [row["loss"] for row in rows(config)] == [1.5]


def test_the_curve_of_an_earlier_run_is_kept(
    config: JobConfig, caplog: pytest.LogCaptureFixture
) -> None:
    for loss in (3.5, 2.5, 1.5):
        processor = build(config)
        processor.start()
        log(processor, 1, loss=loss)
    names = ["metrics.jsonl.1", "metrics.jsonl.2", "metrics.jsonl"]
    assert [rows(config, name)[0]["loss"] for name in names] == [3.5, 2.5, 1.5]
    assert "was renamed to metrics.jsonl.1." in caplog.text


def test_throughput_of_replica_groups_is_shared_by_all_of_their_devices(
    config: JobConfig, clock: Clock
) -> None:
    config.fault_tolerance.enable, config.fault_tolerance.group_size = True, 2
    processor = build(config, world_size=4)
    processor.start()
    clock.now += 1
    log(processor, 1, ntokens_since_last=1600)
    clock.now += 1
    log(processor, 2, ntokens_since_last=800, extra={"replica_groups": 1})  # one is missing
    speeds = [
        (row["tokens_per_second"], row["tokens_per_second_per_device"]) for row in rows(config)
    ]
    assert speeds == [(1600, 200), (800, 200)]


def test_validation_has_a_file_of_its_own(config: JobConfig) -> None:
    processor = build(config)
    processor.start()
    log(processor, 5)
    processor.log_validation(5, 2.25)
    assert [row["step"] for row in rows(config)] == [5]
    processor.log_validation(6, 2.5, extra={"loss/code": 2.0})
    lines = [{"step": 5, "loss": 2.25}, {"step": 6, "loss": 2.5, "loss/code": 2.0}]
    assert rows(config, "validation.jsonl") == lines


def test_metrics_of_an_author_do_not_replace_what_is_measured(config: JobConfig) -> None:
    processor = build(config)
    processor.start()
    for taken in ("loss", "mfu", "step"):  # also where it has no value
        with pytest.raises(ConfigError, match=f"returns {taken}, which the run itself or"):
            log(processor, 1, extra={"mine": 1.0, taken: 0.0})
    with pytest.raises(ConfigError, match="returns loss, which the run itself or"):
        processor.log_validation(1, 2.5, extra={"loss": 0.0})
    processor.close()


def test_metrics_of_the_parts_of_a_run_do_not_replace_each_other() -> None:
    loader, guard = {"data_epoch": 0.5, "rollbacks": 7.0}, {"rollbacks": 0}
    with pytest.raises(ConfigError, match=r"returns rollbacks, .*: choose another name"):
        joined_metrics(loader, guard)
    assert joined_metrics({"a": 1}, {}, {"b": 2}) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("missing", "words"),
    [("log", "has no log; see .*MetricsProcessor"), ("flops_per_token", "no flops_per_token;")],
)
def test_a_metrics_processor_of_an_author_is_whole(
    config: JobConfig, missing: str, words: str
) -> None:
    names = ["start", "pause", "log", "log_validation", "show_checkpoint", "close"]
    own = SimpleNamespace(**dict.fromkeys(names, print), flops_per_token=1)
    check_metrics_processor(own, config)
    setattr(own, missing, None)
    with pytest.raises(ConfigError, match=rf"build_metrics_processor_fn of llama3.*{words}"):
        check_metrics_processor(own, config)
    check_metrics_processor(build(config), config)


def test_only_rank_0_writes(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config.metrics.enable_tensorboard = True
    monkeypatch.setenv("RANK", "1")
    processor = build(config, world_size=2)
    processor.start()
    log(processor, 1)
    processor.log_validation(1, 2.0)
    processor.close()
    assert not Path(config.job.dump_folder).exists()
    assert not caplog.messages


def test_plain_progress_line(
    config: JobConfig, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    processor = build(config)
    processor.start()
    clock.now += 30  # the first step compiles; the ETA leaves it out
    log(processor, 1)
    clock.now += 9
    log(processor, 10, ntokens_since_last=9_000_000)
    clock.now += 60
    processor.start(4)  # the run goes back; what it did before tells nothing of the pace
    log(processor, 5)
    clock.now += 18
    log(processor, 14)
    first, second, third, fourth = caplog.messages
    assert "ETA" not in first + third and fourth.endswith("ETA 0:02:52")
    assert second.startswith(
        "step  10/100  loss 2.5000  grad 0.500  lr 3.0e-4  1.00M tok/s  2.00 TFLOP/s  "
    )
    assert second.endswith("GiB  ETA 0:01:30")


def test_the_rest_of_a_ramp_takes_longer(
    config: JobConfig, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config.training.global_batch_size = config.training.local_batch_size * 4
    config.training.batch_size_ramp = [f"{config.training.local_batch_size}:20"]
    processor = build(config)
    processor.start()
    log(processor, 1)
    clock.now += 9
    log(processor, 10)
    clock.now += 18
    log(processor, 22)
    assert caplog.messages[1].endswith("ETA 0:05:30")  # 10 s, and 80 times 4 s
    assert caplog.messages[2].endswith("ETA 0:05:12")


def test_dump_folder_that_cannot_be_written_is_a_config_error(config: JobConfig) -> None:
    Path(config.job.dump_folder).write_text("a file, not a folder")
    with pytest.raises(ConfigError, match=r"job\.dump_folder"):
        build(config).start()


def test_a_full_disk_does_not_end_the_run(
    config: JobConfig, caplog: pytest.LogCaptureFixture
) -> None:
    processor = build(config)
    processor.start()
    (Path(config.job.dump_folder) / "metrics.jsonl").symlink_to("/dev/full")
    caplog.set_level(logging.INFO)
    log(processor, 1)
    log(processor, 2)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [
        f"step 1: cannot write {config.job.dump_folder}/metrics.jsonl: [Errno 28] No space left on "
        "device. Trying again at each logged step"
    ]
    assert any(message.startswith("step   2/100") for message in caplog.messages)


def test_what_could_not_be_written_is_written_later(
    config: JobConfig, caplog: pytest.LogCaptureFixture
) -> None:
    processor = build(config)
    processor.start()
    path = Path(config.job.dump_folder) / "metrics.jsonl"
    log(processor, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # step 2 gets a part of its line into the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
        for step in (2, 3):
            log(processor, step)
        assert path.read_text().splitlines()[1].startswith('{"step": 2')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    log(processor, 4)
    assert [row["step"] for row in rows(config)] == [1, 2, 3, 4]
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 1


def test_steps_that_are_redone_are_not_written_later(config: JobConfig) -> None:
    processor = build(config)
    processor.start()
    path = Path(config.job.dump_folder) / "metrics.jsonl"
    path.symlink_to("/dev/full")
    for step in (1, 2, 3):
        log(processor, step)
    path.unlink()
    processor.start(1)
    processor.close()
    assert [row["step"] for row in rows(config)] == [1]


def test_a_run_goes_back_also_where_nothing_can_be_written(
    config: JobConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """The lines of the steps that are done again are dropped once that goes."""
    processor = build(config)
    processor.start()
    path = Path(config.job.dump_folder) / "metrics.jsonl"
    for step in (1, 2, 3):
        log(processor, step, loss=2.5)
    obstacle = path.with_name(path.name + ".tmp")  # by which the file is rewritten
    obstacle.mkdir()
    processor.start(1)
    log(processor, 2, loss=1.5)
    assert [row["loss"] for row in rows(config)] == [2.5, 2.5, 2.5]
    assert "step 1: cannot write" in caplog.text and "step 2: cannot" not in caplog.text
    obstacle.rmdir()
    log(processor, 3, loss=1.25)
    processor.close()
    assert [row["loss"] for row in rows(config)] == [2.5, 1.5, 1.25]


def test_a_run_that_goes_back_twice_keeps_one_line_a_step(config: JobConfig) -> None:
    """Nothing can be written meanwhile, and the second time it goes back less far."""
    processor = build(config)
    processor.start()
    path = Path(config.job.dump_folder) / "metrics.jsonl"
    for step in range(1, 6):
        log(processor, step, loss=2.5)
    obstacle = path.with_name(path.name + ".tmp")
    obstacle.mkdir()
    processor.start(1)
    for step in (2, 3, 4):
        log(processor, step, loss=1.5)
    processor.start(3)
    log(processor, 4, loss=1.25)
    obstacle.rmdir()
    processor.close()
    assert [row["loss"] for row in rows(config)] == [2.5, 1.5, 1.5, 1.25]


def test_a_run_that_goes_back_writes_no_line_twice(config: JobConfig) -> None:
    """Of two lines that waited, one got into the file whole before the disk was full again."""
    processor = build(config)
    processor.start()
    path = Path(config.job.dump_folder) / "metrics.jsonl"
    log(processor, 1)
    length = path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
        for step in (2, 3):
            log(processor, step)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(2.2 * length), before[1]))
        log(processor, 4)
        assert path.read_text().count("\n") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    processor.start(3)
    log(processor, 4)
    processor.close()
    assert [row["step"] for row in rows(config)] == [1, 2, 3, 4]


def tensorboard_events(config: JobConfig) -> EventAccumulator:
    folder = Path(config.job.dump_folder) / config.metrics.save_tb_folder
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_goes_on_after_an_error(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def fail(self: object, data: object = None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    now = 0.0
    monkeypatch.setattr("torchtitan.components.metric_sinks.monotonic", lambda: now)
    config.metrics.enable_tensorboard = True
    processor = build(config)
    processor.start()
    for step in (1, 2):
        log(processor, step)
    with monkeypatch.context() as full:
        full.setattr(RecordWriter, "write", fail)
        full.setattr(RecordWriter, "flush", fail)
        log(processor, 3)
        processor.start(1)  # the run goes back
        log(processor, 2)  # not tried
    log(processor, 2, loss=1.5)  # neither
    now += 301
    log(processor, 3, loss=1.25)
    processor.close()
    assert caplog.text.count("cannot write for TensorBoard") == 1
    assert scalars(tensorboard_events(config), "train/loss") == [(1, 2.5), (3, 1.25)]
    assert [row["step"] for row in rows(config)][-1] == 3


def test_tensorboard_receives_every_value_and_forgets_steps_redone(config: JobConfig) -> None:
    config.metrics.enable_tensorboard = True
    config.metrics.save_tb_folder = "events"
    for resumed_at, last, loss in ((0, 4, 2.5), (2, 3, 1.5)):
        processor = build(config)
        processor.start(step=resumed_at)
        for step in range(resumed_at + 1, last + 1):
            log(processor, step, loss=loss)
        processor.log_validation(last, 2.25)
        processor.close()

    events = tensorboard_events(config)
    assert scalars(events, "train/loss") == [(1, 2.5), (2, 2.5), (3, 1.5)]
    assert scalars(events, "validation/loss") == [(3, 2.25)]
    expected = {f"train/{key}" for key in rows(config)[0] if key != "step"}
    assert set(events.Tags()["scalars"]) == expected | {"validation/loss"}


class FakeWandb(ModuleType):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("wandb")
        self.process_ended = False
        self.error = error
        self.logged: list[dict] = []
        self.defined: dict[str, dict] = {}
        self.exit_code: int | None = None

    def init(self, **settings: object) -> FakeWandb:
        if self.error:
            raise self.error
        self.settings = settings
        self.started = getattr(self, "started", 0) + 1
        given = settings.get("id") or os.environ.get("WANDB_RUN_ID")
        self.id = given or f"id{self.started}"
        return self

    def define_metric(self, name: str, **settings: object) -> None:
        self.defined[name] = settings

    def log(self, values: dict) -> None:
        if self.process_ended:
            raise RuntimeError("the service is gone")
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        if self.process_ended:
            raise RuntimeError("the service is gone")
        self.exit_code = exit_code


def test_wandb_receives_config_and_values(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    config.metrics.enable_wandb = True
    config.job.description = "a fine run"
    processor = build(config)
    processor.start()
    log(processor, 1)
    processor.log_validation(1, 2.25)
    processor.close()

    assert wandb.settings["project"] == "torchtitan"
    assert wandb.settings["name"] == "a fine run"
    assert wandb.settings["config"]["training"]["steps"] == 100
    train, validation = wandb.logged
    assert (train["step"], train["train/loss"], train["train/lr"]) == (1, 2.5, 3e-4)
    assert validation == {"step": 1, "validation/loss": 2.25}
    # Else steps that are done again would be dropped.
    assert {name: of.get("step_metric") for name, of in wandb.defined.items()} == {
        "step": None,
        "train/*": "step",
        "validation/*": "step",
    }
    assert wandb.exit_code == 0


def test_wandb_shows_that_a_run_failed(config: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config.metrics.enable_wandb = True
    processor = build(config)
    try:
        raise TrainingError("the loss is nan")
    except TrainingError:
        processor.close()
    assert wandb.exit_code == 1


def test_a_run_that_resumes_is_the_same_run_of_wandb(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config.metrics.enable_wandb = config.checkpoint.enable = True
    kept = Path(config.job.dump_folder) / "wandb_run_id"

    def start() -> tuple[str, object]:
        build(config).close()
        assert kept.read_text().strip() == wandb.id
        return wandb.id, wandb.settings["resume"]

    assert start() == ("id1", "allow")
    assert start() == ("id2", "allow")  # from step 0 again, as there is no checkpoint
    Run(Path(config.job.dump_folder)).train(2)
    assert start() == ("id2", "allow")
    for lost in (b"", b"\xff\xfe"):
        kept.write_bytes(lost)
        before = wandb.id
        assert start()[0] not in (before, "")
    kept.unlink()
    assert start() == ("id6", "allow")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_RESUME", "must")
    assert start() == ("mine", None)  # then wandb reads its own variables
    monkeypatch.delenv("WANDB_RUN_ID")
    wandb.error = RuntimeError("run mine was deleted")
    with pytest.raises(ConfigError, match=f"deleted.*a new run there, delete the file {kept}"):
        WandbSink(config)


def test_only_rank_0_has_a_run_of_wandb(config: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    monkeypatch.setenv("RANK", "1")
    config.metrics.enable_wandb = True
    build(config, world_size=2).close()
    assert not Path(config.job.dump_folder).exists()


def test_a_run_goes_on_when_wandb_ends(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config.metrics.enable_wandb = True
    processor = build(config)
    processor.start()
    log(processor, 1)
    wandb.process_ended = True
    for step in (2, 3):
        log(processor, step)
    processor.close()
    assert [row["step"] for row in rows(config)] == [1, 2, 3] and len(wandb.logged) == 1
    assert caplog.text.count("W&B stopped: the service is gone") == 1


def test_wandb_that_does_not_start_is_a_config_error(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(RuntimeError("no API key")))
    config.metrics.enable_wandb = True
    with pytest.raises(ConfigError, match=r"no API key.*WANDB_MODE=offline"):
        build(config)


def test_wandb_that_cannot_be_reached_is_an_outage(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CommError(Exception):
        """As in wandb.errors."""

    error = CommError("Run initialization has timed out after 90.0 sec")
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(error))
    config.metrics.enable_wandb = True
    with pytest.raises(OutageError, match=r"enable_wandb.*timed out after 90"):
        build(config)


def test_a_run_that_resumes_goes_on_without_wandb(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(ConnectionError("reset")))
    config.metrics.enable_wandb = config.checkpoint.enable = True
    with pytest.raises(OutageError):  # there is no checkpoint yet
        build(config)
    Run(Path(config.job.dump_folder)).train(2)
    monkeypatch.setattr(logging.getLogger("torchtitan"), "propagate", True)
    processor = build(config)
    assert "wandb cannot start: reset" in caplog.text and "continues without it" in caplog.text
    processor.start(2)
    log(processor, 3)
    processor.close()
    assert [row["step"] for row in rows(config)] == [3]
