"""Writes the result as a self-contained page, and the figure as a PNG."""

from __future__ import annotations

from html import escape
from pathlib import Path

from torchtitan.components.environment import environment
from torchtitan.config.batch import batch_sizes
from torchtitan.tools.figures import png
from torchtitan.tools.html import Html, badge, table
from torchtitan.tools.html import page as html_page
from torchtitan.tools.result_file import write_result

from .match import may_differ
from .report import (
    DETAIL_HEADER,
    HEADER,
    STATES,
    Result,
    detail_rows,
    rows,
    verdict_lines,
)


def write_page(result: Result, out: Path, plots: bool) -> None:
    """Write `report.html` and, with `plots`, `curves.png`; remove an earlier comparison's."""
    picture = out / "curves.png"
    picture.unlink(missing_ok=True)
    figure = "<p>No plots: matplotlib is not installed.</p>"
    if plots:
        from .plots import draw, svg

        drawn = draw(result)
        write_result(str(picture), png(drawn), "--out")
        figure = svg(drawn)
    write_result(str(out / "report.html"), page(result, figure), "--out")


def page(result: Result, figure: str) -> str:
    """Return the whole page; `figure` is HTML."""
    control = result.control.run.name
    title = f"{'Equal to' if result.equal else 'Not equal to'} {control}"
    sections = [
        f"<h1>{escape(title)}</h1><p>{_scope(result)}</p>",
        table(HEADER, [[*cells, _verdict_badge(state)] for *cells, state in rows(result)]),
        *(f"<pre>{escape(text)}</pre>" for text in verdict_lines(result)),
        f'<h2>Curves</h2><div class="drawn-on-white">{figure}</div>',
        f"<h2>Relative differences from {escape(control)}</h2>",
        "<p>|test &minus; control| / |control|. "
        "A test is equal if no step is beyond the tolerance.</p>",
        table(DETAIL_HEADER, detail_rows(result), left=2),
        f"<h2>Differences between the configs</h2>{_config_table(result)}",
        "<h2>Environment of the comparison</h2>",
        table(["", ""], [list(fact) for fact in environment().items()], left=2),
        f"<h2>Command</h2><pre>{escape(result.command)}</pre>",
    ]
    return html_page(title, "\n".join(sections), style="svg { width: 100%; }")


def _scope(result: Result) -> str:
    """Describe the settings that all runs share."""
    run = result.control.run
    training = run.config.training
    ramp = training.batch_size_ramp
    batch = batch_sizes(run.config, 1) if ramp else run.global_batch_size
    what = (
        f"{run.config.model}, {training.steps} steps of {batch} sequences of "
        f"{training.seq_len} tokens from {training.dataset}, seed {run.config.debug.seed}"
    )
    return escape(what)


def _config_table(result: Result) -> str:
    names = [outcome.run.name for outcome in result.outcomes]
    lines = [
        [key, *values, "" if may_differ(key) else "allowed to differ by the user"]
        for key, values in result.config_differences.items()
    ]
    header = ["key", *names, ""]
    return table(header, lines, left=len(header)) if lines else "<p>None.</p>"


def _verdict_badge(state: str) -> Html:
    kinds = {"green": "good", "red": "bad"}
    return badge(state, kinds.get(STATES[state], ""))
