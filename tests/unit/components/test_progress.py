"""The progress line, on a terminal of a given width and in a log."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import re
import subprocess
import sys
import textwrap

import pyte
import pytest
from rich.console import Console

from torchtitan.components.progress import BarProgress, History, PlainProgress, build_progress

ON_H100 = {
    "loss": 12.3456,
    "grad_norm": 0.512,
    "lr": 3e-4,
    "tokens_per_second": 12_345.0,
    "tflops_per_second_per_device": 41.23,
    "mfu": 0.417,
    "peak_memory_bytes": int(62.1 * 2**30),
}


@pytest.fixture(autouse=True)
def _no_log_on_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that an earlier test has set up would be drawn above the bar."""
    monkeypatch.setattr(logging.getLogger("torchtitan"), "handlers", [])


def drawn(width: int, values: dict, step: int = 630, eta: float | None = 3723) -> list[str]:
    """The lines of a bar that was drawn once."""
    file = io.StringIO()
    bar = BarProgress(1000, Console(file=file, width=width, force_terminal=True, color_system=None))
    bar.update(step, values, eta)
    bar.close()
    text = file.getvalue().replace("\x1b[?25l", "").replace("\x1b[?25h", "")
    return [line for line in text.replace("\r\x1b[2K\x1b[1A\x1b[2K", "\n").split("\n") if line]


def test_bar_shows_everything_at_80_columns() -> None:
    bar, line = drawn(80, ON_H100)[:2]
    assert len(bar.rstrip()) == 80
    assert bar.startswith("step 630/1000 ━")
    assert bar.rstrip().endswith("63%  ETA 1:02:03")
    assert line.rstrip() == (
        "loss 12.346  grad 0.512  lr 3.0e-4  12.3K tok/s  41.2 TFLOP/s  MFU 42%  62.1 GiB"
    )


@pytest.mark.parametrize("width", [40, 60, 100])
def test_bar_leaves_out_the_least_important_on_a_narrow_terminal(width: int) -> None:
    lines = drawn(width, ON_H100)
    assert all(len(line.rstrip()) <= width for line in lines)
    assert lines[1].startswith("loss 12.346  grad 0.512")
    assert ("62.1 GiB" in lines[1]) == (width >= 80)


def test_bar_says_nothing_of_mfu_and_eta_that_are_unknown() -> None:
    values = {key: value for key, value in ON_H100.items() if key != "mfu"}
    text = "\n".join(drawn(80, values, eta=None))
    assert "MFU" not in text
    assert "ETA" not in text
    assert "62.1 GiB" in text


def test_bar_survives_a_loss_that_is_not_finite() -> None:
    line = drawn(80, ON_H100 | {"loss": float("nan"), "grad_norm": float("inf")})[1]
    assert line.startswith("loss nan  grad inf")


def test_plain_is_one_line_a_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = PlainProgress(1000)
    progress.update(63, ON_H100, 3723)
    progress.close()
    (line,) = caplog.messages
    assert line.startswith("step   63/1000  loss 12.346")
    assert line.endswith("MFU 42%  62.1 GiB  ETA 1:02:03")


def test_auto_is_plain_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(build_progress("auto", 10), PlainProgress)
    assert isinstance(build_progress("bar", 10), BarProgress)


RUN_IN_TERMINAL = textwrap.dedent(
    """
    import logging
    import sys
    from torchtitan.components.progress import build_progress
    from torchtitan.tools.logging import init_logger

    init_logger()
    progress = build_progress("auto", 10)
    values = {values!r}
    progress.update(1, values, None)
    logging.getLogger("torchtitan").info("a line of the log")
    progress.update(2, values, 5.0)
    progress.close()
    """
)


def read_all(terminal: int) -> str:
    """What was written to the other, closed end of a terminal."""
    chunks = []
    with contextlib.suppress(OSError):  # Linux's end of file
        while chunk := os.read(terminal, 4096):
            chunks.append(chunk)
    os.close(terminal)
    return b"".join(chunks).decode()


def test_auto_is_a_bar_on_a_terminal_with_log_lines_above_it() -> None:
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    subprocess.run(
        [sys.executable, "-c", RUN_IN_TERMINAL.format(values=ON_H100)],
        stderr=child,
        check=True,
        env=environment,
    )
    os.close(child)
    output = read_all(parent)
    first, second = output.split("a line of the log")
    assert "step 1/10" in first
    assert "step 1/10" in second  # drawn again below the line
    assert second.index("step 1/10") < second.index("step 2/10")
    assert "\x1b[?25h" in second  # the cursor is shown again


