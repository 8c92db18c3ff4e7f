"""Every command, TOML file and Python example of the docs works, or says why it is not run.

A page's commands run in their order, in a folder of their own, on settings that are small enough.
What is in `NOT_RUN` is parsed by the program itself, so that no option in the pages can rot.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import doc_pages
import pytest
import tiny_hf
import tiny_llama
import torch
from doc_pages import PAGES, ROOT, Block, Shell, blocks, statements
from harness import read_lines, train
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from torchtitan.errors import TitanError
from torchtitan.protocols.train_spec import train_spec_of

NETWORK = "needs a network"
CLUSTER = "needs a cluster"
SETUP = "changes the environment; .ci/run sets up"
ELSEWHERE = "test_guide.py and test_example.py run the page's blocks, put together"
CONVERGE = "test_converge.py runs such comparisons"
SLOW = "takes too long here; its own tests run it"
WEIGHTS = "needs published weights"

NOT_RUN: list[tuple[str, str, str]] = [
    # page, beginning of a statement or of a block of Python (empty: all of the page), reason
    ("README.md", "pip install", SETUP),
    ("README.md", "torchtitan download", NETWORK),
    ("README.md", "torchtitan train --job.config_file torchtitan/models/qwen3", NETWORK),
    ("README.md", "torchrun --nproc-per-node 8", NETWORK),
    ("README.md", "torchtitan verify", SLOW),
    ("CONTRIBUTING.md", "", SETUP),
    ("benchmarks/README.md", "", SLOW),
    ("docs/adding_models.md", "", ELSEWHERE),
    ("docs/model_code.md", "", ELSEWHERE),
    ("docs/own_data.md", "", ELSEWHERE),
    ("docs/own_modules.md", "", ELSEWHERE),
    ("docs/own_parts.md", "", ELSEWHERE),
    ("docs/verifying.md", "", ELSEWHERE),
    ("docs/checkpoints.md", "pip install", SETUP),
    ("docs/checkpoints.md", "torchtitan download", NETWORK),
    ("docs/checkpoints.md", "torchtitan train", NETWORK),
    ("docs/configuration.md", "torchtitan train", "the file is the reader's"),
    ("docs/converging.md", "torchtitan converge", CONVERGE),
    ("docs/generating.md", "torchtitan eval --checkpoint Qwen3-0.6B --tasks", NETWORK),
    ("docs/debugging.md", "pip install", NETWORK),
    ("docs/debugging.md", "py-spy", "needs a process that hangs"),
    ("docs/fault_tolerance.md", "torchtitan data batch", "test_guard.py runs it on a bad batch"),
    ("docs/replica_groups.md", "pip install", NETWORK),
    ("docs/replica_groups.md", "torchft_lighthouse", "needs torchft; test_replica_groups.py"),
    ("docs/replica_groups.md", "export", "needs torchft; test_replica_groups.py"),
    ("docs/fault_tolerance.md", "python -m", "needs hosts; tests/faults/test_elastic.py"),
    ("docs/replica_groups.md", "torchrun", "needs torchft; test_replica_groups.py"),
    ("docs/migrating.md", "from transformers", "is what to migrate from"),
    ("docs/migrating.md", "# export.py, for upstream", "needs upstream's package"),
    ("docs/migrating.md", "torchtitan download", NETWORK),
    ("docs/migrating.md", "torchrun", NETWORK),
    ("docs/launching.md", "kubectl create", CLUSTER),
    ("docs/planning.md", "torchtitan plan model.toml --gpus", SLOW),
    ("torchtitan/models/gpt_oss/README.md", "torchtitan convert dequantize", WEIGHTS),
    ("torchtitan/models/flux/README.md", "pip install", SETUP),
    ("torchtitan/models/flux/README.md", "hf download", NETWORK),
    ("torchtitan/models/flux/README.md", "python -m", "test_flux_commands.py runs the commands"),
    ("torchtitan/models/flux/README.md", "torchrun", WEIGHTS),
    ("torchtitan/models/transformers/README.md", "# olmo2.py", "test_transformers_model.py"),
    ("torchtitan/models/transformers/README.md", "torchtitan verify", SLOW),
    *(
        (page, "from torchtitan", WEIGHTS)
        for page, file in PAGES.items()
        if page.startswith("torchtitan/") and "```python\nfrom torchtitan" in file.read_text()
    ),
]

NO_CONFIG = {"[project.entry-points": "is a part of a pyproject.toml"}
"""Beginning of a block of TOML -> why it is no config of a run."""


@dataclass
class Setting:
    """What a page takes for granted."""

    prepare: Callable[[Path], None] = lambda folder: None
    """Makes the files that the page's commands read."""
    train: list[str] = field(default_factory=list)
    """Options that make each `torchtitan train` small."""
    instead: dict[str, str] = field(default_factory=dict)
    """Replacements in commands."""
    afterwards: Callable[[Path, str], None] = lambda folder, out: None
    """Looks at what the commands left: files in the folder, and all that they wrote to stdout."""


