"""What the docs say of files, headings, keys and defaults is so."""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import transformers
from doc_pages import PAGES, ROOT, blocks

from torchtitan.config import JobConfig
from torchtitan.config.toml_file import format_value
from torchtitan.config.upstream import INSTEAD, VALUES


def test_commands_are_in_blocks_of_bash() -> None:
    for block in blocks("", "text", "console"):
        assert not re.search(r"^\$? ?(torchtitan|torchrun) ", block.text, re.M), str(block)


def test_every_page_is_in_the_index() -> None:
    index = PAGES["docs/README.md"].read_text()
    pages = [Path(page).name for page in PAGES if page.startswith("docs/")]
    assert [name for name in pages if name != "README.md" and f"({name})" not in index] == []


KEY_UNKNOWN = object()


def test_the_keys_to_migrate_to_exist() -> None:
    """And those to migrate from: of upstream's none is a key here, which would need no row."""
    config = JobConfig()
    of_upstream, of_trainer = PAGES["docs/migrating.md"].read_text().split("## From the Hugging")
    for row in re.findall(r"^\| (.*?) \| (.*) \|$", of_upstream + of_trainer, re.M):
        for key in re.findall(r"`([a-z_]+\.[a-z_0-9]+)[^`]*`", row[1]):
            if key != "config.resolved":
                section, name = key.split(".")
                assert hasattr(getattr(config, section), name), key
    for row in re.findall(r"^\| (`.*?) \|", of_upstream, re.M):
        for key in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)", row):
            found: Any = config
            for name in key.split("."):
                found = getattr(found, name, KEY_UNKNOWN)
            assert found is KEY_UNKNOWN or "= " in row, f"{key} is no change"
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    for row in re.findall(r"^\| (`.*?) \|", of_trainer, re.M):
        named = set(re.findall(r"`([a-z_0-9]+)`", row))
        assert named <= fields, named - fields


def test_what_messages_say_of_upstreams_keys_is_what_the_page_says() -> None:
    page = PAGES["docs/migrating.md"].read_text()
    table = page.split("\nKeys and commands:\n")[1].split("\nAll other keys")[0]
    rows = {}
    for left, right in re.findall(r"^\| (`.*?) \| (.*) \|$", table, re.M):
        keys = re.findall(r"`(\.?[a-z_0-9]+(?:\.[a-z_0-9]+)*)`", left)
        if "= " not in left and "scripts/" not in left:
            section = keys[0].rpartition(".")[0] if keys else ""
            rows |= {section + k if k[0] == "." else k: right.replace("`", "") for k in keys}
    assert rows == INSTEAD
    for values in VALUES.values():
        for value, text in values.items():
            (right,) = re.findall(rf'^\| .*"{value}".* \| (.*) \|$', table, re.M)
            assert set(re.split("[`, ]+", text)) <= set(re.split('[`,; ="]+', right)), value


def test_the_defaults_to_migrate_to_are_ours() -> None:
    """Those of both programs are in brackets, ours last: `optimizer.lr` (5e-5; 8e-4)."""
    config, page = JobConfig(), PAGES["docs/migrating.md"].read_text()
    found = re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)` \([^;()]+; ([^()]+)\)", page)
    assert len(found) > 10
    for key, written in found:
        value = functools.reduce(getattr, key.split("."), config)
        values = value if isinstance(value, list) else [value]
        shown = ["as in training" if v is None else format_value(v).strip('"') for v in values]
        for one, ours in zip(written.replace("`", "").split(" and "), shown, strict=True):
            assert one == ours or float(one) == float(ours), key


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", _prose(PAGES[page])):
        if not target.startswith(("http://", "https://")):
            path = PAGES[page].parent / target if target else PAGES[page]
            assert path.exists(), target
            assert not anchor or anchor in _anchors(path), f"{target}#{anchor}"


def _prose(path: Path) -> str:
    return re.sub(r"```.*?```", "", path.read_text(), flags=re.S)


def _anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", _prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_converts_what_its_training_saves() -> None:
    text = PAGES["README.md"].read_text()
    config = tomllib.loads(
        Path("torchtitan/models/qwen3/train_configs/qwen3_0_6b.toml").read_text()
    )
    folder, interval = config["job"]["dump_folder"], config["checkpoint"]["interval"]
    found = re.search(r"--training.steps (\d+)\ntorchtitan convert to-hf (\S+) ", text)
    assert Path(found[2]) == Path(folder, "checkpoint", f"step-{found[1]}")
    assert int(found[1]) % interval == 0


def test_the_readme_installs_a_torch_that_the_package_takes() -> None:
    """Without the bound, pip first takes a newer one, and then another build in its place."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch_range,) = (d for d in project["dependencies"] if d.startswith("torch>"))
    assert f'pip install "torch{torch_range.split(",")[1]}"' in PAGES["README.md"].read_text()