def on_screen(width: int, steps: list[dict], height: int = 12, resize: int | None = None) -> str:
    """What a terminal shows after these steps; with `resize`, the last is drawn at that width."""
    screen = pyte.Screen(width, height)
    stream = pyte.Stream(screen)
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True)
    bar = BarProgress(1000, console)
    bar.checkpoint(500)
    bar.validation(11.5)
    for number, values in enumerate(steps):
        if resize and number == len(steps) - 1:
            stream.feed(file.getvalue().replace("\n", "\r\n"))
            file.truncate(0)
            file.seek(0)
            console.width = resize
            _reflow(screen, resize)
        bar.update(630, ON_H100 | values, 3723)
        logging.getLogger("torchtitan").warning("the disk is nearly full\nreally")
    bar.update(630, ON_H100 | steps[-1], 3723)
    bar.close()
    stream.feed(file.getvalue().replace("\n", "\r\n"))
    return "\n".join(line.rstrip() for line in screen.display).rstrip()


def _reflow(screen: pyte.Screen, width: int) -> None:
    """What most terminals do when they become narrower: long lines wrap (pyte cuts them)."""
    rows = []
    for line in screen.display:
        text = line.rstrip()
        rows += [text[i : i + width] for i in range(0, len(text), width)] or [""]
    while rows and not rows[-1]:
        rows.pop()
    screen.resize(columns=width)
    screen.reset()
    pyte.Stream(screen).feed("\r\n".join(rows) + "\r")


LOSSES = [{"loss": loss} for loss in (12.0, 11.0, 9.0, 8.5, 8.25)]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_bar_on_a_screen(width: int) -> None:
    lines = on_screen(width, LOSSES).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("step 630/1000 ━") and lines[0].endswith("63%  ETA 1:02:03")
    assert lines[1].startswith("loss 8.2500  grad 0.512  lr 3.0e-4  12.3K tok/s")
    assert lines[2] == "█▆▂▁▁▁  validation 11.5000  checkpoint 500 (0:00:00 ago)"
    assert lines[3] == "5 warnings, the last: the disk is nearly full really"


def test_what_stays_on_the_screen_has_the_last_validation_and_checkpoint() -> None:
    screen = pyte.Screen(80, 12)
    file = io.StringIO()
    bar = BarProgress(1000, Console(file=file, width=80, force_terminal=True))
    bar.checkpoint(500)
    for _ in range(2):
        bar.update(1000, ON_H100, 0.0)
    bar.validation(2.5)
    bar.checkpoint(1000)
    bar.close()
    pyte.Stream(screen).feed(file.getvalue().replace("\n", "\r\n"))
    lines = [line.rstrip() for line in screen.display if line.strip()]
    assert len(lines) == 3 and lines[0].startswith("step 1000/1000")
    assert lines[2] == "▁▁  validation 2.5000  checkpoint 1000 (0:00:00 ago)"


def test_on_40_columns_the_checkpoint_goes_before_the_validation() -> None:
    lines = on_screen(40, LOSSES).splitlines()
    assert lines[2] == "█▆▂▁▁▁  checkpoint 500 (0:00:00 ago)"
    assert lines[3] == "5 warnings, the last: the disk is nearl…"


@pytest.mark.parametrize("narrower", [30, 50, 79])
def test_a_terminal_that_gets_narrower_is_tidy(narrower: int) -> None:
    shown = on_screen(80, LOSSES, height=20, resize=narrower)
    assert shown.count("step 630/1000") == 1
    assert len(shown.splitlines()) == 4


def test_the_history_is_an_average_of_everything() -> None:
    history = History()
    for step in range(100_000):
        history.add(float(step))
    history.add(float("nan"))
    assert history.sparks(8) == "▁▂▃▄▅▆▇█"
    assert len(history.sparks(1000)) <= 512
    few = History()
    few.add(1.0)
    assert few.sparks(10) == ""
    few.add(1.0)
    assert few.sparks(10) == "▁▁"


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    def colors() -> list[str]:
        console = Console(file=io.StringIO(), width=80, force_terminal=True)
        bar = BarProgress(1000, console)
        bar.update(630, ON_H100, None)
        bar.close()
        return re.findall(r"\x1b\[[0-9;]*3\d[0-9;]*m", console.file.getvalue())

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert colors()
    monkeypatch.setenv("NO_COLOR", "1")
    assert colors() == []


def test_after_the_end_no_warnings_are_counted() -> None:
    before = list(logging.getLogger("torchtitan").handlers)
    drawn(80, ON_H100)
    assert logging.getLogger("torchtitan").handlers == before
