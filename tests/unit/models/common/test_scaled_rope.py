import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from torchtitan.errors import CheckpointError
from torchtitan.models.common.scaled_rope import scaled_rotation, scaling_from_hf, scaling_to_hf
from torchtitan.models.llama3 import Llama3ModelArgs
from torchtitan.models.which_model import dataclass_of
from torchtitan.protocols.changed_args import plain_args

THETA, HEAD_DIM = 500000.0, 128
KINDS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 20.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_million_tokens_from_the_beginning_it_is_that_of_transformers(kind):
    hf = {"rope_theta": THETA, "rope_type": "default"} | (KINDS[kind] or {})
    config = LlamaConfig(head_dim=HEAD_DIM, max_position_embeddings=1 << 20, rope_parameters=hf)
    positions = torch.tensor([[0, 1, 5000, 200_000, 1_000_000]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(()), positions)

    ours = scaled_rotation(positions, HEAD_DIM, THETA, scaling_from_hf(KINDS[kind]))
    # Frequencies that are rounded in another order differ by 5e-5.
    torch.testing.assert_close(ours.cos[:, :, 0], cos, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.sin[:, :, 0, HEAD_DIM // 2 :], sin[..., HEAD_DIM // 2 :])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_written_as_it_was_read(kind):
    written = scaling_to_hf(scaling_from_hf(KINDS[kind]))
    assert written is None if KINDS[kind] is None else KINDS[kind].items() <= written.items()
    assert scaling_from_hf(written) == scaling_from_hf(KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_keeps_its_kind(kind):
    args = Llama3ModelArgs(rope_scaling=scaling_from_hf(KINDS[kind]))
    assert dataclass_of(Llama3ModelArgs, plain_args(args)) == args


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        {"rope_type": "linear"},
        {"rope_type": ["linear"], "factor": 4.0},
        KINDS["linear"] | {"attention_factor": 1.2},
    ],
)
def test_other_kinds_are_refused(scaling):
    with pytest.raises(CheckpointError, match=r"rope_scaling = .* is not supported"):
        scaling_from_hf(scaling)
