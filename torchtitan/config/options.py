"""The options of commands: parsed in one way, with one kind of help and of messages."""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from torchtitan.errors import ConfigError, did_you_mean

from .check import BadValuesError, convert
from .toml_file import toml_value

_registry = ConstructorRegistry()


def shown_as(metavar: str, *aliases: str) -> Any:
    """Return an annotation for tyro: the name of an option's value in the help, and its aliases.

    Aliases are written with dashes: tyro would not find them by underscores.
    """
    return tyro.conf.arg(metavar=metavar, aliases=aliases, help_behavior_hint=_default)


def _default(value: str) -> str:
    """Return the end of an option's help; that a default is empty says nothing."""
    return {"": "(repeatable)", "''": "", "None": ""}.get(value, f"(default: {value})")


def parse_options(
    options: type, argv: list[str] | None, prog: str, description: str | None = None
) -> Any:
    """Parse the arguments of a command: the fields of a dataclass, whose docstrings are the help.

    `argv` may be None: those of the process.

    Raises:
        SystemExit: code 0 after printing help, 2 if an option is wrong.
    """
    shown = None if description is None else _wrapped(description)
    return tyro.cli(options, args=argv, prog=prog, description=shown, registry=_registry)


class _AsWritten(str):
    """A description that tyro shows as it is: it would join its lines, and add an empty one."""

    def split(self, *_: Any) -> list[str]:
        return [str(self)]


def _wrapped(description: str) -> _AsWritten:
    """Wrap the paragraphs to the terminal's width, except examples, which are indented."""
    width = shutil.get_terminal_size().columns
    fill = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
    parts = description.split("\n\n")
    return _AsWritten("\n\n".join(p if p.startswith(" ") else fill(p) for p in parts))


def parse_action(actions: dict[str, Any], argv: list[str], prog: str, description: str) -> Any:
    """Parse the arguments of a command with actions: name -> dataclass, its docstring is the help.

    Raises:
        ConfigError: there is no such action.
        SystemExit: as in `parse_options`.
    """
    name, *options = argv or [""]
    if name in actions:
        return parse_options(
            actions[name], options, f"{prog} {name}", inspect.getdoc(actions[name])
        )
    if name not in ("", "-h", "--help"):
        raise ConfigError(f"{prog}: unknown action {name!r}.{did_you_mean(name, actions)}")
    return tyro.extras.subcommand_cli_from_dict(
        actions, args=[name] if name else [], prog=prog, description=description
    )


@_registry.struct_rule
def fields_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Take the fields of a dataclass, each with its docstring: tyro would keep its line breaks."""
    cls, given = info.type, info.default
    if not is_dataclass(cls):
        return None

    def default(field: Any) -> Any:
        if isinstance(given, cls):
            return getattr(given, field.name)
        if field.default_factory is not MISSING:
            return field.default_factory()
        return MISSING_NONPROP if field.default is MISSING else field.default

    hints = get_type_hints(cls, include_extras=True)
    specs = [
        StructFieldSpec(
            field.name, hints[field.name], default(field), partial(_help, cls, field.name)
        )
        for field in fields(cls)
        if field.init
    ]
    return StructConstructorSpec(instantiate=cls, fields=tuple(specs))


def _help(cls: type, name: str) -> str | None:
    return docstrings(cls).get(name)


@cache
def docstrings(cls: type) -> dict[str, str]:
    """Map each field of a dataclass to the string below it in the source, joined to one line.

    Python does not keep these strings, so they are parsed from the source. Fields without one, and
    those of classes without source, are left out.
    """
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        with suppress(OSError, TypeError):  # made by a program, or built in
            definition: Any
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            for statement, following in zip(definition.body, definition.body[1:], strict=False):
                match statement, following:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                        found[name] = " ".join(text.split())
    return found


@_registry.primitive_rule
def number_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Parse numbers, which may be unset, with the messages that a file gets."""
    kind, may_be_unset = only_kind(info.type)
    if kind not in (int, float):
        return None

    def parse(text: str) -> Any:
        with suppress(ValueError):
            return kind(text)
        try:
            return convert(toml_value(text), kind | None if may_be_unset else kind, ())
        except BadValuesError as error:
            raise ValueError(error.mistakes[0].problem) from error

    return one_word(kind.__name__.upper(), may_be_unset, parse)


def only_kind(hint: Any) -> tuple[Any, bool]:
    """Return a type without what is annotated to it, and whether the value may be None.

    Of a union of several types, return None instead of a type.
    """
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [get_args(m)[0] if get_origin(m) is Annotated else m for m in members]
    given = [kind for kind in kinds if kind is not type(None)]
    return given[0] if len(given) == 1 else None, len(given) < len(kinds)


def one_word(
    metavar: str, may_be_unset: bool, parse: Callable[[str], Any]
) -> PrimitiveConstructorSpec[Any]:
    """Return how to parse a value that is one word on the command line."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{None}}|{metavar}" if may_be_unset else metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def flag(name: str) -> str:
    """Return the flag of a field: `batch_size` -> `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command's own arguments from the config's, which follow `--`.

    Raises:
        ConfigError: one of the config's is before it, as for `torchtitan train`.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    for word in argv[:end]:
        name = word.partition("=")[0]
        if name.startswith("--") and "." in name:
            raise ConfigError(
                f"{name}: options of the config follow --, and its file needs no option: "
                "CONFIG.toml -- --training.steps 100"
            )
    return argv[:end], argv[end + 1 :]


def require_at_least_one(options: object, *names: str) -> None:
    """Raise `ConfigError` for a field that is set to less than 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{flag(name)} {value}: must be at least 1")
