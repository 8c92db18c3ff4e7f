"""Folders for `--hf` that cannot be compared with."""

import pytest

from torchtitan.authoring.verify.check import CheckFailedError
from torchtitan.authoring.verify.hf_files import config_matches
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
