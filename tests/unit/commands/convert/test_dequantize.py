"""`torchtitan convert dequantize`: the same numbers as by transformers, and what it refuses."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from failing_disk import FailingDisk
from safetensors.torch import load_file, save_file
from tiny_models import TINY, tiny_spec
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from torchtitan import cli
from torchtitan.components.checkpoint import retry, safetensors_files
from torchtitan.components.checkpoint.huggingface import export_config
from torchtitan.distributed.init import initialize_weights
from torchtitan.models.which_model import model_of_hf_folder

BLOCK = [16, 24]  # divides neither the rows nor the columns of all matrices
Tensors = dict[str, torch.Tensor]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": BLOCK}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def hf_tensors(name: str) -> Tensors:
    spec = tiny_spec(name)
    model = spec.model_cls(spec.model_args)
    initialize_weights(model, 0, torch.device("cpu"))
    state = spec.state_dict_adapter(spec.model_args).to_hf(model.state_dict())
    return {key: tensor.bfloat16().contiguous() for key, tensor in state.items()}


def write(folder: Path, name: str, tensors: Tensors, quantization: dict | None) -> Path:
    """In two files, so that a weight and its scales may be in different ones."""
    folder.mkdir()
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    files = {f"model-0000{number}-of-00002.safetensors": half for number, half in enumerate(halves)}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = export_config(tiny_spec(name).model_args) | {"torch_dtype": "bfloat16"}
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def fp8(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Return the tensors with matrices in FP8, and what transformers makes of these."""
    quantized, expected = dict(tensors), dict(tensors)
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        rows, columns = tensors[key].shape
        shape = math.ceil(rows / BLOCK[0]), math.ceil(columns / BLOCK[1])
        scale = torch.rand(shape, generator=torch.Generator().manual_seed(rows)) / 100
        weight = (100 * tensors[key].float()).to(torch.float8_e4m3fn)
        quantized |= {key: weight, f"{key}_scale_inv": scale}
        whole = _dequantize_fp8_weight(weight, scale, BLOCK, torch.float32)
        expected[key] = whole.bfloat16()
    return quantized, expected


def mxfp4(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Return the tensors with experts in MXFP4, and what transformers makes of these."""
    quantized, expected = dict(tensors), dict(tensors)
    random = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors[key].shape
        shape = experts, rows, columns // 32
        blocks = torch.randint(256, (*shape, 16), generator=random).to(torch.uint8)
        scales = torch.randint(110, 140, shape, generator=random).to(torch.uint8)
        del quantized[key]
        quantized |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        expected[key] = convert_moe_packed_tensors(blocks, scales)
        assert expected[key].shape == tensors[key].shape
    return quantized, expected


@pytest.fixture
def gpt_oss(monkeypatch) -> str:
    """Sizes that are multiples of the 32 numbers of a group."""
    args = TINY["gpt_oss"]
    sized = replace(args, moe=replace(args.moe, hidden_dim=96))
    monkeypatch.setitem(TINY, "gpt_oss", sized)
    return "gpt_oss"


def dequantize(*arguments: object) -> int:
    return cli.main(["convert", "dequantize", *map(str, arguments)])


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3", "gpt_oss"])
def test_weights_are_those_of_transformers(name, tmp_path, gpt_oss, capsys):
    quantize, config = (mxfp4, MXFP4) if name == "gpt_oss" else (fp8, FP8)
    quantized, expected = quantize(hf_tensors(name))
    source = write(tmp_path / "hf", name, quantized, config)
    assert dequantize(source, tmp_path / "out") == 0
    assert f"{tmp_path / 'out'}: bfloat16, " in capsys.readouterr().out
    found: Tensors = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == torch.bfloat16
        assert torch.equal(found[key], tensor), key
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == export_config(tiny_spec(name).model_args) | {"torch_dtype": "bfloat16"}

    known = model_of_hf_folder(tmp_path / "out")
    model = known.spec.model_cls(known.args).load_checkpoint(tmp_path / "out")
    weights = known.adapter(tmp_path).to_hf(model.state_dict())
    assert all(torch.equal(weights[key].bfloat16(), tensor) for key, tensor in expected.items())


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", *map(str, arguments)])
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (None, "config.json: it has no quantization_config: the weights are not quantized"),
        ({"quant_method": "gptq"}, "quant_method = 'gptq' is not supported: fp8 and mxfp4 are"),
        ({"quant_method": "fp8"}, "weight_block_size = None is not supported: FP8"),
        (FP8 | {"weight_block_size": [16, 16]}, "weight_scale_inv is torch.float32 ["),
        (MXFP4, "is torch.float8_e4m3fn, but belongs to no"),
    ],
)
def test_another_quantization_is_refused(quantization, message, tmp_path, capsys):
    quantized, _ = fp8(hf_tensors("qwen3"))
    source = write(tmp_path / "hf", "qwen3", quantized, quantization)
    error = refused(capsys, "dequantize", source, tmp_path / "out")
    assert message in error and str(source) in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("q_proj.weight", "layers.0.self_attn.q_proj.weight is missing"),
        ("q_proj.weight_scale_inv", "q_proj.weight is torch.float8_e4m3fn without model.layers.0"),
    ],
)
def test_half_of_a_weight_is_refused(end, message, tmp_path, capsys):
    quantized, _ = fp8(hf_tensors("qwen3"))
    del quantized[f"model.layers.0.self_attn.{end}"]
    source = write(tmp_path / "hf", "qwen3", quantized, FP8)
    assert message in refused(capsys, "dequantize", source, tmp_path / "out")


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_quantized_folders_are_refused_with_the_command(name, tmp_path, gpt_oss, capsys):
    quantized, _ = (mxfp4 if name == "gpt_oss" else fp8)(hf_tensors(name))
    source = write(tmp_path / "hf", name, quantized, FP8)
    told = "First run `torchtitan convert dequantize FOLDER OUT`"
    assert told in refused(capsys, "from-hf", source, tmp_path / "out")
    (source / "config.json").unlink()
    model = ["--model", name, "--flavor", "debugmodel"]
    assert told in refused(capsys, "from-hf", source, tmp_path / "out", *model)


@pytest.mark.parametrize("name", ["model-00000-of-00002.safetensors", "tokenizer_config.json"])
def test_an_error_of_reading_is_not_told_as_one_of_writing(name, tmp_path, monkeypatch, capsys):
    quantized, _ = fp8(hf_tensors("qwen3"))
    source = write(tmp_path / "hf", "qwen3", quantized, FP8)

    def fail(file, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(retry, "RETRY_AFTER", ())
    if name.endswith(".safetensors"):
        monkeypatch.setattr(safetensors_files, "read_all", fail)
    else:
        FailingDisk(source, monkeypatch).failing = "file", str(source / name)
    with pytest.raises(SystemExit, match="1"):
        dequantize(source, tmp_path / "out")
    error = capsys.readouterr().err
    assert f"{source / name} cannot be read: " in error and "written" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
