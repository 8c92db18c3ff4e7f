"""Read TOML files with the line of each key, and write a config as TOML."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.errors import ConfigError, outage_or

from .check import MOST_LEVELS
from .check import Path as KeyPath

# These keys control how the program starts; they do not describe the run.
_NOT_SAVED = {("job", "config_file"), ("job", "print_config")}


@dataclass
class TomlFile:
    """A TOML file and its parsed content."""

    path: str
    text: str
    table: dict[str, Any]

    @classmethod
    def read(cls, path: str) -> TomlFile:
        """Read a file. Raises `ConfigError` if it cannot be read, is empty or not TOML in UTF-8."""
        try:
            data = Path(path).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            problem = f"job.config_file = {path!r}: cannot read it: {reason}"
            raise outage_or(ConfigError, problem, error) from error
        if not data.strip():  # as a full disk leaves it; all defaults are another job
            raise ConfigError(f"job.config_file = {path!r}: the file is empty")
        try:
            text = data.decode("utf-8-sig").replace("\r\n", "\n")
            return cls(path, text, tomllib.loads(text))
        except UnicodeDecodeError as error:
            line: int | str = data.count(b"\n", 0, error.start) + 1
            problem = f"byte 0x{data[error.start]:02x} is not UTF-8 text"
            raise ConfigError(f"{path}:{line}: {problem}") from error
        except RecursionError as error:
            raise ConfigError(f"{path}: not valid TOML: nested too deeply") from error
        except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
            message = str(error).replace("(at end of document)", "(at the end of the file)")
            position = re.search(r" \(at line (\d+), column (\d+)\)", message)
            if position:
                line, column = position.groups()
                message = f"{message[: position.start()]} (column {column})"
            else:
                line = text.count("\n") + 1
            if "Invalid hex value" in message or "Unescaped '\\'" in message:
                message += ". Write backslashes twice, or the string in single quotes"
            elif message.startswith("Cannot overwrite a value"):
                message += ". The key is there twice"
            elif message.startswith("Invalid value"):
                message += ". Write text in quotes, and true or false in lower case"
            raise ConfigError(f"{path}:{line}: not valid TOML: {message}") from error

    def where(self, path: KeyPath) -> str:
        """Return `file.toml:12: [section] key` for the path of a value in this file."""
        lines = line_numbers(self.text)
        known = path
        while known not in lines and known:
            known = known[:-1]
        section, *keys = path
        dotted = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in keys).lstrip(".")
        return f"{self.path}:{lines.get(known, 1)}: [{section}] {dotted}".rstrip()


def line_numbers(text: str) -> dict[KeyPath, int]:
    """Return the line of each table and key of a valid TOML document, by its path.

    `tomllib` gives no positions. But each statement (a header, or a `key = value` of one or more
    lines) is itself a TOML document, and no leading part of it is. So lines are collected until
    they parse, and the keys they hold get the number of the first collected line.
    """
    lines: dict[KeyPath, int] = {}
    last_index: dict[KeyPath, int] = {}  # array of tables -> index of the element now open
    header: KeyPath = ()
    statement, start = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except ValueError:
            continue
        if statement.lstrip().startswith("["):
            header = _open_table(parsed, last_index)
            for depth in range(1, min(len(header), MOST_LEVELS) + 1):
                lines.setdefault(header[:depth], start)
        else:
            _record(parsed, header, start, lines)
        statement, start = "", number + 1
    return lines


def _open_table(parsed: dict[str, Any], last_index: dict[KeyPath, int]) -> KeyPath:
    """Return the path that a header opens, given the header parsed alone: `[a.b]` or `[[a.b]]`."""
    path: KeyPath = ()
    node: Any = parsed
    while node:
        key, node = next(iter(node.items()))
        path = (*path, key)
        if isinstance(node, list):
            last_index[path] = last_index.get(path, -1) + 1
            node = None
        if path in last_index:
            path = (*path, last_index[path])
    return path


def _record(value: Any, path: KeyPath, line: int, lines: dict[KeyPath, int]) -> None:
    todo = [(path, value)]
    while todo:
        path, value = todo.pop()
        if len(path) > MOST_LEVELS:
            continue
        lines.setdefault(path, line)
        if isinstance(value, dict):
            todo += [((*path, key), item) for key, item in value.items()]
        elif isinstance(value, list):
            todo += [((*path, i), item) for i, item in enumerate(value)]


def to_toml(config: Any) -> str:
    """Return a config as TOML that loads to an equal config.

    `job.config_file` and `job.print_config` are left out. TOML has no null, so unset values are
    written as comments, or as "none" if they have a default.
    """
    lines, default = [], type(config)()
    for section in dataclasses.fields(config):
        lines.append(f"[{_key(section.name)}]")
        values, defaults = getattr(config, section.name), getattr(default, section.name)
        for field in dataclasses.fields(values):
            if (section.name, field.name) in _NOT_SAVED:
                continue
            value = getattr(values, field.name)
            if value is None and getattr(defaults, field.name) is None:
                lines.append(f"# {field.name} is unset")
            else:
                lines.append(f"{_key(field.name)} = {format_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else _string(name)


def _string(text: str) -> str:
    # JSON's escapes are valid TOML, but JSON does not escape DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def format_value(value: Any) -> str:
    """Return a config value in TOML notation; dataclasses and dicts become inline tables."""
    if dataclasses.is_dataclass(value):
        pairs = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
        value = {f.name: v for f, v in pairs if not (v is None and f.default is None)}
    if isinstance(value, dict):
        written = [f"{_key(str(k))} = {format_value(v)}" for k, v in value.items()]
        return f"{{{', '.join(written)}}}"
    if value is None:
        return _string("none")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, str):
        return _string(value)
    return str(value).lower() if isinstance(value, bool) else repr(value)


def toml_value(text: str) -> Any:
    """Return a value that is written as in TOML; other text stands for itself, without quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text
