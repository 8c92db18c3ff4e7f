"""`torchtitan convert`: there and back unchanged, in little memory, and what it refuses."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fused_qkv
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from tiny_models import TINY, tiny_spec
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchtitan import cli
from torchtitan.commands.checkpoint.command import main as checkpoint
from torchtitan.commands.checkpoint.diff import Side
from torchtitan.commands.convert import parts
from torchtitan.commands.convert.from_hf import convert_from_hf
from torchtitan.commands.convert.to_hf import convert_to_hf
from torchtitan.components.checkpoint.huggingface import export_config
from torchtitan.components.checkpoint.load import is_huggingface
from torchtitan.components.checkpoint.manifest import MANIFEST, Manifest, is_hf_weights
from torchtitan.components.checkpoint.safetensors_files import (
    SafetensorsWriter,
    TensorSpec,
    plan_files,
    write_index,
)
from torchtitan.components.checkpoint.tokenizer_files import write_bytes_tokenizer
from torchtitan.distributed.init import initialize_weights
from torchtitan.errors import CheckpointError
from torchtitan.generation.load import ModelOptions, open_source
from torchtitan.models.which_model import KnownModel, model_of_checkpoint, model_of_hf_folder
from torchtitan.protocols.train_spec import MODEL_REGISTRY


def build(name: str):
    spec = tiny_spec(name)
    model = spec.model_cls(spec.model_args)
    initialize_weights(model, 0, torch.device("cpu"))
    return model


def hf_folder(folder: Path, name: str = "llama3", dtype: torch.dtype = torch.float32) -> Path:
    """As `save_pretrained` would write it, in two shards."""
    model = build(name)
    adapter = tiny_spec(name).state_dict_adapter(model.args)
    state = {k: t.to(dtype).clone() for k, t in adapter.to_hf(model.state_dict()).items()}
    specs = {k: TensorSpec(t.dtype, tuple(t.shape)) for k, t in state.items()}
    half = sum(spec.nbytes for spec in specs.values()) * 2 // 3
    folder.mkdir()
    files = plan_files(specs, half)
    assert len(files) == 2
    for file, of_file in files.items():
        save_file({key: state[key] for key in of_file}, folder / file)
    write_index(folder, files)
    (folder / "config.json").write_text(json.dumps(export_config(model.args)))
    write_bytes_tokenizer(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def convert(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("name", TINY)
def test_there_and_back_changes_nothing(name, tmp_path, capsys):
    source = hf_folder(tmp_path / "hf", name, torch.bfloat16)
    assert convert("from-hf", source, tmp_path / "ours") == 0
    # The auxiliary loss is not in config.json, nor the load that it needs in the checkpoint.
    model = tiny_spec(name).model_cls(model_of_checkpoint(tmp_path / "ours").args)
    model.load_checkpoint(tmp_path / "ours")
    for key, expected in build(name).state_dict().items():
        if not key.endswith("router.load"):
            assert torch.equal(model.state_dict()[key], expected.bfloat16().float()), key

    assert convert("to-hf", tmp_path / "ours", tmp_path / "back") == 0
    expected, back = tensors(source), tensors(tmp_path / "back")
    assert back.keys() == expected.keys()
    for key, tensor in expected.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor), key
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.pop("torch_dtype") == "bfloat16"
    assert config == json.loads((source / "config.json").read_text())
    capsys.readouterr()


def test_where_the_kernel_copies_no_files_the_result_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.delattr(parts, "copy_bytes")
    source = hf_folder(tmp_path / "hf", dtype=torch.bfloat16)
    assert convert("from-hf", source, tmp_path / "ours") == 0
    assert convert("to-hf", tmp_path / "ours", tmp_path / "back") == 0
    expected, back = tensors(source), tensors(tmp_path / "back")
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in expected.items())


def test_the_result_opens_in_transformers(tmp_path):
    source = hf_folder(tmp_path / "hf", "qwen3, experts")
    convert("from-hf", source, tmp_path / "ours")
    convert("to-hf", tmp_path / "ours", tmp_path / "back", "--dtype", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(tmp_path / "back")("to", return_tensors="pt").input_ids
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert torch.equal(model(ids).logits, expected(ids).logits)


def fused_folder(folder: Path) -> tuple[KnownModel, torch.nn.Module, dict[str, torch.Tensor]]:
    """Write the weights of a model whose adapter joins three matrices of a layer to one."""
    spec = fused_qkv.get_train_spec("")
    model = spec.model_cls(spec.model_args)
    initialize_weights(model, 0, torch.device("cpu"))
    state = spec.state_dict_adapter(spec.model_args).to_hf(model.state_dict())
    folder.mkdir()
    save_file({key: tensor.clone() for key, tensor in state.items()}, folder / "model.safetensors")
    return KnownModel("fused", "", spec), model, state


def test_an_adapter_that_joins_tensors_of_a_layer(tmp_path):
    known, model, state = fused_folder(tmp_path / "hf")
    convert_from_hf(tmp_path / "hf", tmp_path / "ours", known, None)
    ours = known.spec.model_cls(known.args).load_checkpoint(tmp_path / "ours").state_dict()
    assert all(torch.equal(ours[key], expected) for key, expected in model.state_dict().items())
    convert_to_hf(tmp_path / "ours", tmp_path / "back", known, None, tokenizer="bytes")
    back = tensors(tmp_path / "back")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


class Forgetful(fused_qkv.FusedAdapter):
    """Forgets a matrix, in both directions."""

    def to_hf(self, state_dict):
        return super().to_hf({k: t for k, t in state_dict.items() if "w2" not in k})

    def from_hf(self, state_dict):
        return super().from_hf({k: t for k, t in state_dict.items() if "down_proj" not in k})


class Transposing(fused_qkv.FusedAdapter):
    def from_hf(self, state_dict):
        converted = super().from_hf(state_dict)
        return {k: t.mT if "w2" in k else t for k, t in converted.items()}


@pytest.mark.parametrize(
    ("adapter", "given"), [(Forgetful, "nothing"), (Transposing, r"\[32, 24\]")]
)
def test_an_adapter_that_gives_other_parameters(adapter, given, tmp_path, monkeypatch):
    known, model, _ = fused_folder(tmp_path / "hf")
    spec = replace(known.spec, state_dict_adapter=adapter)
    message = rf"adapter gives {given} for layers\.[01]\.feed_forward\.w2\.weight, not \[24, 32\]"
    with pytest.raises(CheckpointError, match=message):
        convert_from_hf(tmp_path / "hf", tmp_path / "ours", replace(known, spec=spec), None)
    monkeypatch.setitem(MODEL_REGISTRY, "fused", lambda flavor: spec)
    with pytest.raises(CheckpointError, match=message):
        model.load_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize("action", ["from-hf", "to-hf"])
def test_dtype(action, tmp_path):
    source = hf_folder(tmp_path / "hf")
    options = ("--dtype", "float16") if action == "from-hf" else ()
    convert("from-hf", source, tmp_path / "ours", *options)
    options = ("--dtype", "float16") if action == "to-hf" else ()
    convert("to-hf", tmp_path / "ours", tmp_path / "back", *options)
    for key, tensor in tensors(source).items():
        assert torch.equal(tensors(tmp_path / "back")[key], tensor.half()), key


def test_the_manifest_says_which_model_it_is(tmp_path):
    convert("from-hf", hf_folder(tmp_path / "hf", "deepseek_v3"), tmp_path / "ours")
    known = model_of_checkpoint(tmp_path / "ours")
    assert (known.name, known.flavor, known.args) == ("deepseek_v3", "", TINY["deepseek_v3"])
    manifest = json.loads((tmp_path / "ours" / MANIFEST).read_text())
    assert manifest["model_only"] and manifest["step"] == 0


@pytest.mark.parametrize("longest", [None, 4096])
def test_without_the_first_folder_config_json_is_made_anew(longest, tmp_path):
    source = hf_folder(tmp_path / "hf", "qwen3")
    if longest:
        change_config(source, max_position_embeddings=longest)
    convert("from-hf", source, tmp_path / "ours")
    shutil.rmtree(source)
    convert("to-hf", tmp_path / "ours", tmp_path / "back", "--tokenizer", "bytes")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.get("max_position_embeddings") == longest
    assert config["eos_token_id"] == 257
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_inspect_lists_both_kinds(tmp_path, capsys):
    source = hf_folder(tmp_path / "hf", "qwen3, experts")
    convert("from-hf", source, tmp_path / "ours")
    capsys.readouterr()
    assert convert("inspect", source) == 0
    out = capsys.readouterr().out
    for words in (
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "[32, 64]",
        "float32",
        "model-00002-of-00002.safetensors",
        "8.19 kB",
        "Hugging Face",
        "model: qwen3 (no predefined flavor)",
    ):
        assert words in out
    count = sum(tensor.numel() for tensor in tensors(source).values())
    assert f"{count:,} elements" in out

    assert convert("inspect", tmp_path / "ours") == 0
    out = capsys.readouterr().out
    for words in ("model.layers.1.moe.experts.w1", "[4, 32, 64]", "step 0, model alone", "qwen3"):
        assert words in out
    assert "__0_0.distcp" in out

    (source / "config.json").unlink()
    convert("inspect", source)
    assert "model: unknown (no config.json)\n" in capsys.readouterr().out


# --- mistakes -------------------------------------------------------------------------------------


def refused(capsys, *arguments: object, code: int = 2) -> str:
    """The one message of a command that ends with exit code `code`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        convert(*arguments)
    assert stopped.value.code == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    return captured.err


