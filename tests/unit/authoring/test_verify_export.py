"""What `adapter.config_json` takes for a mistake, and what for an option that there is not."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from torchtitan.authoring.verify.check import CheckFailedError
from torchtitan.authoring.verify.export import config_says_what_args_say
from torchtitan.authoring.verify.subject import Subject
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.qwen3.model.args import Qwen3ModelArgs


def ask(args: Any, tmp_path: Any) -> str:
    subject = Subject("llama3", "debugmodel", tmp_path)
    subject.__dict__["spec"] = replace(subject.spec, model_args=args)
    flavors = "torchtitan.authoring.verify.export.model_flavors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flavors, lambda name: [])
        return config_says_what_args_say(subject)


def test_an_option_that_hugging_face_lacks_is_said(tmp_path):
    moe = MoEArgs(num_experts=4, top_k=2, hidden_dim=32, num_shared_experts=1)
    assert ask(Qwen3ModelArgs(moe=moe), tmp_path) == (
        "1 flavor; Hugging Face cannot represent debugmodel"
    )


@dataclass
class WithoutReader(Qwen3ModelArgs):
    from_hf_config = None

    def to_hf_config(self) -> dict[str, Any]:
        return super().to_hf_config() | {"num_key_value_heads": self.n_heads}


def test_usual_names_are_compared_where_nothing_reads_the_file(tmp_path):
    args = WithoutReader(n_heads=4, n_kv_heads=2)
    with pytest.raises(CheckFailedError, match=r"num_key_value_heads = 4 \(n_kv_heads is 2\)"):
        ask(args, tmp_path)


def test_the_architecture_must_be_named(tmp_path):
    @dataclass
    class Nameless(Qwen3ModelArgs):
        def to_hf_config(self) -> dict[str, Any]:
            config = super().to_hf_config()
            del config["architectures"]
            return config

    with pytest.raises(CheckFailedError, match=r"config\.json would have no architectures"):
        ask(Nameless(), tmp_path)
