"""`torchtitan report`: what it reads and writes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from report_folder import write_run

from torchtitan.commands.report.command import main
from torchtitan.commands.report.run import read_runs
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.storage import FileRecord
from torchtitan.errors import ConfigError
from torchtitan.tools import figures

LOSSES = [3.0, 2.5, 2.25]


def text_of(page: Path) -> str:
    """The page without tags: cells and words with a blank between them."""
    body = page.read_text().partition("<body>")[2].partition('<script type="application/json"')[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_a_page_says_all_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "mine", LOSSES, "--optimizer.lr=2e-3", "--job.description=A try")
    values = '"loss": 2.75, "loss/code": 1.5, "accuracy": 0.5'
    (run / "validation.jsonl").write_text(f'{{"step": 3, {values}}}\n')
    step = run / "checkpoint" / "step-3"
    step.mkdir(parents=True)
    Manifest(3, False, {}, files={"weights": FileRecord(2_000_000, "0" * 8)}).write(step)
    (run / "checkpoint" / "step-2").mkdir()
    assert main([str(run)]) == 0
    page = run / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    text = text_of(page)
    assert text.startswith(" A try ")
    assert "mine finished 3 of 3 2.2500 2.7500 4.00 K 3.00 GiB 0:00:00 llama3 debugmodel" in text
    assert "2 processes: dp_shard of the rest" in text
    assert "optimizer.lr 0.0008 0.002 " in text
    assert "step-2 damaged" in text
    assert "step-3 whole state" in text and "2.00 MB" in text
    assert "device cuda (H100) host node1 processes 2" in text
    titles = re.findall(r"<figcaption>(.*?) <small>", page.read_text())
    assert titles == [
        "Loss",
        "Validation loss",
        "Validation loss: code",
        "Validation: accuracy",
        "Gradient norm",
        "Learning rate",
        "Throughput",
        "Peak memory of rank 0",
        "Waiting for data, rank 0",
        "Throughput of a device",
        "Time",
    ]


def test_a_run_is_shown_with_its_changed_args(tmp_path: Path) -> None:
    options = ["--model.args.n_layers=2", "--model.args.moe.top_k=1"]
    changed, usual = write_run(tmp_path / "a", [2.0], *options), write_run(tmp_path / "b", [2.0])
    assert main([str(changed), str(usual), "--out", str(tmp_path / "page.html")]) == 0
    text = text_of(tmp_path / "page.html")
    assert "llama3 debugmodel (n_layers = 2, moe.top_k = 1)" in text
    assert "model.args.n_layers 2 unset" in text


def test_time_and_memory_are_of_all_processes_of_a_run(tmp_path: Path) -> None:
    """Two resumptions: 100 s, 40 s, and 70 s so far. The last process needed the least memory."""
    run = write_run(tmp_path / "run", [3.0] * 6)
    seconds, memory = [50, 100, 40, 30, 60, 70], [2, 5, 4, 1, 1, 1]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row, elapsed, size in zip(rows, seconds, memory, strict=True):
        row |= {"elapsed_seconds": elapsed, "peak_memory_bytes": size * 2**30}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(run)]) == 0
    assert "5.00 GiB 0:03:30" in text_of(run / "report.html")


def test_a_process_that_begins_with_a_long_step_is_another_one(tmp_path: Path) -> None:
    """120 s, then 190 s of which the first step took 130; they have their starts."""
    run = write_run(tmp_path / "run", [3.0] * 4)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row, elapsed, start in zip(rows, [60, 120, 130, 190], [7, 7, 9, 9], strict=True):
        row |= {"elapsed_seconds": elapsed, "started_at": start}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(run)]) == 0
    page = run / "report.html"
    assert "3.00 GiB 0:05:10" in text_of(page)
    assert "Start of the process" not in page.read_text()


def test_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", LOSSES, "--optimizer.lr=1e-3")
    write_run(tmp_path / "b", LOSSES, "--optimizer.lr=3e-3", "--training.steps=9")
    assert main(["a", "b"]) == 0
    text = text_of(tmp_path / "report.html")
    differences = text.partition("Differences between the configs")[2].partition("Config")[0]
    assert "optimizer.lr 0.001 0.003" in differences
    assert "training.steps 3 9" in differences
    assert "seq_len" not in differences
    assert "b unfinished last step at" in text


def test_many_runs_are_rows_without_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(7):
        write_run(tmp_path / f"run{i}", [2.0, 1.0] * 400, f"--optimizer.lr={i + 1}e-3")
    runs = [f"run{i}" for i in range(7)]
    page = tmp_path / "report.html"
    assert main(runs) == 0
    text = text_of(page)
    assert text.startswith(" 7 runs run0, run1,")
    assert "run optimizer.lr run0 0.001 run1 0.002" in text
    assert "default 0.0008" in text and "by their mean" in text
    assert 'class="band c0"' not in page.read_text()
    assert main(runs[:6]) == 0
    assert 'class="band c0"' in page.read_text()
    assert "optimizer.lr 0.001 0.002 0.003 0.004 0.005 0.006" in text_of(page)


def test_runs_of_equal_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, LOSSES) for name in ("a/outputs", "b/outputs", "c")]
    runs = read_runs([*map(str, folders), str(folders[0])])
    assert [run.name for run in runs] == ["a/outputs", "b/outputs", "c", "a/outputs-2"]


def test_keys_that_nobody_knows_are_plotted(tmp_path: Path) -> None:
    more = {
        "zebra": 3,
        "zoo/zebra": 3,
        "data_tokens/web": 5.0,
        "name": "not a number",
        "flag": True,
    }
    run = write_run(tmp_path / "run", LOSSES, **more)
    main([str(run)])
    titles = re.findall(r"<figcaption>(.*?) <small>", (run / "report.html").read_text())
    assert {"zebra", "zoo/zebra"} <= {*titles} and "Tokens of a source: web" in titles
    assert not {"name", "flag", "step"} & set(titles)


@pytest.mark.parametrize("end", ['{"step": 4, "lo', '{"step": 4}', "\0\0\0"])
def test_a_run_that_goes_on_is_read_up_to_its_last_whole_line(tmp_path: Path, end: str) -> None:
    run = write_run(tmp_path / "run", LOSSES, "--training.steps=100")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(end)
    main([str(run)])
    text = text_of(run / "report.html")
    assert "run unfinished last step at" in text
    assert "3 of 100 2.2500" in text


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_without_a_step_yet_is_no_error(tmp_path: Path, begun: bool) -> None:
    run = write_run(tmp_path / "run", [])
    if not begun:  # it loads its weights
        (run / "metrics.jsonl").unlink()
    main([str(run)])
    text = text_of(run / "report.html")
    assert "run has not logged a step yet." in text and "last step at" not in text


def test_a_run_without_config_and_environment_has_its_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", LOSSES)
    (run / "config.resolved.toml").unlink()
    (run / "environment.json").unlink()
    main([str(run)])
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 8
    assert "<h2>Config" not in page and "<h2>Environment" not in page


def test_what_is_not_finite_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [3.0, None, 2.0, None])
    main([str(run)])
    assert "run: loss is not finite at step 2 and 1 more." in text_of(run / "report.html")


def test_steps_that_the_guard_skipped_are_not_called_not_finite(tmp_path: Path) -> None:
    """They are null too; step 6, at which none was skipped, is not one of them."""
    run = write_run(tmp_path / "run", [3.0, None, 2.0, None, None, None])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row, skipped in zip(rows, [0, 1, 1, 2, 3, 3], strict=True):
        row |= {"steps_skipped": skipped, "grad_norm": row["loss"]}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main([str(run)])
    text = text_of(run / "report.html")
    assert "run: the guard skipped the batches of 3 steps, the first by step 2." in text
    assert "run: loss is not finite at step 6." in text
    drawn = (run / "report.html").read_text().partition("<script")[0]
    assert drawn.count('class="mark"') == 2  # of the loss and of the norm


def test_checkpoints_behind_a_url_are_not_looked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", LOSSES, "--checkpoint.folder=s3://bucket/run")
    main([str(run)])
    assert "<h2>Checkpoints" not in (run / "report.html").read_text()


def test_passwords_in_urls_are_not_passed_on(tmp_path: Path) -> None:
    options = ["--checkpoint.folder=memory://me:hunter2@host/ck"]
    main([str(write_run(tmp_path / "run", LOSSES, *options))])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "memory://me:***@host/ck" in page and "hunter2" not in page


def test_names_are_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>&'", LOSSES, "--job.description=</script><i>x")
    other = write_run(tmp_path / "other", LOSSES)
    out = tmp_path / "out.html"
    main([str(run), str(other), "--out", str(out)])
    page = out.read_text()
    assert "<b>" not in page and "<i>x" not in page
    assert "&lt;b&gt;&amp;" in page


def test_a_long_run_is_a_small_page_that_keeps_its_extremes(tmp_path: Path) -> None:
    losses: list[float | None] = [2.0] * 20_000
    losses[12_345] = 77.0
    runs = [write_run(tmp_path / name, losses, zebra=1) for name in "abc"]
    out = tmp_path / "out.html"
    main([*map(str, runs), "--out", str(out)])
    assert out.stat().st_size < 2e6
    page = out.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert max(data["charts"][0]["lines"][0]["high"]) == 77.0
    assert "the band reaches from the lowest to the highest" in page


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [str(write_run(tmp_path / name, LOSSES)) for name in "ab"]
    files = [str(tmp_path / "out.html"), str(tmp_path / "out.png")]
    assert main([*runs, "--out", files[0], "--png", files[1]]) == 0
    from matplotlib.image import imread

    picture = imread(files[1])
    assert picture.shape[1] > 1000 and picture.std() > 0.05


def test_a_picture_draws_from_zero_and_says_all_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from torchtitan.commands.report.figure import draw

    names = [f"llama3_1b_fineweb_lr3e-4_wd0.1_seed{i}" for i in range(14)] + ["x" * 200]
    folders = [write_run(tmp_path / name, [3.0, None, 2.0]) for name in names]
    figure = draw(read_runs(list(map(str, folders))))
    FigureCanvasAgg(figure).draw()
    page = figure.bbox
    [legend] = figure.legends
    assert len(legend.get_texts()) == 15
    for text in [*legend.get_texts(), figure._suptitle]:
        box = text.get_window_extent()
        assert box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0, text
    axes = {one.get_title(loc="left"): one for one in figure.axes}
    for title, panel in axes.items():
        box = panel.get_window_extent()
        assert box.height > 150, title
    assert axes["Throughput (tokens/s)"].get_ylim()[0] == 0
    assert axes["Loss (per token)"].get_ylim()[0] > 1
    marks = [line for line in axes["Loss (per token)"].lines if line.get_marker() == "^"]
    assert [list(line.get_xdata()) for line in marks] == [[2]] * 15


@pytest.mark.parametrize(
    "length", [18, 66, *(pytest.param(n, marks=pytest.mark.long) for n in (15, 23, 30))]
)
def test_the_legend_of_a_picture_is_whole(tmp_path: Path, length: int) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from torchtitan.commands.report.figure import draw

    names = [f"run{i}_{'wide_lr3e-4m' * 6}"[:length] for i in range(10, 17)]
    figure = draw(read_runs([str(write_run(tmp_path / name, [3.0, 2.0])) for name in names]))
    FigureCanvasAgg(figure).draw()
    [legend] = figure.legends
    assert 0.4 < legend.get_window_extent().width / figure.bbox.width < 1


def test_a_picture_without_matplotlib_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", LOSSES)
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--png x.png: matplotlib .* pip install"):
        main([str(run), "--png", "x.png"])


DEEP = "[" * 500_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folder of a run"),
        (["nowhere"], "nowhere: no such folder"),
        (["runs"], "not the folder of a run: it has no metrics.jsonl. Runs in it: runs/good"),
        (["runs/empty"], "not the folder of a run: it has no metrics.jsonl$"),
        (["runs/good/metrics.jsonl"], "a file. Give the folder of a run"),
        (["runs/good", "--out", "nowhere/x.html"], "--out nowhere/x.html: there is no such folder"),
        (["runs/good", "--png", "nowhere/x.png"], "--png nowhere/x.png: there is no such folder"),
        (["runs/good", "--out", "runs"], "--out runs: a folder. Give a file"),
    ],
)
def test_a_mistake_is_a_config_error(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "good", LOSSES)
    (tmp_path / "runs" / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        main(arguments)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 2}\n', r"metrics.jsonl:2: not a logged"),
        ("metrics.jsonl", '[1]\n{"step": 2}\n', r"metrics.jsonl:1: not a logged step"),
        ("metrics.jsonl", f'{DEEP}\n{{"step": 2}}\n', r"metrics.jsonl:1: not a logged step"),
        ("metrics.jsonl", '{"step": 1e400}\n{"step": 2}\n', r"metrics.jsonl:1: not a logged"),
        ("config.resolved.toml", "a = [", r"config.resolved.toml is damaged"),
        ("config.resolved.toml", f"a = {DEEP}", r"config.resolved.toml is damaged"),
        ("config.resolved.toml", 'checkpoint.folder = "\\u0000"', r"run: cannot read it"),
        ("environment.json", "[]", r"environment.json is damaged: it holds no JSON object"),
        ("environment.json", DEEP, r"environment.json is damaged: nested too deeply"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    run = write_run(tmp_path / "run", LOSSES)
    (run / file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        main([str(run)])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", f'{{"step": 1, "loss": 1{"0" * 400}, "lr": "x", "steps_skipped": []}}\n'),
        ("config.resolved.toml", "[job]\ndescription = 5\n[checkpoint]\nfolder = 5\n"),
        ("config.resolved.toml", "[training]\nsteps = 'x'\n[model]\nname = [1]\n"),
        ("environment.json", '{"\\ud800": "\\ud800"}'),
    ],
)
def test_what_no_run_has_written_is_left_out(tmp_path: Path, file: str, content: str) -> None:
    run = write_run(tmp_path / "run", LOSSES)
    (run / file).write_text(content)
    assert main([str(run)]) == 0


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", LOSSES)
    (run / "config.resolved.toml").unlink()
    os.mkfifo(run / "config.resolved.toml")
    with pytest.raises(ConfigError, match=r"config.resolved.toml cannot be read: it is not a file"):
        main([str(run)])


def test_a_mistake_ends_with_2_and_one_line(tmp_path: Path, capsys, monkeypatch) -> None:
    from torchtitan import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["torchtitan"])
    with pytest.raises(SystemExit) as end:
        cli.main(["report", "nowhere"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: nowhere: no such folder\n"
