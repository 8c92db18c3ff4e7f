"""`torchtitan new` writes models that train, under their own name, with nothing left to do."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from harness import command, read_lines, shell

import torchtitan
import torchtitan.models
from torchtitan.authoring.new.command import main
from torchtitan.authoring.new.source import Names
from torchtitan.authoring.verify.command import main as verify_main
from torchtitan.errors import ConfigError
from torchtitan.protocols.train_spec import MODEL_REGISTRY, get_train_spec

ZOO = ["deepseek_v3", "flux", "gemma3", "gpt_oss", "llama3", "llama4", "qwen3"]
GUIDE = {
    "__init__.py",
    "README.md",
    "model/__init__.py",
    "model/args.py",
    "model/model.py",
    "model/state_dict_adapter.py",
    "infra/__init__.py",
    "infra/parallelize.py",
    "infra/pipeline.py",
    "train_configs/debug_model.toml",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty working folder; models that the test registers are forgotten after it."""
    known, modules = dict(MODEL_REGISTRY), set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    MODEL_REGISTRY.clear()
    MODEL_REGISTRY.update(known)
    for name in set(sys.modules) - modules:
        if name.partition(".")[0].startswith("new_"):
            del sys.modules[name]


def spec_of(root: Path, name: str, flavor: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(root))
    __import__(name)
    return get_train_spec(name, flavor)


@pytest.mark.parametrize("like", ZOO)
def test_a_model_like_any_other_has_the_guides_files_and_its_own_names(like, here, monkeypatch):
    name = f"new_{like}"
    assert main([name, "--like", like]) == 0
    folder = here / name / name
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= GUIDE
    spec = spec_of(here / name, name, "debugmodel", monkeypatch)
    prefix = Names.of(name).prefix
    assert spec.model_cls.__name__ == f"{prefix}Model"
    assert type(spec.model_args).__name__ == f"{prefix}ModelArgs"
    assert spec.state_dict_adapter.__name__ == f"{prefix}StateDictAdapter"
    assert spec.parallelize_fn.__name__ == f"parallelize_{name}"
    lint = ["ruff", "check", "--select=E,F", "--line-length=100", str(folder)]
    assert shell(lint, check=False).exit_code == 0, shell(lint, check=False).out
    parallelize = (folder / "infra" / "parallelize.py").read_text()
    told = parallelize.count("leaves these lines out: then it is refused.\n        apply_cp(")
    assert told == 1
    toml = tomllib.loads((folder / "train_configs" / "debug_model.toml").read_text())
    assert (toml["model"]["name"], toml["job"]["custom_import"]) == (name, name)
    assert toml["job"]["description"].startswith(f"{Names.of(name).title} debug model on ")
    # It is the model that it is like, under another name.
    original = get_train_spec(like, "debugmodel")
    assert vars(spec.model_args) == vars(original.model_args)
    for path in folder.rglob("*.py"):
        assert not re.search(rf"\b{original.model_cls.__name__}\b", path.read_text()), path


