"""Folders of Hugging Face's format that say two things are refused."""

import errno
import io
import json
import re
from dataclasses import replace

import pytest
import tiny_hf
import torch
from safetensors.torch import load_file, save_file

from torchtitan.commands.convert.from_hf import convert_from_hf
from torchtitan.components.checkpoint import retry, safetensors_files
from torchtitan.components.checkpoint.load import load_weights_of_parts
from torchtitan.components.checkpoint.safetensors_files import SafetensorsFile
from torchtitan.errors import CheckpointError, OutageError
from torchtitan.models import gemma3
from torchtitan.models.from_hf import train_spec_of_hf_folder
from torchtitan.models.gemma3 import Gemma3ModelArgs
from torchtitan.models.which_model import model_of_hf_folder
from torchtitan.protocols.train_spec import MODEL_REGISTRY, TrainSpec


def load(folder):
    _, spec = train_spec_of_hf_folder(folder)
    return spec.model_cls(spec.model_args).load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_head_of_a_tied_model_must_be_the_embedding(dtype, tmp_path):
    tiny_hf.saved("llama3", tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    embedding = state["model.embed_tokens.weight"]
    save_file(state | {"lm_head.weight": embedding.to(dtype, copy=True)}, file)
    assert torch.equal(load(tmp_path).output.weight, embedding)

    head = embedding.to(dtype, copy=True)
    head[-1, -1] += 1
    save_file(state | {"lm_head.weight": head}, file)
    message = r"lm_head\.weight differs from model\.embed_tokens\.weight.*set tie_word_embeddings"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        convert_from_hf(tmp_path, tmp_path / "out", model_of_hf_folder(tmp_path), None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
@pytest.mark.parametrize("pattern", ["experts", r"experts\.w1"])
def test_experts_can_be_left_out(name, pattern, tmp_path):
    """Which a file has one by one."""
    tiny_hf.saved(name, tmp_path)
    whole = load(tmp_path)
    _, spec = train_spec_of_hf_folder(tmp_path)
    model = spec.model_cls(spec.model_args)
    for param in model.parameters():
        torch.nn.init.zeros_(param)
    load_weights_of_parts([model], tmp_path, None, exclude=pattern)
    left_out = [n for n, _ in whole.named_parameters() if re.search(pattern, n)]
    assert left_out
    for n, param in whole.named_parameters():
        assert torch.equal(model.get_parameter(n), param * (n not in left_out)), n


@pytest.mark.parametrize("sizes", [("10GB", "100KB"), ("100KB", "10GB")])
def test_a_folder_that_was_saved_to_twice_holds_two_models(sizes, tmp_path):
    model = tiny_hf.hf_model("llama3")
    for size in sizes:
        with torch.no_grad():
            model.model.embed_tokens.weight += 1
        model.save_pretrained(tmp_path, max_shard_size=size)
    single, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    with pytest.raises(CheckpointError, match=r"two models: model\.safetensors.*index\.json"):
        load(tmp_path)
    (index if sizes[0] == "100KB" else single).unlink()  # what the first save has left
    weight = load(tmp_path).tok_embeddings.weight
    assert torch.equal(weight, model.model.embed_tokens.weight)


def test_what_layers_share_must_be_the_same_in_each_layer_of_a_file(tmp_path):
    """A model of Llama's kind whose layers share a matrix, as it is exported and as it is not."""
    tiny_hf.saved("llama3", tmp_path)
    _, spec = train_spec_of_hf_folder(tmp_path)
    model = spec.model_cls(spec.model_args)
    for layer in model.layers.values():
        layer.feed_forward = model.layers["0"].feed_forward
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\S+ differs from model\.layers\.0\."):
        model.load_checkpoint(tmp_path)

    file = tmp_path / "model.safetensors"
    state = load_file(file)
    first = {name: re.sub(r"\d+", "0", name) for name in state if ".mlp." in name}
    save_file(state | {name: state[own].clone() for name, own in first.items()}, file)
    model.load_checkpoint(tmp_path)
    weight = model.layers["1"].feed_forward.w1.weight
    assert torch.equal(weight, state["model.layers.0.mlp.gate_proj.weight"])


class CappedArgs(Gemma3ModelArgs):
    @classmethod
    def from_hf_config(cls, config):
        return super().from_hf_config(config | {"final_logit_softcapping": None})


MODEL_CONFIGS = {"debugmodel": CappedArgs()}


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(gemma3.get_train_spec(flavor), model_args=MODEL_CONFIGS[flavor])


def test_a_users_model_supports_what_ours_of_the_architecture_does_not(tmp_path, monkeypatch):
    tiny_hf.saved("gemma3", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"final_logit_softcapping": 5.0}))
    with pytest.raises(CheckpointError, match="final_logit_softcapping = 5"):
        train_spec_of_hf_folder(tmp_path)

    monkeypatch.setitem(MODEL_REGISTRY, "capped", get_train_spec)
    assert train_spec_of_hf_folder(tmp_path)[0] == "capped"


def test_an_outage_while_the_header_is_read_is_no_damage(tmp_path, monkeypatch):
    """The first attempts fail, then the file can be read."""
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    failures = [3]

    class Flaky(io.FileIO):
        def read(self, size):
            if failures[0]:
                failures[0] -= 1
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(
        safetensors_files, "open", lambda path, *_, **__: Flaky(path), raising=False
    )
    monkeypatch.setattr(retry, "RETRY_AFTER", (0, 0, 0))
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert file.read("a").tolist() == [1.0, 1.0, 1.0]
    failures[0] = 4
    with pytest.raises(OutageError, match=r"x\.safetensors cannot be read"):
        SafetensorsFile(tmp_path / "x.safetensors")
