"""A model that cannot be imported is told of where it is used, and ends nothing else."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torchtitan
from torchtitan.authoring.verify.subject import require_model
from torchtitan.commands.models import main as list_models
from torchtitan.components.checkpoint.converted import adapter_of
from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.models import MODEL_REGISTRY
from torchtitan.models.from_hf import train_spec_of_hf_folder
from torchtitan.models.import_errors import BrokenModel, import_each
from torchtitan.protocols.train_spec import get_train_spec


def write_models(folder: Path, **init: str) -> None:
    """A package `zoo` of models."""
    for name, text in {"": "", **init}.items():
        (folder / "zoo" / name).mkdir(exist_ok=True)
        (folder / "zoo" / name / "__init__.py").write_text(text)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "zoo").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "zoo"]:
        del sys.modules[name]


GOOD = "def get_train_spec(flavor):\n    return flavor\n"
BROKEN = {
    "name": (
        "import math\n\nmath.sqr\n",
        "AttributeError: module 'math' has no attribute 'sqr'",
        3,
    ),
    "syntax": ("x = 1\nif x\n", "SyntaxError: expected ':'", 2),
    "missing": ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_mod", 1),
    "library": ("\nimport json\njson.loads('{')\n", "JSONDecodeError: Expecting", 3),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_its_error_and_the_line_of_its_author_are_told(kind: str, zoo: Path, monkeypatch) -> None:
    text, told, line = BROKEN[kind]
    write_models(zoo, broken=text, good=GOOD)
    import_each("zoo", zoo / "zoo")
    from zoo.broken import get_train_spec as broken
    from zoo.good import get_train_spec as good

    assert good("8B") == "8B"
    monkeypatch.setitem(MODEL_REGISTRY, "broken", broken)
    with pytest.raises(ConfigError) as caught:
        get_train_spec("broken", "8B")
    message = str(caught.value)
    assert message.startswith(
        f"the model broken cannot be used: its import failed with {told}"
    ) and message.endswith(f"({zoo}/zoo/broken/__init__.py:{line})")
    with pytest.raises(ConfigError, match=re.escape(message)):
        require_model("broken")
    with pytest.raises(ConfigError, match=re.escape(message)):
        list_models(["broken"])


def test_what_else_is_imported_from_it_tells_the_same(zoo: Path) -> None:
    write_models(zoo, broken="1 / 0\n")
    (zoo / "zoo" / "broken" / "args.py").write_text("SIZE = 3\n")
    import_each("zoo", zoo / "zoo")
    with pytest.raises(ConfigError, match="import failed with ZeroDivisionError") as caught:
        from zoo.broken import Model  # noqa: F401
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    from zoo.broken.args import SIZE

    assert SIZE == 3


def test_a_config_json_of_no_model_may_be_of_the_broken_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(MODEL_REGISTRY, "broken", BrokenModel("broken", "XY", ValueError()))
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(
        CheckpointError, match=r"And the model broken cannot be used: its import failed with XY\."
    ):
        train_spec_of_hf_folder(tmp_path)


def test_the_list_of_models_goes_on(monkeypatch, capsys) -> None:
    def without_sizes(flavor: str) -> object:
        raise NameError("name 'torch' is not defined")

    without_sizes.__globals__["MODEL_CONFIGS"] = {"8B": None}
    monkeypatch.setitem(MODEL_REGISTRY, "broken", BrokenModel("broken", "XY", ValueError()))
    monkeypatch.setitem(MODEL_REGISTRY, "sizeless", without_sizes)
    list_models([])
    printed = capsys.readouterr()
    assert "llama3" in printed.out and "qwen3" in printed.out
    where = f"{__file__}:{without_sizes.__code__.co_firstlineno + 1}"
    assert printed.err.splitlines() == [
        "warning: the model broken cannot be used: its import failed with XY",
        f"warning: the model sizeless fails: NameError: name 'torch' is not defined ({where})",
    ]


def test_models_of_this_package_can_be_imported() -> None:
    assert not [
        name for name, factory in MODEL_REGISTRY.items() if isinstance(factory, BrokenModel)
    ]


def test_a_broken_folder_in_the_tree_leaves_the_other_models(tmp_path: Path, monkeypatch) -> None:
    """By the two lines of the guide's last step, in a copy of the package."""
    from harness import shell

    package = tmp_path / "torchtitan"
    source = Path(torchtitan.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "models" / "mine").mkdir()
    (package / "models" / "mine" / "__init__.py").write_text("class A(nn.Module):\n    pass\n")
    with (package / "models" / "__init__.py").open("a") as file:
        file.write("from .mine import get_train_spec as get_mine_train_spec\n\n")
        file.write('MODEL_REGISTRY["mine"] = get_mine_train_spec\n')
    run = "import sys; sys.path.insert(0, '.'); from torchtitan.cli import main; sys.exit(main({}))"
    done = shell(["python", "-c", run.format(["models"])], cwd=tmp_path)
    assert "llama3" in done.out
    assert done.err == (
        "warning: the model mine cannot be used: its import failed with NameError: name 'nn' "
        f"is not defined ({package}/models/mine/__init__.py:1)\n"
    )


MISSPELT = "MODEL_CONFIGS = {'8B': None}\n\ndef get_train_spec(flavor):\n    return flavour\n"


def test_a_factory_that_fails_ends_nothing_else(tmp_path: Path, monkeypatch) -> None:
    plugin: dict[str, Any] = {}
    exec(MISSPELT, plugin)
    monkeypatch.setitem(MODEL_REGISTRY, "misspelt", plugin["get_train_spec"])
    told = r"And the model misspelt fails: NameError: name 'flavour' is not defined \(.*:4\)"
    (tmp_path / "config.json").write_text('{"model_type": "mystery"}')
    with pytest.raises(CheckpointError, match=f"'mystery' is not supported.*{told}"):
        train_spec_of_hf_folder(tmp_path)

    spec = get_train_spec("llama3", "debugmodel")
    model = spec.meta_model(spec.model_args)
    assert type(adapter_of(model, tmp_path)) is spec.state_dict_adapter
    with pytest.raises(CheckpointError, match=f"no registered TrainSpec of Linear.*{told}"):
        adapter_of(torch.nn.Linear(1, 1), tmp_path)
