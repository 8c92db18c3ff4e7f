"""Copies the source files of a model of the zoo under another name.

The new model starts from code that trains under every parallelism, and that code cannot become
outdated, as a separate template would.
"""

from __future__ import annotations

import ast
import keyword
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.errors import ConfigError

DEBUG_FLAVOR = "debugmodel"
OF_A_LIBRARY = "transformers"
"""The model whose code is not ours, so that nothing can start from it."""
DEBUG_TOML = "train_configs/debug_model.toml"
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")

_APPLY_CP = "        apply_cp("
_ABOUT_CP = """\
        # Only attention sees the other ranks' tokens. A model that mixes tokens by other means
        # (recurrence, convolution, a shift) leaves these lines out: then it is refused.
"""


@dataclass(frozen=True)
class Names:
    """The names of a model's parts: `your_model`, `YourModel`, `YourModelArgs`, ..."""

    model: str
    """Name of the folder, and `model.name` of a config."""
    prefix: str
    """Prefix of the names of classes."""

    @classmethod
    def of(cls, name: str) -> Names:
        """Derive the names. Raises `ConfigError` if no folder and class can be named like this."""
        if not _NAME.fullmatch(name) or keyword.iskeyword(name):
            proposal = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "my_model"
            proposal = f"model_{proposal}" if proposal[0].isdigit() else proposal
            raise ConfigError(
                f"NAME {name!r}: must be a Python name of lowercase letters, digits and single "
                f"underscores, such as {proposal!r}"
            )
        words = name.split("_")
        if words[-1] == "model" and len(words) > 1:
            words.pop()  # YourModel rather than YourModelModel
        return cls(name, "".join(word[0].upper() + word[1:] for word in words))

    @property
    def title(self) -> str:
        return self.model.replace("_", " ").capitalize()


class ModelSource:
    """The source of a model that `new` copies.

    Args:
        folder: `torchtitan/models/NAME`.
        module: name of the new package.
    """

    def __init__(self, folder: Path, names: Names, module: str) -> None:
        self.folder = folder
        self.names = names
        self._module = module
        self._init = (folder / "__init__.py").read_text()
        match = re.search(r"class (\w+)Model\(", self._read("model/model.py"))
        assert match, f"{folder} has no class ...Model"
        self._prefix = match[1]
        sources = "".join(path.read_text() for path in folder.glob("model/*.py"))
        # Other names may have this prefix: Qwen3ForCausalLM is Hugging Face's.
        self._classes = re.findall(rf"^class ({self._prefix}\w+)", sources, re.M)

    def copies(self) -> dict[str, str]:
        """Return path in the new folder -> text: the config of the debug flavor, and all Python
        files but `__init__.py`. A model that does not read texts has some beside `model/` and
        `infra/`.
        """
        first_lines = {
            "model/args.py": f"Hyperparameters of {self.names.model}.",
            "model/model.py": f"The model {self.names.model}; started as a copy of "
            f"{self.folder.name}.",
            "model/state_dict_adapter.py": "Exchange of weights with Hugging Face.",
            "infra/parallelize.py": f"How {self.names.model} is spread over devices.",
            "infra/pipeline.py": f"How {self.names.model} is cut into pipeline stages.",
        }
        copies = {DEBUG_TOML: self._debug_toml()}
        for part in ("model", "infra"):
            for path in sorted((self.folder / part).glob("*.py")):
                name = f"{part}/{path.name}"
                text = self.rename(path.read_text()).replace(_APPLY_CP, _ABOUT_CP + _APPLY_CP)
                copies[name] = _replace_docstring(text, first_lines.get(name))
        own = {path.name for path in self.folder.glob("*.py")} - {"__init__.py"}
        return copies | {name: self.rename(self._read(name)) for name in sorted(own)}

    def _debug_toml(self) -> str:
        text = self.rename(self._read(DEBUG_TOML))
        text = text.replace(f'name = "{self.folder.name}"', f'name = "{self.names.model}"')
        return re.sub('description = ".* debug', f'description = "{self.names.title} debug', text)

    def init(self, flavors: dict[str, str]) -> str:
        """Return the text of the new `__init__.py`.

        Args:
            flavors: flavors besides the debug flavor: name -> the source of its args.
        """
        body = ast.parse(self._init).body
        configs: Any = next(node for node in body if _assigned(node) == "MODEL_CONFIGS")
        [debug_args] = [
            ast.get_source_segment(self._init, value)
            for key, value in zip(configs.value.keys, configs.value.values, strict=True)
            if ast.literal_eval(key) == DEBUG_FLAVOR
        ]
        entries = {DEBUG_FLAVOR: debug_args} | flavors
        lines = [f'    "{name}": {source},' for name, source in entries.items()]
        new = "\n".join(["MODEL_CONFIGS = {", *lines, "}"])
        text = _replace_node(self._init, configs, new)
        text = _drop_unused(text)
        return _replace_docstring(self.rename(text), f"{self.names.title}. See README.md.")

    def rename(self, text: str) -> str:
        """Return the text with this model's names in place of the original's."""
        for name in self._classes:
            new = self.names.prefix + name.removeprefix(self._prefix)
            text = re.sub(rf"\b{name}\b", new, text)
        text = text.replace(f"torchtitan.models.{self.folder.name}", self._module)
        text = re.sub(r"\b(parallelize|pipeline)_" + self._suffix, rf"\1_{self.names.model}", text)
        return text.replace(
            f'register_train_spec("{self.folder.name}"', f'register_train_spec("{self.names.model}"'
        )

    @property
    def _suffix(self) -> str:
        """`llama` of `parallelize_llama`."""
        match = re.search(r"def parallelize_(\w+)\(", self._read("infra/parallelize.py"))
        assert match, f"{self.folder} has no parallelize_..."
        return rf"{match[1]}\b"

    def _read(self, name: str) -> str:
        return (self.folder / name).read_text()


def _assigned(node: ast.stmt) -> str:
    """Return the name that a statement assigns to, "" if it is no such statement."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return ""


def _drop_unused(text: str) -> str:
    """Remove unused constants and imported names, and the comments above them."""
    tree = ast.parse(text)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    lines = text.splitlines(keepends=True)
    for node in reversed(tree.body):
        if isinstance(node, ast.ImportFrom):
            unused = not any((alias.asname or alias.name) in used for alias in node.names)
        else:
            unused = bool(_assigned(node)) and _assigned(node) not in used
        if unused:
            first = node.lineno - 1
            while lines[first - 1].startswith("#"):
                first -= 1
            del lines[first : node.end_lineno]
    shorter = re.sub(r"\n{3,}(?=[A-Z])", "\n\n", "".join(lines))
    return shorter if shorter == text else _drop_unused(shorter)  # names only these used


def _replace_node(text: str, node: ast.stmt, new: str) -> str:
    lines = text.splitlines(keepends=True)
    lines[node.lineno - 1 : node.end_lineno] = [new + "\n"]
    return "".join(lines)


def _replace_docstring(text: str, first_line: str | None) -> str:
    """Return the text with another module docstring; unchanged if None or if there is none."""
    body = ast.parse(text).body
    if first_line is None or not body or ast.get_docstring(ast.parse(text)) is None:
        return text
    return _replace_node(text, body[0], f'"""{first_line}"""')
