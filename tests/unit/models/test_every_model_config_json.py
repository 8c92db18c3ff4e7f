"""Every model's args from the `config.json` of a published checkpoint."""

import dataclasses

import pytest
from model_cases import CASES

from torchtitan.errors import CheckpointError
from torchtitan.protocols.train_spec import get_train_spec, model_flavors


def from_hf_config(name, config):
    args_class = type(get_train_spec(name, model_flavors(name)[0]).model_args)
    return args_class.from_hf_config(config)


def first_published(name):
    return next(iter(CASES[name].published.values()))


@pytest.mark.parametrize(
    ("name", "flavor"),
    [(name, flavor) for name in CASES for flavor in CASES[name].published],
)
def test_a_published_config_gives_the_flavor(name, flavor):
    expected = get_train_spec(name, flavor).model_args
    if expected.num_experts:  # the file says nothing of the loss that balances them
        moe = dataclasses.replace(expected.moe, aux_loss_weight=0.0)
        expected = dataclasses.replace(expected, moe=moe)
    assert from_hf_config(name, CASES[name].published[flavor]) == expected


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        pytest.param(name, changes, message, id=f"{name}-{next(iter(changes))}")
        for name, case in CASES.items()
        for changes, message in case.refused
    ],
)
def test_a_config_of_another_architecture_is_refused(name, changes, message):
    with pytest.raises(CheckpointError, match=message):
        from_hf_config(name, first_published(name) | changes)


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name in CASES for field in CASES[name].required]
)
def test_a_missing_field_is_named(name, field):
    config = {key: value for key, value in first_published(name).items() if key != field}
    with pytest.raises(CheckpointError, match=f"config.json lacks '{field}'"):
        from_hf_config(name, config)