def drop(folder: Path, key: str, file: str = "model-00002-of-00002.safetensors") -> None:
    state = load_file(folder / file)
    del state[key]
    save_file(state, folder / file)


def add(folder: Path, key: str, tensor: torch.Tensor) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(file) | {key: tensor}, file)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_index(folder: Path, name: str, file: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


INDEX = "model.safetensors.index.json"
LAST = "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"
BAD_HF = {
    "missing key": (lambda f: drop(f, NORM), [f"lacks {NORM}"]),
    "extra key": (lambda f: add(f, "model.extra", torch.ones(2)), ["model.extra", "does not use"]),
    "wrong shape": (
        lambda f: add(f, NORM, torch.ones(7)),
        [NORM, "saved [7]", LAST, "needed [64]"],
    ),
    "truncated": (lambda f: truncate(f / LAST), [LAST, "damaged"]),
    "absent shard": (lambda f: (f / LAST).unlink(), [LAST, "is missing"]),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), ["model.safetensors"]),
    "deep index": (lambda f: (f / INDEX).write_text("[" * 50_000), [INDEX, "damaged"]),
    "number in the index": (lambda f: change_index(f, NORM, 5), [INDEX, "damaged"]),
    "folder in the index": (lambda f: change_index(f, NORM, "."), ["is missing"]),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), ["config.json is damaged"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json", "--model"]),
    "other architecture": (
        lambda f: change_config(f, model_type="lama"),
        ["model_type = 'lama'", "Did you mean 'llama'"],
    ),
    "unknown field": (
        lambda f: change_config(f, attention_sparsity=0.5),
        ["config.json: unknown fields: attention_sparsity = 0.5"],
    ),
    "wrong size": (
        lambda f: change_config(f, num_hidden_layers=5),
        ["lacks model.layers.4.self_attn.q_proj.weight"],
    ),
}


