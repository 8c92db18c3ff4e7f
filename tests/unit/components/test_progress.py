"""The progress line, on a terminal of a given width and in a log."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import subprocess
import sys
import textwrap

import pytest
from rich.console import Console

from torchtitan.components.progress import BarProgress, PlainProgress, build_progress

ON_H100 = {
    "loss": 12.3456,
    "grad_norm": 0.512,
    "lr": 3e-4,
    "tokens_per_second": 12_345.0,
    "tflops_per_second_per_device": 41.23,
    "mfu": 0.417,
    "peak_memory_bytes": int(62.1 * 2**30),
}


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
