import dataclasses

import pytest
import torch
from model_cases.deepseek_v3 import V3, hf_model
from safetensors.torch import load_file, save_file

from torchtitan.errors import CheckpointError
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, DeepSeekV3StateDictAdapter


@pytest.fixture
def published(tmp_path):
    """A folder of V3's names, with the layer that predicts more tokens."""
    hf_model(V3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.ones(2, 2)
    tensors["model.layers.3.mlp.experts.0.up_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_layer_that_predicts_more_tokens_is_left_out(published):
    DeepSeekV3Model(dataclasses.replace(V3, mtp_layers=1)).load_checkpoint(published)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight"):
        DeepSeekV3Model(V3).load_checkpoint(published)


def test_scales_of_fp8_weights_are_refused(tmp_path):
    hf_model(V3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    message = r"layers\.0\.mlp\.up_proj\.weight_scale_inv.* FP8 .*to bfloat16"
    with pytest.raises(CheckpointError, match=message):
        DeepSeekV3Model(V3).load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        DeepSeekV3StateDictAdapter(V3).from_hf(tensors)
