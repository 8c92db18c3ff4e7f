"""Load a checked `JobConfig` from the command line and a TOML file."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from torchtitan.errors import ConfigError
from torchtitan.tools.secrets import hide_secrets

from .check import MOST_LEVELS, BadValuesError, Mistake, Path, fill, unknown
from .custom import custom_job_config
from .job import Job
from .job_config import JobConfig
from .options import fields_rule, number_rule, one_word, only_kind
from .toml_file import TomlFile, format_value, to_toml, toml_value
from .upstream import instead

_MOST_MISTAKES = 20
"""Maximum number of mistakes reported at once for a file."""
_registry = ConstructorRegistry()
_registry.struct_rule(fields_rule)
_registry.primitive_rule(number_rule)


@_registry.primitive_rule
def _bool_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool] | None:
    """Parse booleans as in TOML: `--job.print_config`, `--checkpoint.enable=false`."""
    if info.type is not bool:
        return None

    def parse(words: list[str]) -> bool:
        written = " ".join(words).lower()
        if written not in ("", "true", "false"):
            raise ValueError(f"must be true or false, not {written!r}")
        return written != "false"

    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[{true,false}]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [format_value(value)],
    )


@_registry.primitive_rule
def _choice_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Take any word for a choice: `checked` refuses others, with the message that a file gets."""
    kind, may_be_unset = only_kind(info.type)
    if get_origin(kind) is not Literal:
        return None
    words = {str(choice): choice for choice in get_args(kind)}
    return one_word(f"{{{','.join(words)}}}", may_be_unset, lambda word: words.get(word, word))


@_registry.primitive_rule
def _table_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
    """Show tables of any keys in the help. `_with_tables` reads them before the parser does."""
    if get_origin(info.type) is not dict:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="TABLE",
        instance_from_str=lambda words: toml_value(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [format_value(value)],
    )


def _parse(base: Any, argv: list[str], **options: Any) -> Any:
    return tyro.cli(
        type(base),
        args=argv,
        default=base,
        prog="torchtitan train",
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
        registry=_registry,
        **options,
    )


@dataclass
class _JobOptions:
    """Options that must be known before the others can be parsed."""

    job: Job = field(default_factory=Job)


def load_config(argv: list[str]) -> JobConfig:
    """Return the config of a run: dataclass defaults, then the TOML file, then the command line.

    A bare argument `run.toml` stands for `--job.config_file run.toml`.

    `--help` and `--job.print_config` print to stdout and exit. In a file, `job.print_config` does
    not exit: a scheduler would take the run for finished.

    Raises:
        ConfigError: an option, key, value or file is wrong.
        SystemExit: code 0 after printing, 2 if the command line cannot be parsed.
    """
    if argv and argv[0].startswith("--tyro"):  # tyro's shell completion asserts on bad input
        raise ConfigError(f"{argv[0]}: unknown option")
    argv = _with_config_option(argv)
    early = _parse(_JobOptions(), argv, add_help=False, return_unknown_args=True)[0].job
    file = TomlFile.read(early.config_file) if early.config_file is not None else None
    config = _with_file(file, early.custom_config_module)
    argv = _with_tables(config, argv)
    _refuse_unknown_keys(config, argv)
    config = checked(_parse(config, argv), "--")  # the parser does not know ranges
    config.job.dump_folder = os.path.expanduser(config.job.dump_folder)
    config.checkpoint.folder = os.path.expanduser(config.checkpoint.folder)
    if template := config.data.chat_template:  # generate and convert read it in other folders
        config.data.chat_template = os.path.abspath(os.path.expanduser(template))
    if early.print_config:
        print_config(config)
        raise SystemExit(0)
    return config


def checked(config: JobConfig, prefix: str = "") -> JobConfig:
    """Return a copy of a config that the command line or a program has changed.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or its key does not exist. The
            message begins with `prefix` and the key.
    """
    table = vars(config) | asdict(config)  # `vars` also has attributes that are no fields
    for name, values in asdict(config).items():
        if isinstance(values, dict):
            table[name] = vars(getattr(config, name)) | values
    try:
        return fill(config, table)
    except BadValuesError as error:
        told = [f"{prefix}{'.'.join(map(str, m.path))}: {m.problem}" for m in error.mistakes]
        raise ConfigError("\n".join(told)) from error