SMALL = [
    *("--training.steps=2", "--training.seq_len=64", "--training.global_batch_size=4"),
    *("--training.local_batch_size=1", "--lr_scheduler.warmup_steps=1"),
]


def _notes(folder: Path) -> None:
    (folder / "notes.txt").write_text("some notes of mine\n" * 40)


def _hugging_face(folder: Path) -> None:
    """`Qwen3-0.6B`, a tiny model with a tokenizer, and texts."""
    model = folder / "Qwen3-0.6B"
    tiny_hf.hf_model("qwen3", vocab_size=300).save_pretrained(model)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=280, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["once upon a time there was a test"] * 9, trainer)
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    _notes(folder)
    (folder / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')


def _run_and_hugging_face(folder: Path) -> None:
    """Also `outputs`, a run with a checkpoint."""
    train(folder / "outputs", *tiny_llama.OPTIONS, "--checkpoint.enable")
    _hugging_face(folder)


def _in_fp8(source: Path, folder: Path) -> None:
    """A copy with a matrix in FP8."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    scales = [-(-size // 128) for size in tensors[name].shape]
    tensors |= {
        name: tensors[name].to(torch.float8_e4m3fn),
        f"{name}_scale_inv": torch.ones(scales),
    }
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))


def _for_checkpoints(folder: Path) -> None:
    tiny_hf.hf_model("qwen3").save_pretrained(folder / "assets" / "Qwen3-0.6B")
    _in_fp8(folder / "assets" / "Qwen3-0.6B", folder / "assets" / "DeepSeek-V3")
    options = ["--model.name=llama3", "--model.flavor=debugmodel", "--checkpoint.last_save_in_hf"]
    train(
        folder / "outputs", *SMALL, *options, "--checkpoint.enable", "--model.tokenizer_path=bytes"
    )


_TINY_FLAVOR = """import json
from pathlib import Path
from torchtitan.models.qwen3 import MODEL_CONFIGS, Qwen3ModelArgs
config = json.loads(Path(__file__).with_name("Qwen3-0.6B").joinpath("config.json").read_text())
MODEL_CONFIGS["tiny"] = Qwen3ModelArgs.from_hf_config(config)
"""


def _for_long_contexts(folder: Path) -> None:
    _hugging_face(folder)
    text = "a long text, and more of it. " * 500
    (folder / "books.jsonl").write_text(json.dumps({"text": text}))
    (folder / "heldout.txt").write_text(text)
    (folder / "tiny.py").write_text(_TINY_FLAVOR)


def _extended(folder: Path, out: str) -> None:
    config = json.loads((folder / "outputs/checkpoint/step-2-hf/config.json").read_text())
    assert config["max_position_embeddings"] == 4 * 512
    assert config["rope_scaling"]["rope_type"] == "yarn" and "perplexity" in out


def _job(name: str) -> Callable[[Path], None]:
    debug = ROOT / "torchtitan" / "models" / "llama3" / "train_configs" / "debug_model.toml"
    return lambda folder: shutil.copy(debug, folder / name)


def _job_of_32_ranks(folder: Path) -> None:
    _job("job.toml")(folder)
    text = (folder / "job.toml").read_text()
    (folder / "job.toml").write_text(
        text.replace("global_batch_size = 8", "global_batch_size = 32")
    )


def _generated(folder: Path, out: str) -> None:
    assert len(re.findall(r"^perplexity +\d", out, re.M)) >= 3
    assert len(read_lines(folder / "answers.jsonl")) == 2


def _data(folder: Path, out: str) -> None:
    assert "tokens: 200 documents" in out and "documents      200" in out
    assert "assistant\n]]Hello<|im_end|>" in out
    lines = read_lines(folder / "outputs" / "metrics.jsonl")
    assert lines[-1]["step"] == 3 and "data_padding_share" in lines[-1]


def _traced(folder: Path, out: str) -> None:
    assert (folder / "outputs" / "profile" / "step-10" / "rank-0.json.gz").is_file()
    assert "tensor_parallel_degree = 2" in out


def _two_runs(folder: Path) -> None:
    for name in ("a", "b"):
        train(folder / "outputs" / name, *tiny_llama.OPTIONS)


def _planned(folder: Path, out: str) -> None:
    """The page's example is what the command writes; other versions of PyTorch differ a little."""
    (example,) = (block for block in blocks("text") if block.page == "docs/planning.md")
    shown = example.text.split()
    written = out[out.index(example.text.splitlines()[0]) :].split()[: len(shown)]
    number = r"[\d,]*\d(?:\.\d+)?(?:e-?\d+)?"
    assert [re.sub(number, "N", w) for w in written] == [re.sub(number, "N", w) for w in shown]
    numbers = [
        [float(n.replace(",", "")) for n in re.findall(number, " ".join(words))]
        for words in (written, shown)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02)


SETTINGS: dict[str, Setting] = {
    "README.md": Setting(
        train=[*SMALL, "--checkpoint.enable", "--checkpoint.load_step=-1"],
        instead={
            "step-1000": "step-2",
            "outputs/qwen3_0_6b/": "outputs/",  # where the training that is not run would save
            "max-tokens 100000": "max-tokens 1000",
        },
    ),
    "docs/checkpoints.md": Setting(
        _for_checkpoints, instead={"step-1000": "step-2", "step-4": "step-2", "step-6": "step-2"}
    ),
    "docs/converging.md": Setting(_job("one.toml")),
    "docs/data.md": Setting(afterwards=_data),
    "docs/debugging.md": Setting(
        _notes,
        ["--training.seq_len=64"],
        afterwards=_traced,
    ),
    "docs/generating.md": Setting(_run_and_hugging_face, afterwards=_generated),
    "docs/launching.md": Setting(_job_of_32_ranks),
    "docs/long_context.md": Setting(
        _for_long_contexts,
        ["--training.steps=2", "--training.seq_len=256", "--training.global_batch_size=2"],
        instead={
            "_degree = 8": "_degree = 2",
            "node 8": "node 2",
            '[model]\nname = "qwen3"\nflavor = "0.6B"': '[job]\ncustom_import = "tiny"\n'
            '[model]\nname = "qwen3"\nflavor = "tiny"',
            "original_max_seq_len = 32768": "original_max_seq_len = 512",
            "step-1000": "step-2",
            "--seq-len 131072": "--seq-len 2048",
        },
        afterwards=_extended,
    ),
    "docs/metrics.md": Setting(_two_runs, [*SMALL, "--validation.steps=1"]),
    "docs/planning.md": Setting(
        _job("model.toml"),
        instead={"--world-size 512": "--world-size 8"},
        afterwards=_planned,
    ),
}
"""Page -> its setting; others have none, but trainings are small everywhere."""


class Places:
    """The folder of each page, made when it is first needed."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._shells: dict[str, Shell] = {}

    def shell(self, page: str) -> Shell:
        if page not in self._shells:
            folder = self._factory.mktemp("page")
            setting = SETTINGS.get(page, Setting(train=SMALL))
            setting.prepare(folder)
            self._shells[page] = Shell(folder, setting.train)
        return self._shells[page]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory)


def reason(page: str, text: str) -> str | None:
    """Why a statement or a block of Python is not run."""
    found = [why for where, start, why in NOT_RUN if where == page and text.startswith(start)]
    return found[0] if found else None


PAGES_WITH_COMMANDS = sorted({block.page for block in blocks("bash", "sh")})


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_the_commands_of_a_page(page: str, places: Places) -> None:
    own = [block for block in blocks("bash", "sh") if block.page == page]
    found = [statement for block in own for statement in statements(block.text)]
    for statement in found:
        doc_pages.check_options(statement)
    to_run = [statement for statement in found if not reason(page, statement)]
    if not to_run:
        return
    setting, shell = SETTINGS.get(page, Setting()), places.shell(page)
    folder = shell.folder
    for statement in to_run:
        for old, new in setting.instead.items():
            statement = statement.replace(old, new)
        shell.run(statement)
    setting.afterwards(folder, shell.out)


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_a_toml_file(block: Block, tmp_path: Path) -> None:
    if any(block.text.startswith(beginning) for beginning in NO_CONFIG):
        return
    path = tmp_path / "run.toml"
    path.write_text(block.text)
    config = doc_pages.load_config(["--job.config_file", str(path)])
    if config.model.args:
        train_spec_of(config)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_python_example(
    block: Block, places: Places, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    doc_pages.check_imports(block.text)
    if reason(block.page, block.text):
        return
    monkeypatch.chdir(places.shell(block.page).folder)
    text = block.text
    for old, new in SETTINGS.get(block.page, Setting()).instead.items():
        text = text.replace(old, new)
    exec(compile(text, str(block), "exec"), {"__name__": "example"})


def test_each_reason_is_of_something() -> None:
    """A command that was taken out of a page, or runs now, leaves no reason behind."""
    texts = [(b.page, s) for b in blocks("bash", "sh") for s in statements(b.text)]
    texts += [(b.page, b.text) for b in blocks("python")]
    for page, start, _ in NOT_RUN:
        assert any(where == page and text.startswith(start) for where, text in texts), (page, start)


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("torchtitan train --training.stepz 3", "training.stepz"),
        ("torchtitan report --pngg x", "pngg"),
        ("torchtitan data inspect x --sampels 3", "sampels"),
        ("python -m benchmarks.run --suite cpu --onlie x", "onlie"),
        ("torchtitan plan a.toml -- --trainin.steps 3", "trainin"),
    ],
)
def test_a_wrong_option_would_be_found(statement: str, error: str, capsys) -> None:
    with pytest.raises((SystemExit, TitanError)) as found:
        doc_pages.check_options(statement)
    assert error in str(found.value) + capsys.readouterr().err


def test_statements_are_whole() -> None:
    text = "cd x\n# a comment\na \\\n  b\ncat > f <<'END'\nx \\\ny\nEND\nlast\n"
    found = statements(text)
    assert found == ["cd x", "a \\\n  b", "cat > f <<'END'\nx \\\ny\nEND", "last"]
