"""Tables on a terminal, and plain ones for pipes."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(
    header: list[str], rows: list[list[str]], left: int, sections: bool = False
) -> None:
    """Write a table to stdout: a rich one to a terminal, else columns of text.

    Args:
        left: so many columns are aligned to the left, the others to the right.
        sections: a line between rows whose first cells differ (on a terminal).
    """
    if sys.stdout.isatty():
        Console().print(_rich_table(header, rows, left, sections))
    else:
        sys.stdout.write(_plain_table(header, rows, left))


def _rich_table(header: list[str], rows: list[list[str]], left: int, sections: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column, title in enumerate(header):
        table.add_column(title, justify="left" if column < left else "right")
    previous = None
    for row in rows:
        if sections and previous not in (None, row[0]):
            table.add_section()
        previous = row[0]
        table.add_row(*row)
    return table


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
