"""Writes tables to a terminal, and plain ones to pipes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection

from rich import box
from rich.console import Console
from rich.table import Table

from .text import printable


def print_table(
    header: list[str], rows: list[list[str]], left: int, sections: bool = False
) -> None:
    """Write a table to stdout: a rich one to a terminal, else columns of text.

    Args:
        left: number of columns that are aligned to the left; the others are aligned to the right.
        sections: draw a line between rows whose first cells differ (on a terminal).
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        Console(markup=False, emoji=False).print(
            rich_table(header, rows, range(left), sections=sections)
        )
    else:
        sys.stdout.write(_plain_table(header, rows, left))


def rich_table(
    header: list[str],
    rows: list[list[str]],
    words: Collection[int],
    *,
    title: str | None = None,
    sections: bool = False,
    style: Callable[[list[str]], str] = lambda row: "",
) -> Table:
    """Return a table for a `console`.

    Args:
        words: columns that hold words, not numbers.
        sections: as in `print_table`.
        style: style of a row.
    """
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column, heading in enumerate(header):
        table.add_column(heading, justify="left" if column in words else "right", overflow="fold")
    previous = None
    for row in rows:
        if sections and previous not in (None, row[0]):
            table.add_section()
        previous = row[0]
        table.add_row(*row, style=style(row))
    return table


def console(width: int) -> Console:
    """Return a console that writes to stdout; `width` applies to pipes and logs, which have none.

    Cut columns would be worse there than long lines.
    """
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def _plain_table(header: list[str], rows: list[list[str]], left: int) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)
