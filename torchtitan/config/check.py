"""Check the values of a TOML table or command line against the dataclasses' annotations."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from torchtitan.errors import did_you_mean
from torchtitan.tools.text import is_unicode

from .base import Range
from .upstream import value_instead

T = TypeVar("T")
Path = tuple[str | int, ...]
"""Keys and array indices that lead to a value: `("optimizer", "rules", 0, "pattern")`."""

_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
UNSET = ("none", "None")
"""What stands for None, which TOML lacks."""
_CLASS = "class"
"""A key that says which of several dataclasses a table is of."""
MOST_LEVELS = 16
"""Maximum depth of values of any type, and of paths whose lines are recorded. A config needs fewer;
hostile files have any."""


class Mistake(NamedTuple):
    """A key that its table does not have, or a value that its annotation does not allow."""

    path: Path
    problem: str
    unknown_key: bool = False


class BadValuesError(Exception):
    """All mistakes of a table, in its order."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        super().__init__(mistakes)
        self.mistakes = mistakes


def _bad(path: Path, problem: str) -> BadValuesError:
    return BadValuesError([Mistake(path, problem)])


def fill(base: T, table: dict[str, Any], path: Path = ()) -> T:
    """Return a copy of the dataclass `base` with the values of `table`, including nested tables.

    Raises:
        BadValuesError: keys are unknown, or values have the wrong type or are out of range.
    """
    values = _fields_from(type(base), table, path, base)
    try:
        return cast(T, dataclasses.replace(cast(Any, base), **values))
    except ValueError as error:  # a rule in `__post_init__` of a user's section
        raise _bad(path, str(error)) from error


def _fields_from(cls: type, table: Any, path: Path, base: Any = None) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise _bad(path, f"must be a table, not {show(table)}")
    hints = get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    names = [name for name, field in fields.items() if field.init]
    values = {}
    mistakes: list[Mistake] = []
    for key, value in table.items():
        inner = (*path, key)
        if key in fields and key not in names:
            problem = "has field(init=False): no value can be given. A section needs a property"
            mistakes.append(Mistake(inner, problem))
            continue
        if key not in names:
            mistakes.append(Mistake(inner, unknown(path, key, names), unknown_key=True))
            continue
        try:
            values[key] = convert(value, hints[key], inner, getattr(base, key, None))
        except BadValuesError as error:
            mistakes += error.mistakes
    if mistakes:
        raise BadValuesError(mistakes)
    return values


def unknown(path: Path, key: str, names: list[str]) -> str:
    """Return the problem of a key inside `path` that is none of `names`."""
    return f"unknown {'key' if path else 'section'}.{did_you_mean(key, names)}"