@pytest.mark.parametrize("mistake", BAD_HF)
def test_a_bad_folder_is_refused_and_nothing_written(mistake, tmp_path, capsys):
    spoil, words = BAD_HF[mistake]
    source = hf_folder(tmp_path / "hf")
    spoil(source)
    message = refused(capsys, "from-hf", source, tmp_path / "out")
    for word in [*words, str(source)]:
        assert word in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_checkpoint_of_ours_is_no_hugging_face_folder(tmp_path, capsys):
    ours = tmp_path / "step-2"
    ours.mkdir()
    (ours / "manifest.json").touch()
    for model in ([], ["--model", "llama3", "--flavor", "debugmodel"]):
        message = refused(capsys, "from-hf", ours, tmp_path / "out", *model)
        assert f"{ours} is a torchtitan checkpoint" in message
        assert f"`torchtitan convert to-hf {ours} OUT`" in message


def test_a_checkpoint_of_ours_may_hold_other_files(tmp_path, capsys):
    """All commands read it by its manifest."""
    source, ours = hf_folder(tmp_path / "hf"), tmp_path / "ours"
    convert("from-hf", source, ours)
    for file in source.iterdir():
        shutil.copy(file, ours)
    assert is_hf_weights(source) and not is_hf_weights(ours)
    assert not is_huggingface(ours) and not Side(str(ours)).is_hf
    assert f"{ours} is a torchtitan checkpoint" in refused(capsys, "from-hf", ours, tmp_path / "no")
    assert checkpoint(["list", str(ours)]) == 0
    told = capsys.readouterr().out
    assert "model alone" in told and "Hugging Face" not in told
    assert open_source(ModelOptions(str(ours), tokenizer="bytes")).manifest is not None


