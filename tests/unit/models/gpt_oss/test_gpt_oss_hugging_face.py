import dataclasses

import pytest
import torch
from model_cases.gpt_oss import VARIANTS, hf_model
from safetensors.torch import save_file

from torchtitan.errors import CheckpointError
from torchtitan.models.gpt_oss import GptOssModel, GptOssStateDictAdapter


def test_tensors_of_mxfp4_are_refused(tmp_path):
    args = VARIANTS["grouped"]
    state = GptOssStateDictAdapter(args).to_hf(GptOssModel(args).state_dict())
    name = "model.layers.1.mlp.experts.gate_up_proj"
    state[f"{name}_blocks"] = state.pop(name).to(torch.uint8)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"'{name}_blocks' belongs to a quantized weight"):
        GptOssModel(args).load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=rf"'{name}_scales' belongs to a quantized weight"):
        GptOssStateDictAdapter(args).from_hf({f"{name}_scales": torch.ones(1)})


def test_a_checkpoint_with_more_experts_is_refused(tmp_path):
    args = VARIANTS["grouped"]
    hf_model(args).save_pretrained(tmp_path)
    fewer = dataclasses.replace(args, moe=dataclasses.replace(args.moe, num_experts=4))
    with pytest.raises(CheckpointError, match="experts"):
        GptOssModel(fewer).load_checkpoint(tmp_path)
