"""Each package can be the first that a process imports: none needs another to be there before."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["components", "data", "planning.trace"])
def test_a_package_can_be_imported_first(package: str) -> None:
    models = "from torchtitan.models import MODEL_REGISTRY as models, import_errors"
    none = "assert not [m for m in models.values() if isinstance(m, import_errors.BrokenModel)]"
    done = subprocess.run(
        [sys.executable, "-c", f"import torchtitan.{package}; {models}; {none}"],
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
