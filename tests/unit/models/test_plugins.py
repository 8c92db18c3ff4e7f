"""Models from outside the package."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchtitan.config import load_config
from torchtitan.errors import ConfigError
from torchtitan.models import MODEL_REGISTRY
from torchtitan.models.plugins import load_plugins

MODULE_THAT_REGISTERS = """
from torchtitan.protocols.train_spec import register_train_spec

def get_train_spec(flavor):
    return "spec of " + flavor

register_train_spec({name!r}, get_train_spec)
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on `sys.path`; models and modules that a test adds are forgotten after it."""
    monkeypatch.syspath_prepend(tmp_path)
    models, modules = dict(MODEL_REGISTRY), set(sys.modules)
    yield tmp_path
    for name in set(MODEL_REGISTRY) - set(models):
        del MODEL_REGISTRY[name]
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def install(folder: Path, entry_points: str) -> None:
    """Put what `pip` writes for a package with entry points into a folder."""
    info = folder / "fake_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-models\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[torchtitan.models]\n{entry_points}\n")


def test_custom_import_registers_its_model(outside: Path) -> None:
    (outside / "my_pkg").mkdir()
    (outside / "my_pkg" / "__init__.py").touch()
    (outside / "my_pkg" / "my_model.py").write_text(MODULE_THAT_REGISTERS.format(name="mine"))
    load_plugins("my_pkg.my_model")
    load_plugins("my_pkg.my_model")  # again is harmless
    assert MODEL_REGISTRY["mine"]("8B") == "spec of 8B"


def test_custom_import_finds_modules_in_the_working_directory(
    outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under `python -m`, also for the installed command, which has no such path."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "model_at_hand.py").write_text(MODULE_THAT_REGISTERS.format(name="at_hand"))
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(work))])
    load_plugins("model_at_hand")
    assert "at_hand" in MODEL_REGISTRY


AS_A_FILE = ". Give the name of a module as in Python's import, not the path of a file"
UPSTREAM = ". If upstream torchtitan has that name, see docs/migrating.md"
LOOKED_FOR = f". It is looked for in {os.getcwd()}, PYTHONPATH and the installed packages"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("no_such_module", LOOKED_FOR),
        ("torchtitan.no_such_module", UPSTREAM),
        (".relative", AS_A_FILE),
        (".", AS_A_FILE),
        ("my_model/", AS_A_FILE),
        ("./my_model.py", AS_A_FILE),
    ],
)
def test_custom_import_of_no_module(name: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_plugins(name)
    message = str(caught.value)
    assert message.startswith(f"job.custom_import = {name!r}: the import failed with ")
    assert message.endswith(advice)


def test_custom_import_that_raises_names_error_and_line(outside: Path) -> None:
    (outside / "broken_model.py").write_text("import math\n\nmath.sqrt(-1)\n")
    with pytest.raises(ConfigError) as caught:
        load_plugins("broken_model")
    message = str(caught.value)
    assert "job.custom_import = 'broken_model'" in message
    assert "ValueError: " in message
    assert f"({outside / 'broken_model.py'}:3)" in message


@pytest.mark.parametrize(
    ("text", "error", "line"),
    [
        ("x = 1\nif x\n", "SyntaxError: expected ':'", 2),
        ("\nimport json\njson.loads('{')\n", "JSONDecodeError: Expecting property name", 3),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'", 1),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3", 2),
    ],
)
def test_custom_import_that_fails_elsewhere_names_its_own_line(
    outside: Path, text: str, error: str, line: int
) -> None:
    (outside / "broken_pkg").mkdir()
    (outside / "broken_pkg" / "__init__.py").touch()
    (outside / "broken_pkg" / "model.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_plugins("broken_pkg.model")
    message = str(caught.value)
    assert f": the import failed with {error}" in message
    assert message.endswith(f"({outside}/broken_pkg/model.py:{line})")


@pytest.mark.parametrize(
    "text",
    [
        "from torchtitan.components.optimizer import build_optimizers\n",
        "from torchtitan.hf_datasets.text_datasets import build_text_dataloader\n",
    ],
)
def test_custom_import_of_names_that_upstream_has(outside: Path, text: str) -> None:
    (outside / "broken_model.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_plugins("broken_model")
    assert str(caught.value).endswith(f"({outside}/broken_model.py:1){UPSTREAM}")


def test_a_config_module_of_upstream_is_told_where_to_look() -> None:
    """As `job.custom_config_module` of upstream's files of flux."""
    with pytest.raises(ConfigError) as caught:
        load_config(["--job.custom_config_module", "torchtitan.models.flux.job_config"])
    assert str(caught.value).endswith(UPSTREAM)


def test_custom_import_from_one_folder_too_high(
    outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torchtitan new` makes high/high: from the parent, Python finds an empty package."""
    (outside / "high" / "high").mkdir(parents=True)
    key = "job.custom_import = 'high'"
    monkeypatch.chdir(outside)
    try:
        with pytest.raises(ConfigError, match=f"^{key}: {outside}/high is a folder without __init"):
            load_plugins("high")
        (outside / "high" / "high" / "__init__.py").touch()
        with pytest.raises(ConfigError, match=r"Run the command inside it: cd high$"):
            load_plugins("high")
    finally:
        del sys.modules["high"]
    monkeypatch.chdir(outside / "high")
    load_plugins("high")


def test_custom_import_that_takes_a_taken_name(outside: Path) -> None:
    (outside / "second_llama3.py").write_text(MODULE_THAT_REGISTERS.format(name="llama3"))
    with pytest.raises(ConfigError, match="'llama3' is already registered"):
        load_plugins("second_llama3")


def test_entry_point_may_be_a_module_that_registers(outside: Path) -> None:
    (outside / "plugin_module.py").write_text(MODULE_THAT_REGISTERS.format(name="from_module"))
    install(outside, "any_name = plugin_module")
    load_plugins()
    assert MODEL_REGISTRY["from_module"]("8B") == "spec of 8B"
    assert "any_name" not in MODEL_REGISTRY


def test_entry_point_may_be_a_factory(outside: Path) -> None:
    (outside / "plugin_factory.py").write_text("def make(flavor):\n    return f'made {flavor}'\n")
    install(outside, "from_factory = plugin_factory:make")
    load_plugins()
    load_plugins()
    assert MODEL_REGISTRY["from_factory"]("8B") == "made 8B"


def test_broken_entry_point_is_named_and_does_not_stop_the_others(
    outside: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (outside / "plugin_broken.py").write_text("raise OSError('no licence')\n")
    (outside / "plugin_good.py").write_text("def make(flavor):\n    return flavor\n")
    install(outside, "bad = plugin_broken\ngood = plugin_good:make")
    load_plugins()
    assert "good" in MODEL_REGISTRY
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning == (
        "model plugin bad = plugin_broken failed to load: OSError: no licence "
        f"({outside / 'plugin_broken.py'}:1)"
    )
