import pytest
from model_cases.qwen3 import VARIANTS, hf_model

from torchtitan.errors import CheckpointError
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3Model, Qwen3ModelArgs, Qwen3StateDictAdapter


def test_a_missing_expert_is_named():
    args = VARIANTS["experts"]
    adapter = Qwen3StateDictAdapter(args)
    state = adapter.to_hf(Qwen3Model(args).state_dict())
    del state["model.layers.1.mlp.experts.5.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.5\.up_proj.* is missing"):
        adapter.from_hf(state)


def test_a_checkpoint_with_more_experts_is_refused(tmp_path):
    args = VARIANTS["experts"]
    hf_model(args).save_pretrained(tmp_path)
    fewer = Qwen3ModelArgs(**vars(args) | {"moe": MoEArgs(num_experts=4, top_k=3, hidden_dim=40)})
    with pytest.raises(CheckpointError):
        Qwen3Model(fewer).load_checkpoint(tmp_path)
    hf_state = Qwen3StateDictAdapter(args).to_hf(Qwen3Model(args).state_dict())
    hf_state = {k: v for k, v in hf_state.items() if "experts" in k}
    with pytest.raises(CheckpointError, match=r"expert 7 of .* has only 4 experts"):
        Qwen3StateDictAdapter(fewer).from_hf(hf_state)
