"""Fills templates of scripts and manifests: `{{name}}` is replaced, everything else stays."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

from torchtitan.errors import ConfigError

_PLACE = re.compile(r"\{\{(\w+)\}\}")
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that end a line of YAML, as `\\n` does, or are not allowed in YAML or UTF-8."""


def require_plain(text: str, where: str) -> None:
    """Raise `ConfigError`, beginning with `where`, if no script or manifest can hold `text`."""
    if unsafe := _UNSAFE.search(text):
        code = f"{ord(unsafe[0]):04x}"
        raise ConfigError(
            f"{where}: the character U+{code.upper()} cannot be sent to a cluster as it is; write "
            f'it as "\\u{code}" in TOML'
        )


def quoted(value: Any) -> str:
    """Format a value as JSON, which is YAML too: unquoted, the name `no` would be false."""
    return json.dumps(value, ensure_ascii=False)  # YAML does not know surrogate pairs of escapes


def fill(template: str, **values: str | int) -> str:
    """Fill in the file `templates/TEMPLATE`.

    A placeholder alone on a line may take several lines, which get its indentation; if it takes
    none, the line is removed.

    Raises:
        KeyError: the template has a placeholder without a value.
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
