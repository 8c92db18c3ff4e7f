"""The commit of the code, which stands in reports and environment.json."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import torchtitan
from torchtitan.components import environment


def repository(folder: Path) -> str:
    """A git repository with one commit, which is returned."""

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message=first")
    return git("rev-parse", "--short", "HEAD")


@pytest.mark.parametrize("place", ["", ".venv/lib/python3.11/site-packages"])
def test_the_commit_is_that_of_our_own_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    package = tmp_path / place / "torchtitan"
    package.mkdir(parents=True)
    commit = repository(tmp_path)
    monkeypatch.setattr(torchtitan, "__file__", str(package / "__init__.py"))
    found = environment.environment()["torchtitan"]
    own = place == ""
    assert found == torchtitan.__version__ + (f" ({commit})" if own else "")
