"""`torchtitan new`: the command line, and the writing of files."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

import torchtitan
from torchtitan.config.options import parse_options, shown_as
from torchtitan.errors import ConfigError, did_you_mean, os_errors_as
from torchtitan.tools.result_file import replace_file

from . import templates
from .source import DEBUG_TOML, OF_A_LIBRARY, ModelSource, Names

if TYPE_CHECKING:
    from .hugging_face import Findings

DESCRIPTION = """\
Start a new model: write the folder described in docs/adding_models.md as a package of your own,
ready to train and verify.

  torchtitan new my_model
  torchtitan new my_model --like qwen3 --out ~/models
  torchtitan new my_model --from-hf path/to/folder
  torchtitan new my_model --in-tree"""

MODELS = Path(torchtitan.__file__).parent / "models"


@dataclass
class Options:
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Name of the model and its folder and, in CamelCase, of its classes."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path(".")
    """Folder in which to create the installable package NAME."""
    like: Annotated[str, shown_as("MODEL")] = ""
    """Model to start from. Default: llama3, or the model that can read --from-hf."""
    from_hf: Annotated[Path | None, shown_as("PATH")] = None
    """Hugging Face folder with a config.json, and optionally weights, from which to take sizes and
    tensor names."""
    in_tree: bool = False
    """Write to torchtitan/models/NAME in this checkout, and register the model there."""


def main(argv: list[str] | None = None) -> int:
    """Run the command with the arguments after `torchtitan new`; return the exit code.

    Raises:
        ConfigError: an argument is wrong, or something of that name exists already.
    """
    options = parse_options(Options, argv, "torchtitan new", DESCRIPTION)
    names = Names.of(options.name)
    folders = {path.parent.parent.name for path in MODELS.glob("*/model/model.py")}
    models = sorted(folders - {OF_A_LIBRARY})
    if options.like and options.like not in models:
        raise ConfigError(
            f"--like {options.like}: no such model.{did_you_mean(options.like, models)}"
        )
    if names.model in {path.stem for path in MODELS.iterdir()}:
        raise ConfigError(f"NAME {names.model!r} is taken by torchtitan/models/{names.model}")
    place = _in_tree(names) if options.in_tree else _package(names, options.out.expanduser())

    findings = None
    if options.from_hf is not None:
        from .hugging_face import find_out  # imports PyTorch

        findings = find_out(options.from_hf.expanduser(), options.like)
    like = findings.like if findings else options.like or "llama3"
    module = place.custom_import or f"torchtitan.models.{names.model}"
    source = ModelSource(MODELS / like, names, module)
    texts = model_files(source, place, findings)
    files = {place.folder / path: text for path, text in texts.items()}
    values = {"model": names.model, "title": names.title, "test": place.test}
    custom_import = f', custom_import="{place.custom_import}"' if place.custom_import else ""
    test = templates.TEST.substitute(values, custom_import=custom_import)
    files[place.root / place.test] = test
    if options.in_tree:
        files[MODELS / "__init__.py"] = _registered(names.model)
    else:
        files[place.root / "pyproject.toml"] = templates.PYPROJECT.substitute(values)
    written: list[Path] = []
    try:
        for path, text in files.items():
            _write(path, text)
            written.append(path)
    except BaseException:
        for path in written:
            path.unlink()
        shutil.rmtree(place.folder if options.in_tree else place.root, ignore_errors=True)
        raise
    sys.stdout.write(_summary(place, findings))
    return 0


@dataclass
class Place:
    """Where a model's files go, and how they are used there."""

    root: Path
    """Folder of the commands that come next."""
    folder: Path
    """Folder of the model."""
    configs: str
    """Folder of its training runs, from `root`."""
    test: str
    """Its test file, from `root`."""
    custom_import: str
    """`job.custom_import` with which the model trains without being installed; "" if it does."""
    next_steps: list[str]


def _package(names: Names, out: Path) -> Place:
    """Return the place of a separate package, with an entry point: `OUT/NAME/NAME/...`.

    Raises:
        ConfigError: the folder exists already, or an installed module has this name.
    """
    name = names.model
    if (out / name).exists():
        raise ConfigError(f"{out / name} exists already; choose another name or another folder")
    module = importlib.util.find_spec(name)
    if module is not None and module.origin is not None:  # it would be imported in its place
        raise ConfigError(f"NAME {name!r} is taken by the module {module.origin}")
    next_steps = [
        f"cd {out / name}",
        f"torchtitan verify {name} --custom-import {name} --quick",
        f"torchtitan train --job.config_file {name}/train_configs/debug_model.toml",
        'pip install -e ".[dev]"   # adds pytest, and makes the model known in any folder',
        "pytest",
    ]
    test = f"tests/test_{name}.py"
    return Place(out / name, out / name / name, f"{name}/train_configs", test, name, next_steps)


