"""The guide works word for word: its code blocks, put together, make a model that trains.

`docs/adding_models.md` and the pages `own_*.md` are the source of the blocks, so that what the docs
state is what runs. A block `# FILE, above` goes before the block `# FILE`, and so on.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import string
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from harness import command, read_lines, shell, short_and_long
from safetensors.torch import save_file

import torchtitan
from torchtitan.components.checkpoint.reader import read_metadata
from torchtitan.config import load_config
from torchtitan.protocols.train_spec import MODEL_REGISTRY

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = DOCS / "adding_models.md"


def code_blocks() -> dict[str, str]:
    """First line of each fenced block that names a file (`# model/args.py`) -> the block."""
    named = r"```(?:python|toml)\n *# (\S+\.(?:py|toml)(?:, [a-z ]+)?)\n(.*?)```"
    pages = [GUIDE, *DOCS.glob("own_*.md")]
    return dict(re.findall(named, "".join(page.read_text() for page in pages), re.S))


def write_model(folder: Path, *, whole: bool = True) -> None:
    """The guide's folder, of nothing but its blocks.

    `whole` is with what it calls optional: the Hugging Face names.
    """
    blocks = code_blocks()
    dots = blocks["model/args.py, for the dots"].strip()
    spec = blocks["__init__.py"]
    if whole:
        spec = spec.replace("state_dict_adapter=None", "state_dict_adapter=YourStateDictAdapter")
        spec = "from .model.state_dict_adapter import YourStateDictAdapter\n" + spec
    files = {
        "__init__.py": blocks["__init__.py, above"] + spec + blocks["__init__.py, below"],
        "model/__init__.py": "",
        "model/args.py": blocks["model/args.py"].replace("...", dots),
        "model/model.py": blocks["model/model.py, above"] + blocks["model/model.py"],
        "model/state_dict_adapter.py": blocks["model/state_dict_adapter.py"]
        + textwrap.indent(blocks["model/state_dict_adapter.py, in the class"], "    "),
        "infra/__init__.py": "",
        "infra/parallelize.py": blocks["infra/parallelize.py, above"]
        + blocks["infra/parallelize.py"],
        "infra/pipeline.py": blocks["infra/pipeline.py"],
        "train_configs/debug_model.toml": blocks["train_configs/debug_model.toml"],
        "train_configs/your_model_8b.toml": blocks["train_configs/your_model_8b.toml"],
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def options(folder: Path, *more: str, whole: bool = True) -> list[str]:
    """Writes the model, and gives the options to train it with `folder` as working directory."""
    model = folder / "my_pkg" / "your_model"
    write_model(model, whole=whole)
    words = "--job.custom_import my_pkg.your_model --training.steps 8 --training.seq_len 32 "
    words += f"--lr_scheduler.warmup_steps 2 --metrics.log_freq 1 --job.dump_folder {folder}/run "
    return ["--job.config_file", f"{model}/train_configs/debug_model.toml", *words.split(), *more]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "run" / "metrics.jsonl")]


def trained(folder: Path, ranks: int, *more: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    words = options(folder, *more)
    monkeypatch.chdir(folder)
    done = command("train", *words, ranks=ranks)
    assert done.exit_code == 0, done.err
    if "--activation_checkpoint.mode=full" in more:
        assert "WARNING" not in done.err
    assert "compile.enable = true: has no effect" not in done.err
    return losses(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process, with a checkpoint, by the command as users type it."""
    folder = tmp_path_factory.mktemp("one")
    words = options(folder, "--checkpoint.enable", "--checkpoint.interval=4")
    shell(["python", "-m", "torchtitan.train", *words], cwd=folder)
    return folder


def test_the_guides_model_trains_alike_on_one_and_four_processes(one: Path, tmp_path: Path) -> None:
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", "4", "-m", "torchtitan.train"]
    done = shell([*torchrun, *options(tmp_path, whole=False)], cwd=tmp_path)
    # Its `parallelize_fn` knows one mode of checkpointing, which is not the default.
    assert done.err.count('activation_checkpoint.mode = "selective": has no effect') == 1
    assert losses(one)[-1] < losses(one)[0] - 0.3
    assert losses(tmp_path) == pytest.approx(losses(one), rel=1e-4)


LAYOUTS = {
    "tensor parallel and FSDP": (4, ["--parallelism.tensor_parallel_degree=2"]),
    "checkpointing": (1, ["--activation_checkpoint.mode=full"]),
}
LONG_LAYOUTS = {
    "HSDP": (4, ["--parallelism.data_parallel_replicate_degree=2"]),
    "whole-model compile": (2, ["--compile.enable"]),
}


