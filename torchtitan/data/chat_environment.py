"""The environment in which chat templates are rendered: the same as in `transformers`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .chat import MARKS


def compile_template(source: str) -> tuple[jinja2.Template, bool, bool]:
    """Return a chat template, whether it reads tools, and whether it has `{% generation %}` blocks.

    With blocks, what it writes contains `MARKS`.

    Raises:
        jinja2.TemplateError: it is no Jinja template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    # The same time for all renderings, so that a conversation does not change between two of them.
    today = datetime.now()
    if date_is_fixed():
        today = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), UTC)
    environment.globals["strftime_now"] = today.strftime
    parsed = environment.parse(source)
    reads_tools = "tools" in meta.find_undeclared_variables(parsed)
    extensions = (node.identifier for node in parsed.find_all(nodes.ExtensionAttribute))
    has_marks = _Generation.identifier in extensions
    template = environment.from_string(source, globals={"tools": None, "documents": None})
    return template, reads_tools, has_marks


def date_is_fixed() -> bool:
    """Whether runs on any day write the same date, see reproducible-builds.org."""
    return os.environ.get("SOURCE_DATE_EPOCH", "").isdecimal()


class _Generation(Extension):
    """`{% generation %}`: writes the assistant's text between `MARKS`."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        return caller().join(MARKS)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without the escaping of HTML characters done by Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
