"""The common part of the pages that commands write: one file, one style, no network access."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #57606a; --line: #d8dee4;
  --panel: #f6f8fa; --bad: #b00020; --good: #00734f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0f1419; --soft: #9aa5b1;
  --line: #30363d; --panel: #171d24; --bad: #ff7b85; --good: #3fb68b; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1160px; margin: 0 auto; padding: 1.5em 1em 3em; }
h1 { font-size: 1.6em; line-height: 1.25; margin: 0 0 .2em; overflow-wrap: anywhere; }
h2 { font-size: 1.15em; margin: 2em 0 .6em; }
p { margin: .4em 0; overflow-wrap: anywhere; } a { color: inherit; }
table { border-collapse: collapse; font-size: 14px; }
.wide { overflow-x: auto; }
th, td { text-align: right; padding: .3em .9em .3em 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; } .left { text-align: left; }
pre { background: var(--panel); padding: .8em; overflow-x: auto; font-size: 13px;
  white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 6px; }
summary { cursor: pointer; }
.soft { color: var(--soft); }
.badge { color: #fff; background: #57606a; border-radius: 4px; padding: .1em .5em;
  font-weight: 600; }
.badge.good { background: #00734f; } .badge.bad { background: #b00020; }
svg { max-width: 100%; height: auto; }
svg text { fill: currentColor; font: 12px system-ui, sans-serif; }
.drawn-on-white { background: #fff; color: #1b1f24; }
@media print { :root { --ink: #000; --paper: #fff; --soft: #444; --line: #bbb; --panel: #fff; }
  body { max-width: none; padding: 0; } h2 { break-after: avoid; }
  .wide { overflow: visible; } th, td { white-space: normal; font-size: 10px; padding-right: .5em; }
  .left { overflow-wrap: anywhere; } .badge { white-space: nowrap; } }
"""


class Html(str):
    """Text that is HTML already; `table` escapes all other text."""


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """Return a whole file, with `body`, `style` and `script` verbatim, and the title escaped."""
    code = f"<script>{script}</script>" if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>\n"
        f"<body>\n{body}\n{code}</body>\n</html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table that scrolls by itself on a narrow screen.

    Args:
        left: number of columns that are aligned to the left; the others are aligned to the right.
    """
    head = f"<thead>{_row('th', header, left)}</thead>" if any(header) else ""
    body = "".join(_row("td", row, left) for row in rows)
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def badge(text: str, kind: str = "") -> Html:
    """Return a highlighted word; `kind` is `good`, `bad` or nothing."""
    return Html(f'<span class="badge {kind}">{escape(text)}</span>')


def _row(tag: str, cells: Sequence[str], left: int) -> str:
    return f"<tr>{''.join(_cell(tag, cell, i < left) for i, cell in enumerate(cells))}</tr>"


def _cell(tag: str, text: str, left: bool) -> str:
    content = text if isinstance(text, Html) else escape(text)
    place = ' class="left"' if left else ""
    return f"<{tag}{place}>{content}</{tag}>"