@pytest.mark.parametrize("layout", short_and_long(LAYOUTS, LONG_LAYOUTS))
def test_the_guides_model_trains_alike_on(
    layout: tuple, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, more = layout
    assert trained(tmp_path, ranks, *more, monkeypatch=monkeypatch) == pytest.approx(
        losses(one), rel=1e-4
    )


def test_the_guides_model_resumes_on_another_layout(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(one / "run" / "checkpoint" / "step-4", tmp_path / "run" / "checkpoint/step-4")
    more = "--checkpoint.enable", "--parallelism.tensor_parallel_degree=2"
    resumed = trained(tmp_path, 2, *more, monkeypatch=monkeypatch)
    assert resumed == pytest.approx(losses(one)[4:], rel=1e-4)


def test_the_guides_numerics_test_works(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`YourModel(args).load_checkpoint(...)`, of a checkpoint of ours and of Hugging Face names."""
    monkeypatch.syspath_prepend(one)
    monkeypatch.setitem(MODEL_REGISTRY, "your_model", None)  # so that it is no more afterwards
    del MODEL_REGISTRY["your_model"]
    monkeypatch.delitem(sys.modules, "my_pkg", raising=False)
    ours = importlib.import_module("my_pkg.your_model")
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]  # other tests have a package of this name
    spec = ours.get_train_spec("debugmodel")
    model = ours.YourModel(spec.model_args).load_checkpoint(one / "run" / "checkpoint" / "step-8")
    theirs = spec.state_dict_adapter(spec.model_args).to_hf(model.state_dict())
    assert {"model.embed_tokens.weight", "model.layers.1.wq.weight", "lm_head.weight"} < set(theirs)
    save_file(theirs, tmp_path / "model.safetensors", {"format": "pt"})
    again = ours.YourModel(spec.model_args).load_checkpoint(tmp_path)
    tokens = torch.randint(0, 264, (1, 32))
    torch.testing.assert_close(again(tokens), model(tokens), atol=0, rtol=0)


def test_the_guides_loss_and_loader_train_and_resume_on_any_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = options(tmp_path, "--checkpoint.enable", "--checkpoint.interval=4")
    package, blocks = tmp_path / "my_pkg" / "your_model", code_blocks()
    for name in ("loss", "data"):
        (package / f"{name}.py").write_text(blocks[f"{name}.py"])
    with (package / "__init__.py").open("r+") as file:
        text = file.read().replace("from torchtitan.data import", "from .data import")
        file.seek(0)
        file.write(
            "from .loss import build_loss\n" + text.replace("import build_loss, ", "import ")
        )
    # Its checks, where the loader is made for one rank and for two.
    only = [f"--only={name}" for name in ("contract.loss", "contract.dataloader")]
    custom = ["--custom-import=my_pkg.your_model"]
    verified = shell(["torchtitan", "verify", "your_model", *custom, *only], cwd=tmp_path)
    assert "0 failed, 0 skipped" in verified.out
    done = command("train", *words)
    assert done.exit_code == 0, done.err
    whole = losses(tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "step-8")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    two = ["--parallelism.tensor_parallel_degree=2", "--parallelism.data_parallel_shard_degree=2"]
    done = command("train", *words, *two, ranks=4)
    assert done.exit_code == 0, done.err
    assert losses(tmp_path) == pytest.approx(whole[4:], rel=1e-4)


def test_the_guides_loss_of_two_terms_is_logged_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the chunked loss that it calls gets the output layer."""
    monkeypatch.chdir(tmp_path)
    logged = []
    for ranks, loss in ((1, "cross_entropy"), (2, "chunked_cross_entropy")):
        words = options(tmp_path, f"--loss.name={loss}", "--validation.enable", whole=False)
        package, blocks = tmp_path / "my_pkg" / "your_model", code_blocks()
        (package / "loss.py").write_text(blocks["loss.py, of two terms"])
        model, init = package / "model" / "model.py", package / "__init__.py"
        text = model.read_text()
        end = textwrap.indent(blocks["model/model.py, at the end of forward"], " " * 8)
        text = text.replace("        h = self.norm(h)\n        return self.output(h)\n", end)
        after = "        self.after = nn.Linear(args.dim, args.dim, bias=False)\n"
        model.write_text(text.replace("        self.output =", after + "        self.output ="))
        text = init.read_text().replace("import build_loss, ", "import ")
        init.write_text("from .loss import build_loss\n" + text)
        done = command("train", *words, ranks=ranks)
        assert done.exit_code == 0, done.err
        logged.append(read_lines(tmp_path / "run" / "metrics.jsonl"))
        shutil.rmtree(tmp_path / "run")
    for key in ("loss", "loss_after"):
        one, two = ([line[key] for line in lines] for lines in logged)
        assert two == pytest.approx(one, rel=1e-4) and one[-1] < one[0] - 0.2, key


def test_the_guides_teacher_is_in_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the student learns alike where ranks share sequences and matrices."""
    monkeypatch.chdir(tmp_path)
    words = "--training.steps=2 --training.seq_len=32 --training.global_batch_size=4 "
    words += "--training.local_batch_size=4 --training.mixed_precision_param=float32 "
    words += "--metrics.log_freq=1 --checkpoint.enable --activation_checkpoint.mode=none"
    assert command("train", "--job.dump_folder=teacher", *words.split()).exit_code == 0
    block = code_blocks()["distill.py"]
    path = "teacher/checkpoint/step-2"
    Path("distill.py").write_text(block.replace("outputs/checkpoint/step-200", path))
    words += " --job.custom_import=distill --model.name=student --model.flavor=small"
    layout = [f"--parallelism.{key}_parallel_degree=2" for key in ("context", "tensor")]
    for ranks, more in ((1, []), (4, layout)):
        folder = tmp_path / str(ranks)
        options = [*words.split(), *more, f"--job.dump_folder={folder / 'run'}"]
        done = command("train", *options, ranks=ranks)
        assert done.exit_code == 0, done.err
        assert "WARNING" not in done.err
        saved = read_metadata(folder / "run" / "checkpoint" / "step-2").state_dict_metadata
        assert not [name for name in saved if "teacher" in name]
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


def test_the_guides_tokenizer_optimizer_and_converter_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters").write_text(string.printable)
    own = ["--model.tokenizer_path=letters", "--optimizer.name=Lion", "--optimizer.lr=5e-3"]
    words = options(tmp_path, *own, whole=False)
    package, blocks = tmp_path / "my_pkg" / "your_model", code_blocks()
    for name in ("tokenizer", "optimizer", "adapters"):
        (package / f"{name}.py").write_text(blocks[f"{name}.py"])
    init = package / "__init__.py"
    text = init.read_text().replace(", build_tokenizer\n", "\n")
    own_parts = (
        "from . import adapters, optimizer\nfrom .tokenizer import Letters as build_tokenizer\n"
    )
    init.write_text(own_parts + text)
    for tensor_parallel in (1, 2):
        degree = f"--parallelism.tensor_parallel_degree={tensor_parallel}"
        done = command("train", *words, degree, ranks=tensor_parallel)
        assert done.exit_code == 0, done.err
        first, *_, last = losses(tmp_path)
        assert last < first - 0.2
        shutil.rmtree(tmp_path / "run")
    done = command("train", *words, "--model.converters=adapters", "--checkpoint.enable")
    assert done.exit_code == 0, done.err
    done = command("generate", "--checkpoint=run", "--prompt=a")
    assert done.exit_code == 0, done.err


def test_the_guides_training_configs_load_as_they_stand(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = load_config(["--job.config_file", str(tmp_path / "train_configs/your_model_8b.toml")])
    assert (config.model.name, config.model.flavor) == ("your_model", "8B")
    assert (config.optimizer.lr, config.training.seq_len) == (3e-4, 8192)


def test_the_guides_registration_in_the_tree_works(tmp_path: Path, one: Path) -> None:
    """Step 7, on a copy of the package, so that the tree itself stays as it is."""
    package = tmp_path / "torchtitan"
    shutil.copytree(Path(torchtitan.__file__).parent, package)
    write_model(package / "models" / "your_model")
    lines = re.search(
        r"```python\n(from \.your_model import.*?)```", GUIDE.read_text(), re.S
    ).group(1)
    with (package / "models" / "__init__.py").open("a") as file:
        file.write(lines)
    (last,) = re.findall(r"^torchrun .* (-m torchtitan\.train .*)$", GUIDE.read_text(), re.M)
    words = "--training.steps=8 --training.seq_len=32 --lr_scheduler.warmup_steps=2"
    words += f" --metrics.log_freq=1 --job.dump_folder={tmp_path}/run"
    done = subprocess.run(
        [sys.executable, *last.split(), *words.split()],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == losses(one)
    script = (
        "from torchtitan.models import MODEL_REGISTRY as r; import torch\n"
        "for flavor in ('8B', '70B'):\n"
        "    spec = r['your_model'](flavor)\n"
        "    with torch.device('meta'): model = spec.model_cls(spec.model_args)\n"
        "    n = sum(p.numel() for p in model.parameters())\n"
        "    print(flavor, n == spec.model_args.get_nparams_and_flops(8192)[0])"
    )
    built = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert built.stdout == "8B True\n70B True\n", built.stderr
