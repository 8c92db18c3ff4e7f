"""Each package can be the first that a process imports: none needs another to be there before."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import torchtitan

PACKAGE = Path(torchtitan.__file__).parent


IMPORT_EACH_FIRST = """
import importlib, os, sys
import torch
for package in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        importlib.import_module(package)
        from torchtitan.models import MODEL_REGISTRY, import_errors
        broken = [m for m in MODEL_REGISTRY.values() if isinstance(m, import_errors.BrokenModel)]
        os._exit(len(broken))
    assert os.waitpid(child, 0)[1] == 0, package
"""


def test_a_package_can_be_imported_first() -> None:
    packages = ["components", "data", "distributed", "generation", "models", "planning.trace"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH_FIRST, *(f"torchtitan.{name}" for name in packages)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None"),
    ],
)
def test_the_allocator_is_left_as_it_was_set(given: dict[str, str], left: str) -> None:
    unset = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    environment = {k: v for k, v in os.environ.items() if k not in unset} | given
    show = "import os, torchtitan; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    done = subprocess.run(
        [sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == left


@pytest.mark.parametrize(
    ("folder", "below"),
    [("runtime", set()), ("tools", {"runtime"}), ("config", {"tools"})],
)
def test_folders_that_others_build_on(folder: str, below: set[str]) -> None:
    for path in (PACKAGE / folder).rglob("*.py"):
        for module in imported(ast.parse(path.read_text()).body):
            if module.startswith("torchtitan."):
                assert module.split(".")[1] in {folder, "errors", *below}, f"{path}: {module}"


def imported(statements: list[ast.stmt]) -> list[str]:
    """The modules that the statements import, also in functions, but not for types alone."""
    found = []
    for statement in statements:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and not node.level:
                found.append(node.module or "")
            elif isinstance(node, ast.Import):
                found += [name.name for name in node.names]
    return found
