"""Generate the configuration reference page from the sections' dataclasses and docstrings.

python -m torchtitan.config.reference > docs/configuration.md
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from .base import Range
from .job_config import JobConfig
from .options import docstrings
from .toml_file import format_value

_INTRODUCTION = """\
<!-- Made by `python -m torchtitan.config.reference > docs/configuration.md`; do not edit. -->

# Configuration

Every option has a default. A TOML file changes some (`--job.config_file run.toml`, or `run.toml`
alone), and the command line wins over the file:

```toml
[training]
steps = 1000
```

```bash
torchtitan train --job.config_file run.toml --training.steps 20
```

An unknown section or key, a value of the wrong type or out of range ends the run before it starts,
with the line of the file and the nearest name that exists. `--job.print_config` prints the result
of file and command line as TOML; each run keeps it as `config.resolved.toml`. In both, passwords
and signatures in URLs are `***`, to be put in again where the file is to be run. An option without
a default below is unset. `"none"` unsets one.

## Hyperparameters of the model

`model.flavor` names a set of hyperparameters. `[model.args]` changes some of them, for example to
sweep width and depth, or for the vocabulary of a tokenizer of your own:

```toml
[model]
name = "llama3"
flavor = "8B"

[model.args]
n_layers = 16
vocab_size = 50304
rope_scaling = "none"
```

The same on the command line is `--model.args.n_layers=16`. The keys are the fields of the args'
dataclass (`model/args.py` of the model). `"none"` is None. A dataclass within the args is a table,
of which the other fields stay as they are: `[model.args.moe]`, or
`--model.args.moe.num_experts=16`. Where a field may be one of several dataclasses, `class` names
another than the flavor has:

```toml
[model.args.rope_scaling]
class = "YarnScaling"
factor = 4.0
original_max_seq_len = 8192
```

A checkpoint holds the changed args, so that `generate` and `convert` need nothing more, and a run
resumes only with the same ones. A field that the flavor left None and `__post_init__` has computed
keeps that value, so change it too.
"""

_BAR = r"\|"
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def reference(config: type = JobConfig) -> str:
    """Return the page in Markdown."""
    hints = get_type_hints(config)
    sections = [_section(f"[{f.name}]", hints[f.name]) for f in dataclasses.fields(config)]
    return "\n".join([_INTRODUCTION, *sections])


def _section(header: str, cls: type) -> str:
    """Return the text of one TOML table and of the tables and arrays of tables inside it."""
    default, hints, texts = cls(), get_type_hints(cls, include_extras=True), docstrings(cls)
    rows = ["| key | type | default | allowed | meaning |", "| --- | --- | --- | --- | --- |"]
    inner = []
    for field in dataclasses.fields(cls):
        if field.name not in texts:
            raise ValueError(f"{cls.__name__}.{field.name} has no docstring")
        hint, value = hints[field.name], getattr(default, field.name)
        table = dataclasses.is_dataclass(value)
        shown = "" if value is None or table else f"`{format_value(value)}`"
        cells = [f"`{field.name}`", _type(hint), shown, _allowed(hint), texts[field.name]]
        rows.append(f"| {' | '.join(cell.replace('|', _BAR) for cell in cells)} |")
        name = f"{header.strip('[]')}.{field.name}"
        inner += [
            _section(f"[{name}]" if table else f"[[{name}]]", item)
            for item in _parts(hint)
            if _is_table(item)
        ]
    text = " ".join((inspect.getdoc(cls) or "").split())
    return "\n".join([f"## `{header}`", "", text, "", *rows, "", *inner])


def _parts(hint: Any) -> Iterator[Any]:
    """Yield the atomic members of a type and the bounds annotated to them."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *metadata = get_args(hint)
        yield from _parts(inner)
        yield from metadata
    elif origin in (Union, types.UnionType, list):
        for member in get_args(hint):
            yield from _parts(member)
    elif hint is not type(None):
        yield hint


def _type(hint: Any) -> str:
    if get_origin(hint) is list:
        return f"array of {_type(*get_args(hint))}s"
    kinds = [part for part in _parts(hint) if not isinstance(part, Range)]
    return " or ".join(dict.fromkeys(map(_kind, kinds)))


def _kind(part: Any) -> str:
    if get_origin(part) is Literal:
        return _TYPES[type(get_args(part)[0])]
    return "table" if _is_table(part) or get_origin(part) is dict else _TYPES[part]


def _is_table(part: Any) -> bool:
    return isinstance(part, type) and dataclasses.is_dataclass(part)


def _allowed(hint: Any) -> str:
    """Return the allowed choices or bounds; empty if any value of the type is allowed."""
    allowed = []
    for part in _parts(hint):
        if isinstance(part, Range):
            allowed.append(str(part))
        elif get_origin(part) is Literal:
            allowed += [f"`{format_value(choice)}`" for choice in get_args(part)]
    return ", ".join(allowed)


if __name__ == "__main__":
    sys.stdout.write(reference())
