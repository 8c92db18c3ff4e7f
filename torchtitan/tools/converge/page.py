"""The result as a page that needs nothing but itself, and the figure as a PNG."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .match import may_differ
from .report import (
    DETAIL_HEADER,
    HEADER,
    STATES,
    Result,
    detail_rows,
    environment,
    failure_line,
    rows,
    verdict_line,
)

logger = logging.getLogger("torchtitan")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff;
       max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { font-size: 1.15em; margin-top: 2em; }
.badge { color: #fff; border-radius: 4px; padding: .1em .5em; font-weight: 600; }
.equal { background: #00734f; } .diverged, .failed { background: #b00020; }
.control { background: #555; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .3em .8em; border-bottom: 1px solid #ddd;
         white-space: nowrap; }
th { border-bottom: 2px solid #888; } td { font-variant-numeric: tabular-nums; }
pre { background: #f5f5f5; padding: .8em; overflow-x: auto; font-size: 13px;
      white-space: pre-wrap; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; }
"""


def can_plot() -> bool:
    """Whether matplotlib is there; a warning if it is not."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    logger.warning(
        "matplotlib is not installed, so there will be no plots: pip install 'torchtitan[plots]'"
    )
    return False


def write_page(result: Result, out: Path, plots: bool) -> None:
    """Write `report.html` and, with `plots`, `curves.png`. One of an earlier comparison goes."""
    picture = out / "curves.png"
    picture.unlink(missing_ok=True)
    figure = "<p>No plots: matplotlib is not installed.</p>"
    if plots:
        from .plots import draw, png, svg

        drawn = draw(result)
        picture.write_bytes(png(drawn))
        figure = svg(drawn)
    (out / "report.html").write_text(page(result, figure), encoding="utf-8")


def page(result: Result, figure: str) -> str:
    """The whole page; `figure` is HTML."""
    control = result.control.run.name
    title = f"{'Equal to' if result.equal else 'Not equal to'} {control}"
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<p>{_scope(result)}</p>
<div class="wide">{_table(HEADER, rows(result))}</div>
{_verdicts(result)}
<h2>Curves</h2>
{figure}
<h2>Relative differences from {escape(control)}</h2>
<p>|test &minus; control| / |control|. A test is equal if no step is beyond the tolerance.</p>
<div class="wide">{_table(DETAIL_HEADER, detail_rows(result))}</div>
<h2>Differences between the configs</h2>
<div class="wide">{_config_table(result)}</div>
<h2>Environment of the comparison</h2>
{_table(["", ""], [list(fact) for fact in environment().items()])}
<h2>Command</h2>
<pre>{escape(result.command)}</pre>
</body>
</html>
"""


def _scope(result: Result) -> str:
    """What was the same in all runs."""
    run = result.control.run
    training = run.config.training
    what = (
        f"{run.config.model.name} {run.config.model.flavor}, {training.steps} steps of "
        f"{run.global_batch_size} sequences of {training.seq_len} tokens from "
        f"{training.dataset}, seed {run.config.debug.seed}"
    )
    return escape(what)


def _verdicts(result: Result) -> str:
    control = result.control
    texts = [verdict_line(verdict, control.run.name) for verdict in result.verdicts]
    if control.problems():
        texts.insert(0, failure_line(control))
    return "".join(f"<pre>{escape(text)}</pre>" for text in texts)


def _config_table(result: Result) -> str:
    names = [outcome.run.name for outcome in result.outcomes]
    lines = [
        [key, *values, "" if may_differ(key) else "allowed to differ by the user"]
        for key, values in result.config_differences.items()
    ]
    return _table(["key", *names, ""], lines) if lines else "<p>None.</p>"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, line))}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    if text in STATES:
        return f'<td><span class="badge {text}">{text}</span></td>'
    return f"<td>{escape(text)}</td>"
