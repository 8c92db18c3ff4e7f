"""The code blocks of the documentation, and a shell that runs their commands quickly.

`torchtitan ...` and `torchrun ... -m torchtitan...` run on ranks forked from a warm server (see
harness.py); everything else in bash.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import shlex
import subprocess
import sysconfig
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tyro
from harness import command

from torchtitan import cli
from torchtitan.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "torchtitan/models/*/*.md")
    for path in sorted(ROOT.glob(pattern))
}
_STARTS_PROCESSES = ["torchtitan", "data", "prepare"]
"""Which forked ranks may not."""
_BLOCK = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```", re.S | re.M)


@dataclass
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The fenced blocks of all pages in these languages."""
    found = []
    for page, path in PAGES.items():
        text = path.read_text()
        for match in _BLOCK.finditer(text):
            if match[2] in languages:
                line = text.count("\n", 0, match.start()) + 1
                found.append(Block(page, line, match[2], textwrap.dedent(match[3])))
    return found


def statements(text: str) -> list[str]:
    """The commands of a block of bash: lines, with what belongs to them by `\\` or a heredoc."""
    found: list[str] = []
    heredoc = None
    goes_on = False
    for line in text.splitlines():
        if heredoc or goes_on:
            found[-1] += "\n" + line
        elif line.strip() and not line.startswith("#"):
            found.append(line)
        goes_on = not heredoc and line.endswith("\\")
        if heredoc:
            heredoc = None if line == heredoc else heredoc
        elif match := re.search(r"<<'?(\w+)'?", line):
            heredoc = match[1]
    return found


def words_of(statement: str) -> list[str]:
    """Without line ends, comments and the `...` that stands for more options."""
    words = shlex.split(statement.replace("\\\n", " "), comments=True)
    return words[:-1] if words and words[-1] == "..." else words


def as_torchtitan(words: list[str]) -> tuple[list[str], int] | None:
    """The arguments of the command `torchtitan` and the number of ranks; None: another program."""
    ranks = 1
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words and words[0] == "torchrun":
        for i, word in enumerate(words):
            if word.startswith("--nproc-per-node"):
                ranks = int(word.partition("=")[2] or words[i + 1])
        words = ["python", *words[words.index("-m") :]] if "-m" in words else []
    match words:
        case ["torchtitan", *rest] | ["python", "-m", "torchtitan", *rest]:
            return rest, ranks
        case ["python", "-m", "torchtitan.train", *rest]:
            return ["train", *rest], ranks
    return None


@dataclass
class Shell:
    """Runs the statements of a page, one after the other."""

    folder: Path
    """Working directory; `cd` changes it."""
    train: list[str] = field(default_factory=list)
    """Options that each `torchtitan train` gets in addition."""
    out: str = ""
    """stdout of everything so far."""

    def run(self, statement: str) -> None:
        statement = statement.replace(" torchtitan/models/", f" {ROOT}/torchtitan/models/")
        words = words_of(statement)
        told = as_torchtitan(words)
        if told is None or "|" in words or words[:3] == _STARTS_PROCESSES:
            return self._bash(statement)
        arguments, ranks = told
        target = None
        if ">" in arguments:
            target = arguments[arguments.index(">") + 1]
            arguments = arguments[: arguments.index(">")]
        if arguments[0] == "train":
            arguments = [*arguments, *self.train]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            done = command(*arguments, ranks=ranks)
        assert done.exit_code == 0, f"{statement}\n{done.err}"
        self.out += done.out
        if target:
            (self.folder / target).write_text(done.out)

    def _bash(self, statement: str) -> None:
        path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["bash", "-e", "-c", f"{statement}\npwd"],
            cwd=self.folder,
            env=env | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, f"{statement}\n{done.stderr}"
        *shown, folder = done.stdout.splitlines()
        self.out += "".join(line + "\n" for line in shown)
        self.folder = Path(folder)


class _Parsed(Exception):
    """The command line is understood; nothing is to be done."""


def check_options(statement: str) -> None:
    """Parse the command line of a program of ours as it does itself, and do nothing else.

    Raises:
        SystemExit, TitanError: it is not understood.
    """
    words = words_of(statement)
    if told := as_torchtitan(words):
        arguments, _ = told
        name, *rest = arguments[: arguments.index(">")] if ">" in arguments else arguments
        if name == "train":
            return _check_train(rest)
        parse_only(cli.COMMANDS[name][0], rest)
        if "--" in rest:
            _check_train(rest[rest.index("--") + 1 :])
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        parse_only(words[2], words[3:])


def _check_train(options: list[str]) -> None:
    """A TOML file that is not in the repository is left out."""
    kept = [word for word in options if word != "--job.print_config"]
    options = list(kept)
    for i, word in enumerate(options):
        if word == "--job.config_file" and not (ROOT / options[i + 1]).is_file():
            del kept[i : i + 2]
    load_config([w.replace("torchtitan/models", f"{ROOT}/torchtitan/models") for w in kept])


def parse_only(module: str, arguments: list[str]) -> None:
    """Call a command's `main`, which goes no further than its command line."""
    cli_of_tyro, parse_args = tyro.cli, argparse.ArgumentParser.parse_args

    def understood(parse: object) -> object:
        def wrapper(*args: object, **kwargs: object) -> None:
            parse(*args, **kwargs)
            raise _Parsed

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", understood(cli_of_tyro))
        patch.setattr(argparse.ArgumentParser, "parse_args", understood(parse_args))
        with pytest.raises(_Parsed):
            importlib.import_module(module).main(arguments)


def check_imports(code: str) -> None:
    """The code is Python, and what it imports by an absolute name exists."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if node.module.split(".")[0] != "torchtitan":
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
