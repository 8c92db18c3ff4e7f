"""Rotary fields of a `config.json`, which has several places for them."""

import pytest

from torchtitan.errors import CheckpointError
from torchtitan.models.common.hf_config import HuggingFaceConfig

YARN = {"rope_type": "yarn", "factor": 4.0}
OLD_YARN = {"type": "yarn", "factor": 4.0}
DEFAULT = {"rope_type": "default"}


def take_rope(**fields):
    return HuggingFaceConfig({"model_type": "some"} | fields, "some").take_rope()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 5}, (5.0, None)),
        ({"rope_theta": 5.0, "rope_scaling": None}, (5.0, None)),
        ({"rope_theta": 5.0, "rope_scaling": OLD_YARN}, (5.0, YARN)),
        ({"rope_theta": 5.0, "rope_scaling": YARN | OLD_YARN}, (5.0, YARN)),
        ({"rope_parameters": DEFAULT | {"rope_theta": 5.0}}, (5.0, None)),
        ({"rope_theta": 5, "rope_parameters": DEFAULT | {"rope_theta": 5.0}}, (5.0, None)),
        ({"rope_theta": None, "rope_parameters": YARN | {"rope_theta": 5.0}}, (5.0, YARN)),
        ({"rope_theta": 5.0, "rope_parameters": YARN, "rope_scaling": OLD_YARN}, (5.0, YARN)),
    ],
)
def test_rotary_fields_of_all_versions(fields, expected):
    assert take_rope(**fields) == expected


def test_weights_of_the_losses_of_a_router_have_no_effect():
    with HuggingFaceConfig(
        {"model_type": "some", "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1}, "some"
    ):
        pass


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5.0, "rope_parameters": DEFAULT | {"rope_theta": 6.0}},
        {"rope_theta": 5.0, "rope_parameters": DEFAULT, "rope_scaling": YARN},
        {"rope_theta": 5.0, "rope_parameters": YARN | {"beta_fast": 16}, "rope_scaling": YARN},
        {"rope_parameters": DEFAULT | {"rope_theta": 5.0}, "rope_scaling": YARN},
        {"rope_parameters": YARN | {"rope_theta": 5.0}, "rope_scaling": YARN},
        {"rope_theta": 5.0, "rope_scaling": YARN | {"type": "linear"}},
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields):
    with pytest.raises(
        CheckpointError, match=r"config\.json contradicts itself: rope_.*Remove one"
    ):
        take_rope(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": "5"}, "rope_theta = '5' must be of type float"),
        ({"rope_theta": 5.0, "rope_scaling": "yarn"}, "rope_scaling = 'yarn' must be of type dict"),
        ({"rope_scaling": YARN}, "lacks 'rope_theta'"),
    ],
)
def test_fields_of_other_types_are_refused(fields, message):
    with pytest.raises(CheckpointError, match=message):
        take_rope(**fields)