def convert(value: Any, hint: Any, path: Path, default: Any = None) -> Any:
    """Return `value` as the type of the annotation `hint`; a table fills in a copy of `default`.

    Raises:
        BadValuesError: the annotation does not allow the value, or is not supported.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _in_range(convert(value, args[0], path, default), args[1:], path)
    if origin in (Union, types.UnionType):
        return _member(value, args, path, default)
    if origin is Literal:
        if not any(type(choice) is type(value) and choice == value for choice in args):
            allowed = [str(choice) for choice in args]
            advice = value_instead(".".join(map(str, path)), value, allowed)
            advice = advice or did_you_mean(value if isinstance(value, str) else "", allowed)
            raise _bad(path, f"{show(value)} is not allowed.{advice}")
        return value
    kind = origin or hint
    if kind in (list, tuple, Sequence):
        return _array(value, kind, args, path)
    if kind in (dict, Mapping):
        of_key, of_value = args or (str, Any)
        return _table(value, of_key, of_value, path)
    if dataclasses.is_dataclass(hint):
        has_default = isinstance(default, cast(type, hint))
        return fill(default, value, path) if has_default else _new(hint, value, path)
    if hint is Any:
        return _any(value, path)
    if hint in _SCALARS:
        return _scalar(value, hint, path)
    raise _bad(
        path,
        f"has the annotation {hint}, which is not supported here. Use bool, int, float, str, "
        "Literal, a list, a tuple, a dict, a dataclass, or one of these with `| None`",
    )


def _array(value: Any, kind: Any, args: tuple, path: Path) -> Any:
    if not isinstance(value, list | tuple):
        raise _bad(path, f"must be an array, not {show(value)}")
    hints = (args[0] if args else Any,) * len(value)
    if kind is tuple and args and args[-1] is not ...:
        hints = args
    if len(hints) != len(value):
        raise _bad(path, f"must be an array of {len(hints)}, not of {len(value)}")
    made = [convert(v, h, (*path, i)) for i, (v, h) in enumerate(zip(value, hints, strict=True))]
    return tuple(made) if kind is tuple else made


def _table(value: Any, of_key: Any, of_value: Any, path: Path) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _bad(path, f"must be a table, not {show(value)}")
    try:
        keys = [of_key(key) if of_key in (int, float) else str(key) for key in value]
    except ValueError:
        raise _bad(path, f"must have keys that are {_SCALARS[of_key]}, in quotes") from None
    values = [convert(v, of_value, (*path, str(key))) for key, v in value.items()]
    return dict(zip(keys, values, strict=True))


def _any(value: Any, path: Path) -> Any:
    """Return a copy of a value that TOML can write, or of None."""
    if len(path) > MOST_LEVELS:
        raise _bad(path[:MOST_LEVELS], "is nested too deeply")
    match value:
        case None:
            return None
        case dict():
            return _table(value, str, Any, path)
        case list() | tuple():
            return _array(value, list, (), path)
        case bool() | int() | float() | str():
            return _scalar(value, type(value), path)
    raise _bad(path, f"must be a boolean, number, string, array or table, not {show(value)}")


def _new(cls: Any, table: Any, path: Path) -> Any:
    """Return a new instance, without a default to copy: an element of an array of tables."""
    values = _fields_from(cls, table, path)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # a key without a default is missing
        raise _bad(path, str(error)) from error


def _member(value: Any, args: tuple, path: Path, default: Any) -> Any:
    members = [arg for arg in args if arg is not type(None)]
    unset = value is None or (value in UNSET and not any(value in get_args(m) for m in members))
    if unset and len(members) < len(args):
        return None
    tables = [member for member in members if dataclasses.is_dataclass(member)]
    if isinstance(value, dict) and len(tables) > 1:
        members = [_class_of(value, tables, path, default)]
        value = {key: item for key, item in value.items() if key != _CLASS}
    for member in members[:-1]:
        try:
            return convert(value, member, path, default)
        except BadValuesError:
            continue
    return convert(value, members[-1], path, default)


def _class_of(table: dict[str, Any], classes: list[Any], path: Path, default: Any) -> Any:
    """Return the one of several dataclasses that a table is of."""
    names = {cls.__name__: cls for cls in classes}
    if (named := table.get(_CLASS)) is not None:
        if not (isinstance(named, str) and named in names):
            problem = f"{show(named)} is not allowed.{did_you_mean(str(named), names)}"
            raise _bad((*path, _CLASS), problem)
        return names[named]
    if type(default) in classes:
        return type(default)
    fitting = [cls for cls in classes if table.keys() <= {f.name for f in dataclasses.fields(cls)}]
    if len(fitting) != 1:
        allowed = ", ".join(sorted(names))
        raise _bad(path, f"needs the key {_CLASS}, which says what it is. Allowed: {allowed}.")
    return fitting[0]


def _in_range(value: Any, metadata: tuple, path: Path) -> Any:
    for bounds in metadata:
        if isinstance(bounds, Range) and value is not None and not bounds.allows(value):
            finite = "finite and " if isinstance(value, float) and math.isinf(value) else ""
            raise _bad(path, f"must be {finite}{bounds}, not {show(value)}")
    return value


def _scalar(value: Any, kind: Any, path: Path) -> Any:
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise _bad(path, "is too large for a float") from None
    if type(value) is not kind:
        raise _bad(path, f"must be {_SCALARS[kind]}, not {show(value)}")
    if kind is int and not -(2**63) <= value < 2**63:
        raise _bad(path, "must fit in 64 bits")
    if kind is float and math.isnan(value):
        raise _bad(path, "must be a number, not nan")
    if kind is str and ("\0" in value or not is_unicode(value)):
        raise _bad(path, f"must be valid UTF-8 text without NUL characters, not {show(value)}")
    return value


def show(value: Any) -> str:
    """Return a value for an error message: short, in TOML's terms."""
    match value:
        case bool():
            return str(value).lower()
        case dict():
            return "a table"
        case list() | tuple():
            return "an array"
        case str() if len(value) > 60:
            return f"{value[:57]!r}..."
        case int() if abs(value) >= 2**64:
            return "a number of more than 64 bits"
        case str() | int() | float():
            return repr(value)
        case None:
            return "unset"
    return f"a {type(value).__name__}"
