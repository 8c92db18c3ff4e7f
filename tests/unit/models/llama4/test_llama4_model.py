import pytest
import torch
from tiny_models import tiny_model, tiny_tokens

from torchtitan.models.llama4.model.model import Temperature


@torch.no_grad()
@pytest.mark.parametrize(("n_layers", "sees_all"), [(3, False), (4, True)])
def test_only_every_fourth_layer_sees_beyond_a_chunk(n_layers, sees_all):
    model, text = tiny_model("llama4", n_layers=n_layers, chunk=8), tiny_tokens(1, 24)
    changed = text.clone()
    changed[0, 5] = (changed[0, 5] + 1) % model.args.vocab_size
    differs = (model(text) - model(changed)).abs().amax(-1)[0] > 1e-4
    assert not differs[:5].any()
    assert differs[5:8].all()
    assert differs[8:].all() == sees_all
    assert differs[8:].any() == sees_all


def test_queries_grow_by_the_logarithm_of_their_place():
    temper = Temperature(torch.tensor([[0, 6, 7, 15, 23]]), floor=8, scale=0.5)
    expected = 1 + 0.5 * torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0]).log()
    q = torch.ones(1, 5, 2, 4, dtype=torch.bfloat16)
    assert temper(q).dtype == torch.bfloat16
    torch.testing.assert_close(temper(q.float())[0, :, 0, 0], expected)
