"""The example of docs/verifying.md is right, and each planted mistake is found as it says.

    pytest -m "long or not long" tests/e2e/test_example.py --write-docs

writes what `torchtitan verify` says into the page.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import shell

GUIDE = Path(__file__).parents[2] / "docs" / "verifying.md"
_MISTAKE = re.compile(r"### (.+?)\n.*?```diff\n# (\S+)\n(.*?)```\n\n```text\n(.*?)```", re.S)
QUICK = ("contract.init_weights",)
"""The first check of mistakes that CI plants; others take several processes, or as long."""


@dataclass
class Mistake:
    title: str
    file: str
    removed: str
    added: str
    says: str

    @property
    def check(self) -> str:
        """That finds it."""
        return self.says.split()[1]


def mistakes() -> list[Mistake]:
    found = []
    for title, file, diff, says in _MISTAKE.findall(GUIDE.read_text()):
        lines = diff.splitlines()
        removed, added = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        found.append(Mistake(title, file, removed, added, says))
    return found


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package that the page makes."""
    folder = tmp_path_factory.mktemp("example")
    shell(["torchtitan", "new", "sidecar"], cwd=folder)
    root = folder / "sidecar"
    blocks = re.findall(r"```python\n# (sidecar/\S+)\n(.*?)```", GUIDE.read_text(), re.S)
    assert len(blocks) == 5
    for name, text in blocks:
        path = root / name
        if name == "sidecar/infra/parallelize.py":
            text = _with_function(path.read_text(), text)
        path.write_text(text)
    (root / "sidecar/model/state_dict_adapter.py").unlink()
    return root


def _with_function(source: str, function: str) -> str:
    """The source with its last function replaced."""
    node = ast.parse(source).body[-1]
    assert node.name == ast.parse(function).body[0].name
    return "".join(source.splitlines(keepends=True)[: node.lineno - 1]) + function


def verify(root: Path, *options: str) -> dict[str, dict]:
    """Name -> what became of each check."""
    words = ["torchtitan", "verify", "sidecar", "--custom-import", "sidecar", *options]
    done = shell([*words, "--json", "report.json"], cwd=root, check=False, timeout=400)
    assert done.exit_code in (0, 1), done.err
    checks = json.loads((root / "report.json").read_text())["checks"]
    return {check["name"]: check for check in checks}


def test_the_example_is_right(sidecar: Path) -> None:
    options = [f"--only={name}" for name in ("contract", "cost", "layouts.tp2")]
    checks = verify(sidecar, *options)
    assert len(checks) > 15
    assert {check["status"] for check in checks.values()} == {"pass"}, checks


@pytest.mark.long
def test_the_example_is_right_in_everything(sidecar: Path) -> None:
    checks = verify(sidecar)
    assert [name for name, check in checks.items() if check["status"] == "fail"] == []


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(m, id=m.title, marks=[] if m.check in QUICK else [pytest.mark.long])
        for m in mistakes()
    ],
)
def test_a_mistake_is_found_as_the_page_says(
    mistake: Mistake, sidecar: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = tmp_path / "sidecar"
    shutil.copytree(sidecar, root)
    path = root / mistake.file
    source = path.read_text()
    assert source.count(mistake.removed) == 1, mistake.removed
    path.write_text(source.replace(mistake.removed, mistake.added))
    outcome = verify(root, f"--only={mistake.check}")[mistake.check]
    assert outcome["status"] == "fail", outcome
    says = _shown(outcome).replace(f"{root}/", "")
    if request.config.getoption("--write-docs"):
        page = GUIDE.read_text()
        assert page.count(mistake.says) == 1
        GUIDE.write_text(page.replace(mistake.says, says))
    else:
        assert _without_numbers(says) == _without_numbers(mistake.says)


def _shown(outcome: dict) -> str:
    return f"fail  {outcome['name']}\n{outcome['message']}\nlook at: {outcome['hint']}\n"


def _without_numbers(text: str) -> str:
    """Rounding differs between processors and versions."""
    return re.sub(r"\d+(\.\d+)?(e[+-]\d+)?", "N", text)
