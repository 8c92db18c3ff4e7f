"""The page in a real browser: it draws, says nothing on the console, and asks no network."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from browser import Page
from report_folder import write_run

from torchtitan.commands.report.command import main

LOSSES: list[float | None] = [2 + 3 * 0.98**i + 0.1 * math.sin(i) for i in range(200)]

LINES = "document.querySelector('.chart').querySelectorAll('svg .line')"
FIRST_CHART = "document.querySelector('.chart svg')"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    slower = [loss + 0.3 if loss else None for loss in LOSSES]
    slower[100] = None
    runs = [write_run(folder / "fast", LOSSES), write_run(folder / "slow", slower, zebra=1.0)]
    out = folder / "report.html"
    main([*map(str, runs), "--out", str(out)])
    return out


@pytest.mark.parametrize(
    "options",
    [{}, {"width": 390, "height": 844}, {"dark": True}, {"javascript": False}],
    ids=["desktop", "phone", "dark", "without JavaScript"],
)
def test_it_draws_in_silence(page: Path, options: dict) -> None:
    with Page(page, **options) as browser:
        assert browser.problems == []
        assert browser.requests == []
        widest = browser.run("document.documentElement.scrollWidth")
        assert widest <= options.get("width", 1200)  # nothing sticks out to the side
        boxes = browser.run(f"[...{LINES}].map((l) => l.getBBox()).map((b) => [b.width, b.height])")
        assert len(boxes) == 2
        assert all(width > 150 and height > 100 for width, height in boxes)
        hidden = browser.run("document.querySelector('.tools').hidden")
        assert hidden == (not options.get("javascript", True))
        background = (0x0F, 0x14, 0x19) if options.get("dark") else (0xFF, 0xFF, 0xFF)
        picture = pixels(browser.screenshot())
        assert tuple(picture[2, 2]) == background
        curve = (0x58, 0xB0, 0xE8) if options.get("dark") else (0x00, 0x72, 0xB2)
        assert count(picture, curve) > 100  # pixels in the first run's colour


def test_scale_smoothing_legend_and_pointer(page: Path) -> None:
    with Page(page) as browser:
        first = f"{LINES}[0].getAttribute('d')"
        linear = browser.run(first)
        browser.run("document.querySelector('button.scale').click()")
        assert browser.run("document.querySelector('button.scale').ariaPressed") == "true"
        assert browser.run(first) != linear
        browser.run("document.querySelector('button.scale').click()")
        assert browser.run(first) == linear

        slider = "document.querySelector('.tools input')"
        browser.run(f"{slider}.value = 50; {slider}.dispatchEvent(new Event('input'))")
        assert browser.run(f"{LINES}.length") == 4  # smoothed ones, and what they smooth
        browser.run(f"{slider}.value = 0; {slider}.dispatchEvent(new Event('input'))")

        browser.run("document.querySelectorAll('button.run')[1].click()")
        assert browser.run(f"{LINES}.length") == 1
        browser.run("document.querySelectorAll('button.run')[1].click()")
        assert browser.run(f"{LINES}.length") == 2

        left, top, width = browser.run(
            f"(() => {{ const b = {FIRST_CHART}.getBoundingClientRect();"
            " return [b.left, b.top, b.width]; })()"
        )
        browser.move_mouse(left + width - 10, top + 50)  # the right end of the axis
        tip = browser.run("document.querySelector('.tip').innerText")
        assert tip == f"fast step 200: {LOSSES[-1]:.4g}\nslow step 200: {LOSSES[-1] + 0.3:.4g}"
        assert browser.run("document.querySelectorAll('.cursor').length") > 5
        assert browser.problems == []


@pytest.mark.parametrize("javascript", [True, False])
def test_the_dots_of_a_short_run_are_round(tmp_path: Path, javascript: bool) -> None:
    run = write_run(tmp_path / "run", [3.0, 1.0, 2.0])
    main([str(run)])
    with Page(run / "report.html", javascript=javascript) as browser:
        box = f"{FIRST_CHART}.querySelector('.dots').getBoundingClientRect()"
        # The middle one of three points is the lowest, so that the line is on neither side below.
        x, y = browser.run(f"[{box}.left + {box}.width / 2, {box}.bottom]")
        around = pixels(browser.screenshot())[int(y) - 8 : int(y) + 8, int(x) - 8 : int(x) + 8]
        colored = (abs(around - (0x00, 0x72, 0xB2)).max(axis=2) <= 8).nonzero()
        lowest = colored[1][colored[0] >= colored[0].max() - 1]
        assert len(lowest) >= 4


def test_it_prints(page: Path) -> None:
    with Page(page) as browser:
        pdf = browser.pdf()
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


def test_tables_are_whole_on_paper(page: Path) -> None:
    with Page(page, width=718, print_media=True) as browser:
        missing = (
            "[...document.querySelectorAll('.wide')].map((e) => e.scrollWidth - e.clientWidth)"
        )
        assert set(browser.run(missing)) == {0}
        assert browser.run("document.documentElement.scrollWidth") <= 718


def test_the_legend_of_many_runs_leaves_room_and_has_their_dashes(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{i}_with_a_long_name", [3.0, 2.0]) for i in range(26)]
    out = tmp_path / "out.html"
    main([*map(str, runs), "--out", str(out)])
    with Page(out, width=390, height=844) as browser:
        assert browser.run("document.querySelector('.bar').offsetHeight") <= 0.3 * 844 + 1
        names = browser.run("[...document.querySelectorAll('.bar .run')].map((e) => e.className)")
        lines = browser.run(f"[...{LINES}].map((e) => e.getAttribute('class'))")
        assert [name.removeprefix("run ") for name in names] == [
            line.removeprefix("line ") for line in lines
        ]
        shown = browser.run(
            "[...document.querySelectorAll('.bar .run i')].map((e) => "
            "getComputedStyle(e).backgroundImage)"
        )
        assert len(set(shown)) == 19  # all but the first six, which are plain; 24 and 25 as 6 and 7
        assert browser.problems == []


def test_the_pointer_tells_the_nearest_of_many_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{i}", [float(i + 1)] * 3) for i in range(20)]
    runs.append(write_run(tmp_path / "nan", [None] * 3))
    out = tmp_path / "out.html"
    main([*map(str, runs), "--out", str(out)])
    with Page(out) as browser:
        browser.run("document.querySelector('.chart').scrollIntoView({block: 'end'})")
        left, top, width = browser.run(
            f"(() => {{ const b = {LINES}[16].getBoundingClientRect();"
            " return [b.left, b.top, b.width]; })()"
        )
        browser.move_mouse(left + width - 5, top + 2)
        tip = browser.run("document.querySelector('.tip').innerText").splitlines()
        assert tip[0] == "run16 step 3: 17" and len(tip) == 6
        assert {line.split()[0] for line in tip[1:]} >= {f"run{i}" for i in (14, 15, 17, 18)}


@pytest.mark.parametrize("javascript", [True, False])
def test_neighbours_on_an_axis_have_different_labels(tmp_path: Path, javascript: bool) -> None:
    losses: list[float | None] = [1.79994e-4 + i * 1e-10 for i in range(61)]
    run = write_run(tmp_path / "run", losses, every=1)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('{"step": ', '{"step": 1000'))
    main([str(run)])
    with Page(run / "report.html", javascript=javascript) as browser:
        texts = "[...document.querySelectorAll('.chart svg')[0].querySelectorAll('text')]"
        labels = browser.run(f"{texts}.map((e) => e.textContent)")
        assert len(set(labels)) == len(labels) > 5, labels
        outside = browser.run(
            f"(() => {{ const s = {FIRST_CHART}.getBoundingClientRect(); return {texts}.filter((e) "
            "=> { const b = e.getBoundingClientRect(); return b.left < s.left - 1 || b.right > "
            "s.right + 1; }).map((e) => e.textContent); })()"
        )
        assert outside == []
        path = browser.run(f"{LINES}[0].getAttribute('d')")
        assert len({point.partition(",")[2] for point in path.split()}) > 55  # no staircase


@pytest.mark.parametrize("javascript", [True, False])
def test_huge_values_have_short_labels(tmp_path: Path, javascript: bool) -> None:
    run = write_run(tmp_path / "run", [1e30, 2e30])
    main([str(run)])
    with Page(run / "report.html", javascript=javascript) as browser:
        labels = browser.run(
            "[...document.querySelectorAll('.chart text')].map((e) => e.innerHTML)"
        )
        assert {"1e30", "2e30"} <= set(labels)


def pixels(png: bytes):
    from matplotlib.image import imread

    return (imread(io.BytesIO(png))[:, :, :3] * 255).round().astype(int)


def count(picture, color: tuple[int, int, int]) -> int:
    return int((abs(picture - color).max(axis=2) <= 8).sum())
