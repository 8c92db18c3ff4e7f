import pytest

from torchtitan.errors import CheckpointError
from torchtitan.models.common.state_dict import rename

NAMES = {"layers.{}.experts.{}.w1": "model.layers.{}.mlp.experts.{}.up", "norm.weight": "n.weight"}


def test_numbers_are_carried_over_in_order():
    assert rename("layers.12.experts.3.w1", NAMES) == "model.layers.12.mlp.experts.3.up"
    assert rename("norm.weight", NAMES) == "n.weight"


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(CheckpointError, match=r"'norm.wieght'.*Did you mean 'norm.weight'"):
        rename("norm.wieght", NAMES)
