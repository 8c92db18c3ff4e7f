import dataclasses

import pytest
import torch
from model_cases.deepseek_v3 import V3, hf_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

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


@torch.no_grad()
def test_experts_are_chosen_in_float32_as_transformers_does(tmp_path):
    model = DeepSeekV3Model(V3)
    hf_model(V3).save_pretrained(tmp_path)
    router = model.load_checkpoint(tmp_path).bfloat16().layers["1"].moe.router
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model.layers[1]
    router.selection_bias = router.selection_bias.float()
    theirs.mlp.gate.weight.copy_(router.gate.weight)  # which are kept in float32 there
    theirs.mlp.gate.e_score_correction_bias.copy_(router.selection_bias)
    x = torch.randn(4096, V3.dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, weights, experts = theirs.mlp.gate(x)
    own_weights, own_experts, _ = router(x)
    assert torch.equal(own_experts.sort().values, experts.sort().values)
    torch.testing.assert_close(own_weights.sort().values, weights.sort().values)


def test_scales_of_fp8_weights_are_refused(tmp_path):
    hf_model(V3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    message = r"layers\.0\.mlp\.up_proj\.weight_scale_inv.* quantized .* `torchtitan convert deq"
    with pytest.raises(CheckpointError, match=message):
        DeepSeekV3Model(V3).load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        DeepSeekV3StateDictAdapter(V3).from_hf(tensors)


def test_a_bias_that_the_flavor_has_not_is_refused(tmp_path):
    """As upstream writes it for all flavors."""
    hf_model(V3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    without = dataclasses.replace(V3, moe=dataclasses.replace(V3.moe, use_bias=False))
    with pytest.raises(CheckpointError, match=r"e_score_correction_bias.*moe\.use_bias = true"):
        DeepSeekV3StateDictAdapter(without).from_hf(tensors)
    DeepSeekV3StateDictAdapter(V3).from_hf(tensors)
