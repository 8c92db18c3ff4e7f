"""Folders for `--hf` that cannot be compared with."""

import json
from dataclasses import dataclass, replace

import pytest

from torchtitan.authoring.verify.check import CheckFailedError, NotApplicableError
from torchtitan.authoring.verify.hf_files import config_matches
from torchtitan.authoring.verify.hf_numbers import _beyond_windows, numbers_match
from torchtitan.authoring.verify.subject import Subject
from torchtitan.protocols import BaseModelArgs


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read: No such file"), ("{", "is damaged"), ("[]", "holds no JSON object")],
)
def test_a_config_that_is_none_is_a_failed_check(content, problem, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckFailedError, match=rf"{tmp_path}/config\.json .*{problem}"):
        config_matches(Subject("llama3", "debugmodel", tmp_path, hf_path=tmp_path))


@dataclass
class Args(BaseModelArgs):
    dim: int = 256
    n_kv_heads: int | None = None


def test_a_size_that_args_leave_open_is_no_difference(tmp_path):
    args = Args()
    subject = Subject("llama3", "debugmodel", tmp_path, hf_path=tmp_path)
    subject.__dict__.update(args=args, spec=replace(subject.spec, model_args=args))
    config = {"model_type": "mine", "hidden_size": 256, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert config_matches(subject) == "model_type mine"
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 512}))
    with pytest.raises(CheckFailedError, match=r"dim = 256 \(config.json: hidden_size = 512\)"):
        config_matches(subject)


def test_losses_of_a_router_are_no_difference(tmp_path):
    subject = Subject("qwen3", "debugmodel_moe", tmp_path, hf_path=tmp_path)
    moe = replace(subject.args.moe, aux_loss_weight=0.1, z_loss_weight=0.1)
    subject.__dict__.update(args=replace(subject.args, moe=moe))
    (tmp_path / "config.json").write_text(json.dumps(subject.args.to_hf_config()))
    assert config_matches(subject) == "model_type qwen3_moe"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"model_type": "hyb"}', "model_type = 'hyb'"),
        ('{"_class_name": "Some"}', "a config.json without model_type"),  # of diffusers
    ],
)
def test_numbers_of_a_model_that_transformers_does_not_have_do_not_apply(
    content, problem, tmp_path
):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(NotApplicableError, match=rf"transformers \S+ has no model of {problem}"):
        numbers_match(Subject("llama3", "debugmodel", tmp_path, hf_path=tmp_path))


def test_numbers_of_a_model_with_inputs_of_its_own_do_not_apply(tmp_path):
    """Said before transformers is asked for a causal model, which it may not have."""
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    subject = Subject("tiny_diffusion", "tiny", tmp_path, "tiny_diffusion", hf_path=tmp_path)
    with pytest.raises(NotApplicableError, match="applies only to token ids"):
        numbers_match(subject)


class _Config:
    """transformers', of a model with a window."""

    def __init__(self, **fields):
        self.__dict__.update(fields)

    def to_dict(self):
        return vars(self)


@pytest.mark.parametrize(
    ("flavor", "fields", "length", "note"),
    [
        ("debugmodel", {"sliding_window": 128}, 257, ""),
        ("debugmodel", {"mamba_chunk_size": 32}, 97, ""),  # three chunks
        ("debugmodel", {"sliding_window": None, "max_window_layers": 500}, 64, ""),
        ("debugmodel", {"sliding_window": 4096, "max_position_embeddings": 4096}, 64, ""),
        ("debugmodel", {"sliding_window": 128, "max_position_embeddings": 150}, 150, ""),
        ("70B", {"sliding_window": 4096}, 64, "; they do not reach the window of 4096"),
    ],
)
def test_numbers_are_compared_where_windows_end(flavor, fields, length, note, tmp_path):
    subject = Subject("llama3", flavor, tmp_path)
    reached = _beyond_windows(subject, subject.args, _Config(**fields))
    assert (reached.length, reached.note) == (length, note)