def print_config(config: JobConfig) -> None:
    """Print the config on rank 0, as a TOML file that loads to the same config.

    Passwords in URLs are hidden: they have to be put in again.
    """
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(hide_secrets(to_toml(config)))


def _with_config_option(argv: list[str]) -> list[str]:
    """Replace a positional TOML file, which the other commands take, by `--job.config_file`."""
    files = [
        i
        for i, (before, word) in enumerate(zip(["", *argv], argv, strict=False))
        if word.endswith(".toml")
        and not word.startswith("-")
        and ("=" in before or not before.startswith("-"))
    ]
    if not files:
        return argv
    others = [word for i, word in enumerate(argv) if i not in files]
    named = [word for word in others if re.match("--job[.]config[_-]file(=|$)", word)]
    if len(files) > 1 or named:
        given = [argv[i] for i in files] + named[:1]
        raise ConfigError(f"{' and '.join(given)}: a run takes only one config file")
    return ["--job.config_file", argv[files[0]], *others]


def _with_file(file: TomlFile | None, custom_config_module: str) -> JobConfig:
    """Return the defaults, extended by the user's module, with the values of the file."""
    table = file.table if file else {}
    job = table.get("job")
    module = custom_config_module
    if not module and isinstance(job, dict):
        module = job.get("custom_config_module", "")
    # `fill` reports a module of the wrong type below, with its line.
    base = custom_job_config(module) if module and isinstance(module, str) else JobConfig()
    if file is None:
        return base
    try:
        return fill(base, table)
    except BadValuesError as error:
        told = [each for mistake in error.mistakes for each in _told(base, table, mistake)]
        messages = [f"{file.where(path)}: {problem}" for path, problem in told[:_MOST_MISTAKES]]
        if len(told) > _MOST_MISTAKES:
            messages.append("(more mistakes not shown)")
        raise ConfigError("\n".join(messages)) from error


def _told(base: JobConfig, table: dict[str, Any], mistake: Mistake) -> list[tuple[Path, str]]:
    """Return a mistake's path and problem; for an unknown section, also its upstream keys."""
    path, problem, unknown_key = mistake
    if not unknown_key:
        return [(path, problem)]
    section = table[str(path[0])]
    if len(path) > 1 or not isinstance(section, dict):
        return [(path, _successor(base, path) or problem)]
    keys = [(*path, key) for key in section]
    told = [(key, _successor(base, key)) for key in keys if instead(key)]
    whole = [] if told and len(told) == len(keys) else [(path, problem)]
    return [*whole, *told]


def _successor(config: JobConfig, path: Path) -> str:
    """Return the problem of an unknown key if its replacement is known, else ""."""
    if text := instead(path):
        return f"unknown key, from upstream torchtitan. Here: {text}"
    return _in_other_sections(config, path)


def _path_of(option: str) -> tuple[str, ...]:
    return tuple(option.removeprefix("--").replace("-", "_").split("."))


def _with_tables(config: JobConfig, argv: list[str]) -> list[str]:
    """Put `--model.args.n_layers=8` into the table of the config; return the other arguments.

    The parser cannot, since it does not know the keys of such tables. Values are merged with those
    of the file.
    """
    others = []
    words = iter(argv)
    for word in words:
        option, has_value, text = word.partition("=")
        path = _path_of(option)
        table, keys = _table_at(config, path) if word.startswith("--") else (None, ())
        if table is None:
            others.append(word)
            continue
        if not has_value and (text := next(words, "--")).startswith("--"):
            raise ConfigError(f"{option}: needs a value")
        value = toml_value(text)
        if not (keys or isinstance(value, dict)):
            raise ConfigError(f"{option}: must be a table, such as {{n_layers = 8}}, not {text!r}")
        if len(path) > MOST_LEVELS:
            raise ConfigError(f"{option}: is nested too deeply")
        for key in reversed(keys):
            value = {key: value}
        _merge(table, value)
    return others


