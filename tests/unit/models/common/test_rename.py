import pytest

from torchtitan.errors import CheckpointError
from torchtitan.models.common.state_dict import RenamingAdapter, rename
from torchtitan.protocols import BaseModelArgs

NAMES = {"layers.{}.experts.{}.w1": "model.layers.{}.mlp.experts.{}.up", "norm.weight": "n.weight"}


def test_numbers_are_carried_over_in_order():
    assert rename("layers.12.experts.3.w1", NAMES) == "model.layers.12.mlp.experts.3.up"
    assert rename("norm.weight", NAMES) == "n.weight"


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(CheckpointError, match=r"'norm.wieght'.*Did you mean 'norm.weight'"):
        rename("norm.wieght", NAMES)


def test_args_may_leave_out_whether_weights_are_tied():
    class Adapter(RenamingAdapter):
        names = {"output.weight": "lm_head.weight"}  # noqa: RUF012

    adapter = Adapter(BaseModelArgs())
    assert adapter.to_hf({"output.weight": 1}) == {"lm_head.weight": 1}
    assert adapter.from_hf({"lm_head.weight": 1}) == {"output.weight": 1}