def test_weights_in_fp8_are_refused(tmp_path, capsys):
    source = hf_folder(tmp_path / "hf", "deepseek_v3")
    add(source, "model.layers.0.self_attn.o_proj.weight_scale_inv", torch.ones(1))
    message = refused(capsys, "from-hf", source, tmp_path / "out")
    assert "o_proj.weight_scale_inv" in message and str(source) in message


def test_a_model_that_config_json_contradicts(tmp_path, capsys):
    source = hf_folder(tmp_path / "hf")
    told = ("--model", "llama3", "--flavor", "debugmodel")
    message = refused(capsys, "from-hf", source, tmp_path / "out", *told)
    assert "config.json is of another model: dim = 64 (now 256)" in message
    message = refused(capsys, "from-hf", source, tmp_path / "out", "--model", "qwen3")
    assert "--model qwen3 needs --flavor. Allowed: debugmodel" in message
    told = ("--model", "lama3", "--flavor", "debugmodel")
    assert "Did you mean 'llama3'" in refused(capsys, "from-hf", source, tmp_path / "o", *told)


@pytest.mark.parametrize("action", ["from-hf", "to-hf"])
def test_out_that_exists_is_left_alone(action, tmp_path, capsys):
    source = hf_folder(tmp_path / "hf")
    convert("from-hf", source, tmp_path / "ours")
    source = source if action == "from-hf" else tmp_path / "ours"
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "half.partial").mkdir()
    for out in ("file", "folder"):
        assert f"{tmp_path / out} exists" in refused(capsys, action, source, tmp_path / out)
    assert "half.partial exists" in refused(capsys, action, source, tmp_path / "half")
    assert (tmp_path / "file").read_text() == "precious"
    assert not any((tmp_path / "folder").iterdir())


BAD_OURS = {
    "truncated": (lambda f: truncate(f / "__0_0.distcp"), ["__0_0.distcp is damaged"]),
    "absent file": (lambda f: (f / "__0_0.distcp").unlink(), ["__0_0.distcp is missing"]),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), [MANIFEST]),
    "unknown model": (
        lambda f: change_manifest(f, name="mine"),
        ["no model 'mine'", "--custom-import"],
    ),
    "other args": (
        lambda f: change_manifest(
            f, args={"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4}
        ),
        ["different shapes for model.", "saved ["],
    ),
    "args of another version": (
        lambda f: change_manifest(f, args={"dimension": 32}),
        [MANIFEST, "dimension"],
    ),
}


def change_manifest(folder: Path, **changes: object) -> None:
    manifest = Manifest.read(folder)
    manifest.model |= changes
    manifest.write(folder)


