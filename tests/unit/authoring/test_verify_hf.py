"""Folders for `--hf` that cannot be compared with."""

import pytest

from torchtitan.authoring.verify.check import CheckFailedError, NotApplicableError
from torchtitan.authoring.verify.hf_files import config_matches
from torchtitan.authoring.verify.hf_numbers import _beyond_windows, numbers_match
from torchtitan.authoring.verify.subject import Subject


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read: No such file"), ("{", "is damaged"), ("[]", "holds no JSON object")],
)
def test_a_config_that_is_none_is_a_failed_check(content, problem, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckFailedError, match=rf"{tmp_path}/config\.json .*{problem}"):
        config_matches(Subject("llama3", "debugmodel", tmp_path, hf_path=tmp_path))


def test_numbers_of_a_model_that_transformers_does_not_have_do_not_apply(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "hyb"}')
    with pytest.raises(NotApplicableError, match=r"transformers \S+ has no model .* = 'hyb'"):
        numbers_match(Subject("llama3", "debugmodel", tmp_path, hf_path=tmp_path))


class _Config:
    """transformers', of a model with a window."""

    def __init__(self, **fields):
        self.__dict__.update(fields)

    def to_dict(self):
        return vars(self)


@pytest.mark.parametrize(
    ("flavor", "fields", "length", "note"),
    [
        ("debugmodel", {"sliding_window": 128}, 193, ""),
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
