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
        moe = dataclasses.replace(expected.moe, aux_loss_weight=0.0, aux_loss_per_sequence=False)
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


@pytest.mark.parametrize("name", CASES)
def test_notes_that_other_programs_leave_change_nothing(name):
    """transformers 4.47 to 4.51, transformers.js and Unsloth."""
    notes = {
        "_attn_implementation_autoset": True,
        "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
        "unsloth_fixed": True,
        "unsloth_version": "2025.3.1",
    }
    plain = first_published(name)
    assert from_hf_config(name, plain | notes) == from_hf_config(name, plain)


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name in CASES for field in CASES[name].required]
)
def test_a_missing_field_is_named(name, field):
    config = {key: value for key, value in first_published(name).items() if key != field}
    with pytest.raises(CheckpointError, match=f"config.json lacks '{field}'"):
        from_hf_config(name, config)


def is_number(value):
    return type(value) in (int, float)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("wrong", [-1, 0])
def test_a_number_out_of_range_is_refused_under_its_name(name, wrong):
    """Or it has no effect, or may be 0."""
    config = first_published(name)
    expected, refused = from_hf_config(name, config), set()
    may_be_0 = {"rms_norm_eps", "first_k_dense_replace", "n_shared_experts"}
    may_be_0 |= {"num_nextn_predict_layers", "attn_scale", "attn_temperature_tuning"}
    scaling = config.get("rope_scaling") or {}
    changes = [(field, {field: wrong}) for field, value in config.items() if is_number(value)]
    changes += [
        (field, {"rope_scaling": scaling | {field: wrong}})
        for field, value in scaling.items()
        if is_number(value)
    ]
    for field, change in changes:
        if wrong == 0 and field in may_be_0:
            continue
        try:
            assert from_hf_config(name, config | change) == expected, field
        except CheckpointError as error:
            assert field in str(error)
            refused.add(field)
    assert {"hidden_size", "rope_theta", "num_key_value_heads"} <= refused
