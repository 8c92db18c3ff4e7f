"""Writes the report as one HTML file, which needs no network and no JavaScript."""

from __future__ import annotations

import json
from datetime import datetime
from html import escape
from importlib.resources import files
from itertools import groupby

from torchtitan.tools.html import page as html_page
from torchtitan.tools.html import table

from .charts import MANY, Chart, build_charts, look, svg, to_json
from .run import Run
from .tables import (
    CHECKPOINT_HEADER,
    RUN_HEADER,
    checkpoint_rows,
    config_changes,
    config_differences,
    environment_rows,
    run_rows,
    warnings,
)


def report_page(runs: list[Run]) -> str:
    """Return the whole file."""
    charts = build_charts(runs)
    title = title_of(runs)
    now = datetime.now().strftime("%Y-%m-%d %H:%M")
    facts = environment_rows(runs)
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(", ".join(str(run.folder) for run in runs))}. Made {now}.</p>',
        table(*_without_empty_columns(RUN_HEADER, run_rows(runs)), left=2),
        *(f'<p class="warn">{escape(text)}</p>' for text in warnings(runs)),
        _bar(runs) if charts else "",
        _charts(charts, runs),
        _config(runs),
        _section("Checkpoints", CHECKPOINT_HEADER, checkpoint_rows(runs), 4),
        f"<h2>Environment</h2>{_compared(_header('', runs), facts, runs)}" if facts else "",
    ]
    data = json.dumps(to_json(runs, charts), separators=(",", ":")).replace("<", "\\u003c")
    sections.append(f'<script type="application/json" id="data">{data}</script>')
    own = files(__package__)
    return html_page(
        title,
        "\n".join(section for section in sections if section),
        style=(own / "style.css").read_text(),
        script=(own / "script.js").read_text() if charts else "",
    )


def title_of(runs: list[Run]) -> str:
    """Return a single run's description, the names of several runs, or the number of many."""
    if len(runs) > MANY:
        return f"{len(runs)} runs"
    if len(runs) > 1:
        return ", ".join(run.name for run in runs)
    [run] = runs
    description = run.config.get("job.description", "")
    return description if description not in ("", "default job") else run.name


def _without_empty_columns(
    header: list[str], rows: list[list[str]]
) -> tuple[list[str], list[list[str]]]:
    kept = [i for i in range(len(header)) if i < 2 or any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _bar(runs: list[Run]) -> str:
    """Return the legend, and the controls that `script.js` enables."""
    legend = "".join(
        f'<span class="run {look(i)}"><i></i>{escape(run.name)}</span>'
        for i, run in enumerate(runs)
    )
    smoothing = (
        '<label class="tools" hidden>smoothing '
        '<input type="range" min="0" max="100" value="0" step="5"></label>'
    )
    return f'<div class="bar">{legend}{smoothing}</div>'


def _charts(charts: list[Chart], runs: list[Run]) -> str:
    parts = []
    for section, members in groupby(charts, key=lambda chart: chart.section):
        figures = "".join(
            f'<figure class="chart"><figcaption>{escape(chart.title)} '
            f"<small>{escape(chart.unit)}</small></figcaption>{svg(chart, runs)}</figure>"
            for chart in members
        )
        grid = f'<div class="charts">{figures}</div>'
        heading = f"<h2>{escape(section)}</h2>"
        if section == "More":
            parts.append(f"<details><summary>{heading}</summary>{grid}</details>")
        else:
            parts.append(heading + grid)
    if any(line.low for chart in charts for line in chart.lines):
        parts.append(
            '<p class="soft">A point stands for several logged steps: the line is their mean, '
            "the band reaches from the lowest to the highest.</p>"
        )
    elif len(runs) > MANY:
        parts.append(
            '<p class="soft">A point may stand for several logged steps, by their mean.</p>'
        )
    return "".join(parts)


def _config(runs: list[Run]) -> str:
    if not any(run.config for run in runs):
        return ""
    parts = []
    if len(runs) > 1:
        differences = config_differences(runs)
        parts.append("<h2>Differences between the configs</h2>")
        parts.append(
            _compared(_header("key", runs), differences, runs) if differences else "<p>None.</p>"
        )
    changes = config_changes(runs)
    header = ["key", "default", *(run.name for run in runs)]
    parts.append("<h2>Config</h2>")
    parts.append(
        _compared(header, changes, runs) if changes else "<p>All options have their defaults.</p>"
    )
    for run in runs:
        if run.config_text:
            parts.append(
                f"<details><summary>All of {escape(run.name)}</summary>"
                f"<pre>{escape(run.config_text)}</pre></details>"
            )
    return "".join(parts)


def _compared(header: list[str], rows: list[list[str]], runs: list[Run]) -> str:
    """Return a table with a column for each run, or with a row for each of many."""
    if len(runs) > MANY:
        lines = zip(["run", *header[1:]], *rows, strict=True)
        header, *rows = map(list, lines)
    return table(header, rows, len(header))


def _header(first: str, runs: list[Run]) -> list[str]:
    return [first, *(run.name if len(runs) > 1 or first else "" for run in runs)]


def _section(title: str, header: list[str], rows: list[list[str]], left: int) -> str:
    return f"<h2>{title}</h2>{table(header, rows, left)}" if rows else ""
