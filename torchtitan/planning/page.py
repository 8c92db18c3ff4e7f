"""Draws a plan as one HTML file, which needs no network."""

from __future__ import annotations

from html import escape

from torchtitan.tools.html import page as html_page
from torchtitan.tools.html import table

from .devices import GIB
from .plan import Plan
from .report import CATEGORIES, Budget, headline, memory_rows, summary, traffic_rows, traffic_title
from .schedule import BACKWARD, FORWARD, INPUT, REDUCE, WEIGHT, Timeline

ACTIONS = {
    FORWARD: ("forward", "#4269d0"),
    BACKWARD: ("backward", "#3ca951"),
    INPUT: ("backward, inputs", "#6cc5b0"),
    WEIGHT: ("backward, weights", "#efb118"),
    REDUCE: ("reduction of gradients", "#ff725c"),
}
WIDTH, ROW, LEFT = 1000, 26, 90
_MOST_SPANS = 20_000  # more make a browser slow
_STYLE = """
.key span { display: inline-block; width: 1em; height: 1em; margin: 0 .4em 0 1em;
  vertical-align: -2px; }
td:last-child { white-space: nowrap; }
"""


def page(plan: Plan, budget: Budget | None = None) -> str:
    """Return the whole file."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in summary(plan, budget))
    timeline = ""
    if plan.timeline:
        timeline = (
            f"<h2>Pipeline schedule</h2>{_key(dict(ACTIONS.values()))}{_timeline(plan.timeline)}"
        )
    body = (
        f"<h1>{escape(headline(plan))}</h1>{lines}"
        f"<h2>Memory of a rank at its peak</h2>{_key(dict(CATEGORIES.values()))}{_memory(plan)}"
        f"{table(*memory_rows(plan))}{timeline}"
        f"<h2>Communication: {traffic_title(plan)}</h2>{table(*traffic_rows(plan))}"
    )
    return html_page(f"Plan of {plan.config.model.name}", body, style=_STYLE)


def _memory(plan: Plan) -> str:
    """Draw a bar for each rank of the pipeline, and a line at the device's limit."""
    scale = (WIDTH - LEFT) / (1.05 * max(plan.peak, plan.available))
    parts = []
    for row, rank in enumerate(plan.ranks):
        left, top = float(LEFT), row * ROW
        parts.append(_text(0, top + 17, f"rank {rank.pp_rank}"))
        for name, (label, color) in CATEGORIES.items():
            size = getattr(rank.memory, name)
            title = f"{label}: {size / GIB:.2f} GiB"
            parts.append(_bar(left, top, size * scale, color, title))
            left += size * scale
    height, limit = len(plan.ranks) * ROW, LEFT + plan.available * scale
    parts.append(
        f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="0" y2="{height}" stroke="#d00" '
        f'stroke-width="2"><title>{plan.available / GIB:.1f} GiB</title></line>'
    )
    return _svg(height, parts)


def _timeline(timeline: Timeline) -> str:
    """Draw a row for each rank of the pipeline. Later stages of a rank are paler."""
    number = sum(map(len, timeline.spans.values()))
    if number > _MOST_SPANS:
        return f"<p>{number:,} actions, too many to draw.</p>"
    scale = (WIDTH - LEFT) / timeline.seconds
    parts = []
    for row, (rank, spans) in enumerate(timeline.spans.items()):
        parts.append(_text(0, row * ROW + 17, f"rank {rank}"))
        stages = sorted({action.stage for action, _, _ in spans})
        for action, start, end in spans:
            what, color = ACTIONS[action.kind]
            title = f"stage {action.stage}, {what}"
            if action.kind != REDUCE:
                title += f", micro-batch {action.micro_batch}"
            title += f": {start:.4f} to {end:.4f} s"
            opacity = 1 - 0.5 * stages.index(action.stage) / len(stages)
            left, width = LEFT + start * scale, (end - start) * scale
            parts.append(_bar(left, row * ROW, width, color, title, opacity))
    return _svg(len(timeline.spans) * ROW, parts)


def _svg(height: float, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}">{"".join(parts)}</svg>'
    )


def _bar(
    left: float, top: float, width: float, color: str, title: str, opacity: float = 1.0
) -> str:
    return (
        f'<rect x="{left:.4f}" y="{top + 3}" width="{max(width, 0):.4f}" height="{ROW - 6}" '
        f'fill="{color}" fill-opacity="{opacity:.2f}" stroke="#fff" stroke-width="0.5">'
        f"<title>{escape(title)}</title></rect>"
    )


def _text(left: float, top: float, text: str) -> str:
    return f'<text x="{left}" y="{top}">{escape(text)}</text>'


def _key(colors: dict[str, str]) -> str:
    items = "".join(
        f'<span style="background:{color}"></span>{escape(label)}'
        for label, color in colors.items()
    )
    return f'<p class="key">{items}</p>'
