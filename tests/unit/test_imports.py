"""Each package can be the first that a process imports: none needs another to be there before."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["components", "data", "planning.trace"])
def test_a_package_can_be_imported_first(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import torchtitan.{package}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
