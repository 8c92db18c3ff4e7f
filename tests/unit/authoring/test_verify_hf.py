"""Folders for `--hf` that cannot be compared with."""

import pytest

from torchtitan.authoring.verify.check import CheckFailedError, NotApplicableError
from torchtitan.authoring.verify.hf_files import config_matches
from torchtitan.authoring.verify.hf_numbers import numbers_match
from torchtitan.authoring.verify.subject import Subject


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read: No such file"), ("{", "is damaged"), ("[]", "holds no JSON object")],
)
def test_a_config_that_is_none_is_a_failed_check(content, problem, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckFailedError, match=rf"{tmp_path}: config\.json .*{problem}"):
        config_matches(Subject("llama3", "debugmodel", tmp_path, hf_path=tmp_path))


def test_numbers_of_a_model_that_transformers_does_not_have_do_not_apply(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "hyb"}')
    with pytest.raises(NotApplicableError, match=r"transformers \S+ has no model .* = 'hyb'"):
        numbers_match(Subject("llama3", "debugmodel", tmp_path, hf_path=tmp_path))