@pytest.mark.parametrize("mistake", BAD_OURS)
def test_a_bad_checkpoint_is_refused_and_nothing_written(mistake, tmp_path, capsys):
    spoil, words = BAD_OURS[mistake]
    convert("from-hf", hf_folder(tmp_path / "hf"), tmp_path / "ours")
    spoil(tmp_path / "ours")
    message = refused(capsys, "to-hf", tmp_path / "ours", tmp_path / "out")
    for word in [*words, str(tmp_path / "ours")]:
        assert word in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, capsys):
    convert("from-hf", hf_folder(tmp_path / "hf"), tmp_path / "ours")
    large = tmp_path / "large"
    large.mkdir()
    ids = {str(number): number for number in range(300)}
    Tokenizer(WordLevel(ids, "0")).save(str(large / "tokenizer.json"))
    (large / "tokenizer_config.json").write_text('{"eos_token": "1"}')
    arguments = ("to-hf", tmp_path / "ours", tmp_path / "out", "--tokenizer", large)
    assert f"the tokenizer {large} has 300 tokens" in refused(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_no_such_folder(tmp_path, capsys):
    for action in ("from-hf", "to-hf"):
        message = refused(capsys, action, tmp_path / "nowhere", tmp_path / "out")
        assert f"{tmp_path / 'nowhere'}: no such folder" in message
    assert "nowhere: no such folder" in refused(capsys, "inspect", tmp_path / "nowhere")
    assert "is not a checkpoint" in refused(capsys, "inspect", tmp_path)
    dcp.save({"a": torch.ones(2)}, checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    message = refused(capsys, "inspect", tmp_path / "step-1")
    assert "for upstream's see docs/migrating.md" in message and "damaged" not in message
    assert "s3://b/run: URLs are not" in refused(capsys, "to-hf", "s3://b/run", tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    source = hf_folder(tmp_path / "hf")
    convert("from-hf", source, tmp_path / "ours")

    def disk_full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for action, given in (("to-hf", tmp_path / "ours"), ("from-hf", source)):
        with monkeypatch.context() as patch:
            patch.setattr("torchtitan.commands.convert.parts.copy_bytes", disk_full)
            message = refused(capsys, action, given, tmp_path / "out")
        assert "out could not be written: No space left on device. Free some space" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


# --- memory ---------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from pathlib import Path
from torchtitan.commands.convert import command
action, source, out = sys.argv[1:]
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
import torch, torchtitan.models, rich.progress
before = peak()
command.main([action, source, out])
print("peak", (peak() - before) * 1024)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux's accounting")
def test_conversion_takes_little_more_memory_than_the_largest_tensor(tmp_path):
    """A model of 340 MB, whose largest tensor has 33 MB."""
    from torchtitan.models.llama3 import Llama3ModelArgs

    args = Llama3ModelArgs(
        dim=1024, n_layers=8, n_heads=8, n_kv_heads=8, ffn_dim=4096, vocab_size=16384
    )
    names = tiny_spec("llama3").model_cls
    with torch.device("meta"):
        state = names(args).state_dict()
    adapter = tiny_spec("llama3").state_dict_adapter(args)
    specs = {
        key: TensorSpec(torch.bfloat16, tuple(tensor.shape))
        for key, tensor in adapter.to_hf(state).items()
    }
    source = tmp_path / "hf"
    source.mkdir()
    files = plan_files(specs, 10**8)
    for file, of_file in files.items():
        SafetensorsWriter(source / file, of_file).close()  # zeros
    write_index(source, files)
    (source / "config.json").write_text(json.dumps(export_config(args)))
    whole = sum(spec.nbytes for spec in specs.values())
    assert whole > 3e8

    def peak_of(action: str, given: Path, out: Path) -> int:
        command = [sys.executable, "-c", MEASURE, action, str(given), str(out)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        return int(done.stdout.split()[-1])

    assert peak_of("from-hf", source, tmp_path / "ours") < 0.2 * whole
    shutil.rmtree(source)
    assert peak_of("to-hf", tmp_path / "ours", tmp_path / "back") < 0.2 * whole


def test_the_library_functions_refuse_what_exists(tmp_path):
    source = hf_folder(tmp_path / "hf")
    known = model_of_hf_folder(source)
    convert_from_hf(source, tmp_path / "ours", known, None)
    with pytest.raises(CheckpointError, match="ours exists"):
        convert_from_hf(source, tmp_path / "ours", known, None)
    with pytest.raises(CheckpointError, match="hf exists"):
        convert_to_hf(tmp_path / "ours", source, known, None)
