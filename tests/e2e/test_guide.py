"""The guide works word for word: its code blocks, with `...` filled in, make a model that trains.

`docs/adding_models.md` is the source of the blocks, so that what the docs state is what runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from harness import command, read_lines, shell

import torchtitan
from torchtitan.config import load_config

GUIDE = Path(__file__).parents[2] / "docs" / "adding_models.md"

BLOCK = """
import torch
import torch.nn.functional as F
from torch.nn import RMSNorm


class TransformerBlock(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.norm = RMSNorm(args.dim)
        self.qkv = nn.Linear(args.dim, 3 * args.dim, bias=False)
        self.proj = nn.Linear(args.dim, args.dim, bias=False)
        self.heads = args.n_heads

    def forward(self, x):
        batch, seq, dim = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, seq, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.proj(out.transpose(1, 2).reshape(batch, seq, dim))
"""

REST_OF_PARAMETERS = (  # the output layer, the blocks above, and the last norm
    "+ (1 + self.vocab_size) * self.dim + self.n_layers * (4 * self.dim + 1) * self.dim"
)

PARALLELIZE_IMPORTS = """
import torch
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.fsdp import apply_fsdp
from torchtitan.distributed.parallel_dims import ParallelDims
from {package}.model.model import YourModel
"""

SPEC_IMPORTS = """
from torchtitan.components import build_loss, build_lr_scheduler, build_optimizer, build_tokenizer
from torchtitan.data import build_dataloader
"""

DEBUG_FLAVOR = (
    'MODEL_CONFIGS["debug"] = YourModelArgs(dim=32, n_layers=2, n_heads=2, vocab_size=264)'
)


def code_blocks() -> dict[str, str]:
    """First line of each fenced block that names a file (`# model/args.py`) -> the block."""
    blocks = re.findall(
        r"```(?:python|toml)\n(# \S+\.(?:py|toml))\n(.*?)```", GUIDE.read_text(), re.S
    )
    return {name.removeprefix("# "): textwrap.dedent(body) for name, body in blocks}


def write_model(folder: Path, package: str) -> None:
    """Create the guide's folder from its blocks, filling only what the guide leaves open."""
    blocks = code_blocks()
    args = blocks["model/args.py"].replace("+ ...", REST_OF_PARAMETERS)
    model = blocks["model/model.py"].replace("from .args import", BLOCK + "\nfrom .args import", 1)
    files = {
        "__init__.py": SPEC_IMPORTS
        + blocks["__init__.py"].replace(
            "def get_train_spec", f"{DEBUG_FLAVOR}\n\n\ndef get_train_spec"
        ),
        "model/__init__.py": "",
        "model/args.py": args,
        "model/model.py": model,
        "model/state_dict_adapter.py": blocks["model/state_dict_adapter.py"],
        "infra/__init__.py": "",
        "infra/parallelize.py": PARALLELIZE_IMPORTS.format(package=package)
        + blocks["infra/parallelize.py"],
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def options(folder: Path, processes: int, *more: str) -> list[str]:
    """Writes the model, and gives the options to train it with `folder` as working directory."""
    write_model(folder / "my_pkg" / "your_model", "my_pkg.your_model")
    words = "--job.custom_import my_pkg.your_model --model.name your_model --model.flavor debug "
    words += "--training.seq_len 32 --training.steps 8 --training.mixed_precision_param float32 "
    words += "--optimizer.lr 1e-2 --lr_scheduler.warmup_steps 2 --metrics.log_freq 1 "
    words += f"--training.global_batch_size 8 --training.local_batch_size {8 // processes} "
    return [*words.split(), "--job.dump_folder", str(folder / "run"), *more]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "run" / "metrics.jsonl")]


def test_the_guides_model_trains_alike_on_one_and_four_processes(tmp_path: Path) -> None:
    """With the commands as users type them."""
    one, four = tmp_path / "one", tmp_path / "four"
    python = ["python", "-m", "torchtitan.train"]
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", "4", "-m", "torchtitan.train"]
    shell([*python, *options(one, 1)], cwd=one)
    shell([*torchrun, *options(four, 4)], cwd=four)
    assert losses(one)[-1] < losses(one)[0] - 0.3
    assert losses(four) == pytest.approx(losses(one), rel=1e-4)


def test_the_guides_model_trains_with_whole_model_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, compiled = tmp_path / "one", tmp_path / "compiled"
    shell(["torchtitan", "train", *options(one, 1)], cwd=one)
    more = options(compiled, 2, "--compile.enable", "--compile.backend=aot_eager")
    monkeypatch.chdir(compiled)
    done = command("train", *more, ranks=2)
    assert done.exit_code == 0, done.err
    assert losses(compiled) == pytest.approx(losses(one), rel=1e-4)


def test_the_guides_training_config_loads_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "your_model_8b.toml"
    path.write_text(code_blocks()["train_configs/your_model_8b.toml"])
    config = load_config(["--job.config_file", str(path)])
    assert (config.model.name, config.model.flavor) == ("your_model", "8B")
    assert (config.optimizer.lr, config.training.seq_len) == (3e-4, 8192)


def test_the_guides_registration_in_the_tree_works(tmp_path: Path) -> None:
    """Step 7, on a copy of the package, so that the tree itself stays as it is."""
    package = tmp_path / "torchtitan"
    shutil.copytree(Path(torchtitan.__file__).parent, package)
    write_model(package / "models" / "your_model", "torchtitan.models.your_model")
    lines = re.search(
        r"```python\n(from \.your_model import.*?)```", GUIDE.read_text(), re.S
    ).group(1)
    with (package / "models" / "__init__.py").open("a") as file:
        file.write(lines)
    script = (
        "from torchtitan.models import MODEL_REGISTRY as r; print(r['your_model']('8B').model_args)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "YourModelArgs(dim=4096" in done.stdout, done.stderr