def test_a_new_model_trains_on_one_and_two_ranks(here):
    main(["new_model"])
    config = "new_model/train_configs/debug_model.toml"
    options = (f"--job.config_file={config}", "--training.steps=3", "--training.seq_len=64")
    losses = []
    for ranks in (1, 2):
        folder = here / "new_model" / f"run-{ranks}"
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(here / "new_model")
            done = command("train", *options, f"--job.dump_folder={folder}", ranks=ranks)
        assert done.exit_code == 0, done.err
        losses.append([line["loss"] for line in read_lines(folder / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_model_of_images_brings_its_data_and_config(here, monkeypatch):
    main(["new_images", "--like", "flux"])
    monkeypatch.chdir(here / "new_images")
    options = "--training.steps=2", "--training.seq_len=16", "--validation.steps=1"
    config = "--job.config_file=new_images/train_configs/debug_model.toml"
    done = command("train", config, *options, f"--job.dump_folder={here}")
    assert done.exit_code == 0, done.err
    for path in Path("new_images").rglob("*.*"):
        if path.suffix in (".py", ".toml"):
            assert "models.flux" not in path.read_text(), path


def test_what_is_told_to_do_next_works_without_installing_the_package(here, capsys, monkeypatch):
    main(["new_model"])
    told = [line.strip() for line in capsys.readouterr().out.partition("next:\n")[2].splitlines()]
    assert told[0] == "cd new_model" and told[-1] == "pytest"
    (verify,) = [line.split() for line in told if line.startswith("torchtitan verify")]
    monkeypatch.chdir(here / "new_model")
    assert verify_main([*verify[2:], "--only", "contract.import"]) == 0
    done = shell(["pytest", "-k", "contract.spec"], check=False)
    assert done.exit_code == 0 and "1 passed" in done.out, done.out + done.err


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("grok", "Grok"), ("your_model", "Your"), ("phi_4_mini", "Phi4Mini"), ("model", "Model")],
)
def test_classes_are_named_after_the_model(name, prefix):
    assert Names.of(name).prefix == prefix


@pytest.mark.parametrize("name", ["My-Model", "4ever", "a__b", "class", "", "a/b"])
def test_names_that_python_does_not_allow_are_refused_with_a_proposal(name, here):
    with pytest.raises(ConfigError, match=r"NAME .*must be a Python name.* as '[a-z]"):
        main([name])
    assert not list(here.iterdir())


def test_nothing_is_written_over(here):
    main(["new_model"])
    before = (here / "new_model" / "pyproject.toml").read_text()
    with pytest.raises(ConfigError, match="new_model exists already"):
        main(["new_model", "--like", "qwen3"])
    assert (here / "new_model" / "pyproject.toml").read_text() == before


def test_the_home_folder_may_be_given_as_in_a_shell(here, monkeypatch):
    """Shells leave `--out=~/models` as it is."""
    monkeypatch.setenv("HOME", str(here / "home"))
    assert main(["new_model", "--out=~/models"]) == 0
    assert [path.name for path in here.iterdir()] == ["home"]
    assert (here / "home/models/new_model/pyproject.toml").is_file()
    with pytest.raises(ConfigError, match=f"--hf {here}/home/hf: no such folder"):
        verify_main(["new_model", "--hf=~/hf"])


def test_a_full_disk_leaves_nothing(here, monkeypatch):
    calls = []

    def fail_later(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(here.iterdir())
    monkeypatch.setattr(os, "fsync", fail_later)
    with pytest.raises(ConfigError, match=r"cannot write there: No space .*\. Free some space"):
        main(["new_model"])
    assert len(calls) == 3 and sorted(here.iterdir()) == before


def test_wrong_arguments_are_refused(here):
    with pytest.raises(ConfigError, match=r"--like lama3: no such model\. Did you mean .llama3."):
        main(["new_model", "--like", "lama3"])
    for name in ("qwen3", "plugins"):  # a folder `plugins` would hide the module
        with pytest.raises(ConfigError, match=f"'{name}' is taken"):
            main([name])
    for name in ("torch", "random"):
        with pytest.raises(ConfigError, match=f"'{name}' is taken by the module .*{name}"):
            main([name])
    with pytest.raises(ConfigError, match=r"--from-hf nowhere: .*config.json cannot be read"):
        main(["new_model", "--from-hf", "nowhere"])
    (here / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is damaged"):
        main(["new_model", "--from-hf", "."])
    assert [path.name for path in here.iterdir()] == ["config.json"]


def save_hf(kind: str, folder: Path, **fields) -> torch.nn.Module:
    """A tiny model of transformers, with random weights, saved in `folder`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**(sizes | fields))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 32}),
        # Of no model that we have, but with Llama's names.
        ("Mistral", {"sliding_window": None, "head_dim": 16}),
    ],
)
def test_a_model_from_hugging_face_computes_the_same(kind, fields, here, monkeypatch):
    original = save_hf(kind, here / "hf", **fields)
    name = f"new_{kind.lower()}"
    assert main([name, "--from-hf", "hf"]) == 0
    text = (here / name / name / "model" / "state_dict_adapter.py").read_text()
    assert "TODO" not in text
    importlib.invalidate_caches()
    monkeypatch.syspath_prepend(str(here / name))
    module = __import__(name)
    (flavor,) = set(module.MODEL_CONFIGS) - {"debugmodel"}
    spec = module.get_train_spec(flavor)
    model = spec.model_cls(spec.model_args).load_checkpoint(here / "hf").eval()
    tokens = torch.randint(264, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), original(tokens).logits, atol=1e-4, rtol=1e-4)


def test_what_hugging_faces_folder_has_and_the_model_has_not_is_named(here, capsys):
    save_hf("Olmo2", here / "hf")
    main(["new_olmo", "--from-hf", "hf"])
    assert "left to do" in capsys.readouterr().out
    adapter = (here / "new_olmo/new_olmo/model/state_dict_adapter.py").read_text()
    todo = adapter.partition("no counterpart for these tensors")[2]
    assert "post_feedforward_layernorm" in todo and "k_norm" in todo and "q_proj" not in todo
    compile(adapter, "adapter", "exec")


def test_in_the_tree_the_model_is_registered(tmp_path):
    """On a copy of the checkout, by the command as users type it."""
    tree = tmp_path / "checkout"
    source = Path(torchtitan.__file__).parent
    shutil.copytree(source, tree / "torchtitan", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source.parent / "pyproject.toml", tree)
    run = "import sys; sys.path.insert(0, '.'); from torchtitan.cli import main; sys.exit(main({}))"
    shell(["python", "-c", run.format(["new", "new_model", "--in-tree"])], cwd=tree)
    done = shell(["python", "-c", run.format(["models", "new_model"])], cwd=tree)
    assert "new_model  debugmodel" in done.out
    lines = (tree / "torchtitan/models/__init__.py").read_text().splitlines()
    imports = [line for line in lines if line.startswith("from .")]
    entries = [line for line in lines if line.startswith("MODEL_REGISTRY[")]
    assert imports == sorted(imports) and entries == sorted(entries)
    assert len(imports) == len(entries) == len([*ZOO, "transformers", "new_model"])
    test = (tree / "tests/unit/models/test_new_model.py").read_text()
    assert 'conformance_tests("new_model", quick=True)' in test
