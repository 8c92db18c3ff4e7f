import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from torchtitan.models.llama4 import MODEL_CONFIGS, Llama4ModelArgs


def parameters_of_transformers(args: Llama4ModelArgs) -> int:
    config = Llama4TextConfig(
        num_local_experts=args.num_experts, interleave_moe_layer_step=args.moe_interval
    )
    with torch.device("meta"):
        return sum(p.numel() for p in Llama4ForCausalLM(config).parameters())


@pytest.mark.parametrize("flavor", [name for name in MODEL_CONFIGS if name != "debugmodel"])
def test_parameters_are_as_many_as_in_transformers(flavor):
    args = MODEL_CONFIGS[flavor]
    counted, _ = args.get_nparams_and_flops(seq_len=128)
    assert counted == parameters_of_transformers(args)
