"""Folders of Hugging Face's format that say two things are refused."""

import pytest
import tiny_hf
import torch
from safetensors.torch import load_file, save_file

from torchtitan.errors import CheckpointError
from torchtitan.models.from_hf import train_spec_of_hf_folder
from torchtitan.models.which_model import model_of_hf_folder
from torchtitan.tools.convert.from_hf import convert_from_hf


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
