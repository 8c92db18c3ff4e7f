"""Templates of scripts and manifests: `{{name}}` is replaced, everything else stays."""

from __future__ import annotations

import re
from importlib.resources import files

_PLACE = re.compile(r"\{\{(\w+)\}\}")


def fill(template: str, **values: str | int) -> str:
    """Fill in the file `templates/TEMPLATE`.

    A place that has a line for itself may take several lines, which get its indentation; if it
    takes none, the line goes.

    Raises:
        KeyError: the template has a place for which there is no value.
    """
    text = files("torchtitan.launching").joinpath("templates", template).read_text()
    lines: list[str] = []
    for line in text.splitlines():
        alone = _PLACE.fullmatch(line.strip())
        if alone:
            indent = line[: len(line) - len(line.lstrip())]
            inserted = str(values[alone[1]]).splitlines()
            lines += [indent + new if new else "" for new in inserted]
        else:
            lines.append(_PLACE.sub(lambda place: str(values[place[1]]), line))
    return "\n".join(lines) + "\n"