def _in_tree(names: Names) -> Place:
    """Return the place of a model in this checkout of torchtitan.

    Raises:
        ConfigError: torchtitan is not run from a checkout.
    """
    name, root = names.model, MODELS.parent.parent
    if not (root / "pyproject.toml").is_file():
        raise ConfigError(
            f"--in-tree: {MODELS} is not in a checkout of torchtitan, and models do not belong "
            "in an installed package; leave out --in-tree to make a package of your own"
        )
    configs, test = f"torchtitan/models/{name}/train_configs", f"tests/unit/models/test_{name}.py"
    next_steps = [
        f"torchtitan verify {name} --quick",
        f"torchtitan train --job.config_file {configs}/debug_model.toml",
        f"pytest {test}",
    ]
    return Place(root, MODELS / name, configs, test, "", next_steps)


def _registered(name: str) -> str:
    """Return `torchtitan/models/__init__.py` with the two lines of the guide's last step."""
    lines = (MODELS / "__init__.py").read_text().splitlines(keepends=True)
    imports = [f"from .{name} import get_train_spec as get_{name}_train_spec\n"]
    entries = [f'MODEL_REGISTRY["{name}"] = get_{name}_train_spec\n']
    for new, start in ((entries, "MODEL_REGISTRY["), (imports, "from .")):
        found = [i for i, line in enumerate(lines) if line.startswith(start)]
        after = [i for i in found if lines[i] < new[0]]
        place = after[-1] + 1 if after else found[0]
        lines[place:place] = new
    return "".join(lines)


def model_files(source: ModelSource, place: Place, findings: Findings | None) -> dict[str, str]:
    """Return path in the model's folder -> text."""
    names, module = source.names, place.custom_import
    values = {
        "model": names.model,
        "title": names.title,
        "verify_import": f" --custom-import {module}" if module else "",
        "custom_import": f'custom_import = "{module}"\n' if module else "",
    }
    files = source.copies()
    flavors, notes = {}, ""
    if findings:
        from .hugging_face import adapter_table

        values |= {"flavor": findings.flavor, "path": str(findings.folder.resolve())}
        flavors[findings.flavor] = findings.args_source
        files["model/args.py"] = _with_config(files["model/args.py"], findings)
        if findings.names:
            adapter = "model/state_dict_adapter.py"
            files[adapter] = _with_table(files[adapter], adapter_table(findings))
        notes = templates.HF_NOTES.substitute(values, findings=_notes(findings))
        full = f"train_configs/{names.model}_{findings.flavor.lower()}.toml"
        files[full] = templates.FULL_TOML.substitute(values)
    files |= {
        "__init__.py": source.init(flavors),
        "README.md": templates.README.substitute(
            values, like=source.folder.name, configs=place.configs, notes=notes
        ),
        DEBUG_TOML: files[DEBUG_TOML].replace("[job]\n", f"[job]\n{values['custom_import']}"),
    }
    return files


def _with_config(args: str, findings: Findings) -> str:
    """Make the args read a `config.json` of this kind, whose absent features must stay absent."""
    absent = {k: v for k, v in findings.absent.items() if f'"{k}"' not in args}
    lines = [f'            hf.require("{key}", {value!r})\n' for key, value in absent.items()]
    return re.sub(
        r'(        with HuggingFaceConfig\(\w+, )"[^"]+"(.*\n)',
        lambda match: f'{match[1]}"{findings.model_type}"{match[2]}{"".join(lines)}',
        args,
        count=1,
    )


def _with_table(adapter: str, table: str) -> str:
    """Return the adapter with other lines in its table `names`."""
    return re.sub(
        r"(    names: ClassVar = \{\n).*?(\n    \})",
        lambda match: f"{match[1]}{table}{match[2]}",
        adapter,
        count=1,
        flags=re.S,
    )


def _notes(findings: Findings) -> str:
    lines = []
    if findings.not_understood:
        lines.append("Its `config.json` has further keys; check which of them your model needs:")
        lines += [f"* `{key} = {value!r}`" for key, value in findings.not_understood.items()]
    todo = len(findings.missing) + len(findings.without_counterpart)
    if todo:
        lines.append(f"{todo} names in the table of `model/state_dict_adapter.py` are left to do.")
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _summary(place: Place, findings: Findings | None) -> str:
    lines = [f"wrote {place.folder}"]
    if findings:
        lines.append(f"flavor {findings.flavor} from config.json, started from {findings.like}")
        if findings.not_understood:
            lines.append(f"not understood: {', '.join(findings.not_understood)}; see README.md")
        if findings.missing or findings.without_counterpart:
            lines.append("some tensor names are left to do: model/state_dict_adapter.py")
    lines.append("next:")
    return "\n".join([*lines, *(f"  {step}" for step in place.next_steps)]) + "\n"


def _write(path: Path, text: str) -> None:
    with os_errors_as(ConfigError, f"{path}: cannot write there"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