def _table_at(
    config: JobConfig, path: tuple[str, ...]
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Return the table of any keys that a path leads to, if any, and the rest of the path."""
    value: Any = config
    for depth, key in enumerate(path, 1):
        value = getattr(value, key, None)
        if isinstance(value, dict):
            return value, path[depth:]
    return None, ()


def _merge(table: dict[str, Any], other: dict[str, Any]) -> None:
    """Add the values of `other` in place; tables in both are merged."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value


def _refuse_unknown_keys(config: JobConfig, argv: list[str]) -> None:
    """Refuse options that are no keys with the messages that a file gets.

    The parser would only suggest the most similarly spelled options.
    """
    messages = []
    for word in argv:
        option = word.partition("=")[0]
        path = _path_of(option)
        if option.startswith("--") and (problem := _unknown(config, path)):
            messages.append(f"{option}: {problem}")
    if messages:
        raise ConfigError("\n".join(messages))


def _unknown(config: JobConfig, path: tuple[str, ...]) -> str:
    """Return the problem of an option that is no key, else ""."""
    if len(path) == 1:
        options = [f"--{section}.{path[0]}" for section in _sections_with(config, path[0])]
        return f"unknown option. Write {' or '.join(options)}" if options else ""
    value: Any = config
    for depth, name in enumerate(path):
        if isinstance(value, list):
            if name.isdecimal() and int(name) < len(value):
                value = value[int(name)]
                continue
            table = f"[[{'.'.join(path[:depth])}]]"
            return f"options change only the tables of the file, and it has {len(value)} {table}"
        names = [part.name for part in fields(value)] if is_dataclass(value) else []
        if name not in names:
            # Upstream has `--x.no_y`; other programs would have `--no-x.y`.
            positive = (*path[:depth], name.removeprefix("no_"), *path[depth + 1 :])
            if positive != path and not _unknown(config, positive):
                return f"unknown key. Here: --{'.'.join(positive)} false"
            successor = _successor(config, path) or _successor(config, positive)
            return successor or unknown(path[:depth], name, names)
        value = getattr(value, name)
    return ""


def _in_other_sections(config: JobConfig, path: tuple[str | int, ...]) -> str:
    """Return the problem of a key that belongs to other sections, else ""."""
    *section, key = map(str, path)
    having = _sections_with(config, key)
    if len(section) > 1 or not having:
        return ""
    where = " or ".join(f"[{name}]" for name in having)
    if section:
        return f"unknown key. It belongs to {where}"
    return f"stands before the first section. It belongs to {where}"


def _sections_with(config: JobConfig, key: str) -> list[str]:
    """Return the sections that have a key; none if these are more than three."""
    names = [part.name for part in fields(config)]
    having = [n for n in names if key in [f.name for f in fields(getattr(config, n))]]
    return having if len(having) <= 3 else []


def fail(
    config: JobConfig, key: str | Path, problem: str, kind: type[ConfigError] = ConfigError
) -> NoReturn:
    """Raise `kind` with a message about the value of `key`."""
    raise kind(f"{origin(config, key)}: {problem}")


def origin(config: JobConfig, key: str | Path) -> str:
    """Return how an error message names a key (`training.seq_len`, `optimizer.rules.0`) and value.

    A key that may contain dots is given as a path.

    This is `run.toml:12: [training] seq_len = 100` if the value comes from the file, and
    `training.seq_len = 100` if it is a default or comes from the command line.
    """
    path: Path
    if isinstance(key, str):
        path = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    else:
        path, key = key, ".".join(map(str, key))
    value: Any = asdict(config)
    for part in path:
        value = value[part]
    shown = f" = {format_value(value)}" if isinstance(value, str | int | float) else ""
    if config.job.config_file is not None:
        try:
            file = TomlFile.read(config.job.config_file)
            written: Any = file.table
            for part in path:
                written = written[part]
        except (ConfigError, LookupError, TypeError):
            return key + shown
        if written == value or isinstance(value, dict):  # a table need not write every key
            return file.where(path) + shown
    return key + shown
