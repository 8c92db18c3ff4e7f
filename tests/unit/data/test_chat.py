from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.config import JobConfig
from torchtitan.data import build_dataloader
from torchtitan.data.chat import CHATML, ChatTemplate, load_template
from torchtitan.data.encode import Encoder
from torchtitan.errors import BadDocumentError, DataError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
    {"role": "user", "content": "(left)"},
]
CHATML_PIECES = [
    (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n",
        False,
    ),
    ("Hello<|im_end|>\n", True),
    ("<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", False),
    ("See you<|im_end|>\n", True),
]


def template(source: str = CHATML) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, "the template")


def test_what_the_assistant_says_is_trained_on() -> None:
    assert template().segments(CHAT) == CHATML_PIECES


def test_the_template_sees_the_special_tokens() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    pieces = template(source).segments(CHAT[1:3])
    assert pieces == [("<s>[user] Hi[assistant] ", False), ("Hello</s>", True)]


def test_tokens_of_others_are_complements() -> None:
    encoder = Encoder(BytesTokenizer(), template)
    ids = encoder(CHAT).tolist()
    expected: list[int] = []
    for text, trained in CHATML_PIECES:
        expected += [i if trained else ~i for i in text.encode()]
    assert ids == [*expected, ~BytesTokenizer.eos_id]


BAD_CHATS = {
    "role": ([{"content": "Hi"}], "message 0 .* has no text 'role'"),
    "content": ([CHAT[1], {"role": "assistant", "content": None}], "message 1 .*'content'"),
    "assistant": (CHAT[:2], "no message of the role 'assistant'"),
    "empty": ([], "no message of the role 'assistant'"),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_a_malformed_conversation_is_refused(case: str) -> None:
    messages, problem = BAD_CHATS[case]
    with pytest.raises(BadDocumentError, match=problem):
        template().segments(messages)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "left to right",
        ),
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].content.no.such }}", "refuses the conversation"),
    ],
)
def test_a_template_that_does_not_fit_is_named(source: str, problem: str) -> None:
    with pytest.raises(BadDocumentError, match=f"the template.*{problem}"):
        template(source).segments(CHAT)


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    with pytest.raises(BadDocumentError, match="refuses"):
        template("{{ messages.__class__.__mro__[1].__subclasses__() }}").segments(CHAT)


def test_a_template_is_that_of_the_config_or_of_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% if add_generation_prompt %}own {% endif %}")
    config = {"chat_template": "{% if add_generation_prompt %}config {% endif %}", "eos_token": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    def prompt(path: str | None) -> str:
        return load_template(path, str(tmp_path))._render([], prompt=True)

    assert prompt(None) == "config "
    assert prompt(str(tmp_path / "own.jinja")) == "own "
    (tmp_path / "chat_template.jinja").write_text("{% if add_generation_prompt %}file{% endif %}")
    assert prompt(None) == "file"
    assert load_template(None, "bytes")._render([], prompt=True) == "<|im_start|>assistant\n"
    with pytest.raises(DataError, match=r"data\.chat_template: .*nowhere cannot be read"):
        load_template(str(tmp_path / "nowhere"), "bytes")
    (tmp_path / "own.jinja").write_text("{% if %}")
    with pytest.raises(DataError, match=r"own\.jinja is not a Jinja template"):
        load_template(str(tmp_path / "own.jinja"), "bytes")


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_batches_learn_the_assistants_tokens_alone(tmp_path: Path, packing: str) -> None:
    lines = [
        json.dumps({"messages": [{"role": "user", "content": "q" * n}, answer]})
        for n in range(1, 20)
        for answer in [{"role": "assistant", "content": "a" * (20 - n)}]
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    config = JobConfig()
    config.training.dataset, config.training.dataset_path = "jsonl", str(tmp_path / "chat.jsonl")
    config.training.text_key, config.training.document_mask = "messages", True
    config.training.local_batch_size, config.training.seq_len = 2, 128
    config.data.packing = packing
    loader = build_dataloader(config, BytesTokenizer(), 0, 1)
    for _ in range(40):
        batch = next(loader)
        assert batch["tokens"].min() >= 0
        learned = batch["labels"][batch["labels"] != IGNORE_INDEX]
        assert set(bytes(learned.tolist())) <= set(b"a<|im_end|>\n")
        following = batch["tokens"][:, 1:][batch["labels"][:, :-1] != IGNORE_INDEX]
        assert torch.equal(
            batch["labels"][:, :-1][batch["labels"][:, :-1] != IGNORE_INDEX], following
        )
    loader.close()
