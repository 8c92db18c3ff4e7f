from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BytesTokenizer, HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.data import build_dataloader
from torchtitan.data.chat import CHATML, ChatTemplate, load_template
from torchtitan.data.encode import Encoder
from torchtitan.data.rows import document_columns, document_of
from torchtitan.data.sources import open_dataset, take
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


def test_messages_of_weight_0_are_not_trained_on() -> None:
    weighted = [CHAT[0], CHAT[1], CHAT[2] | {"weight": 0}, CHAT[3], CHAT[4] | {"weight": 1.0}]
    hello = ("Hello<|im_end|>\n", False)
    assert template().segments(weighted) == [CHATML_PIECES[0], hello, *CHATML_PIECES[2:]]


MARKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<{% generation %}{{ m.content }}|"
    "{% endgeneration %}>{% else %}{{ m.content }}{% endif %}{% endfor %} {{ messages|length }}"
    "{% if add_generation_prompt %}...{% endif %}"
)


def test_a_template_may_mark_what_is_trained_on() -> None:
    marked = template(MARKING)
    assert marked.segments(CHAT) == [
        ("Be brief.Hi<", False),
        ("Hello|", True),
        (">Bye<", False),
        ("See you|", True),
        (">(left) 6", False),
    ]
    assert marked.prompt(CHAT) == "Be brief.Hi<Hello|>Bye<See you|>(left) 6..."
    weighted = [CHAT[1], CHAT[2] | {"weight": 0}, CHAT[3], CHAT[4]]
    learned = [text for text, is_learned in marked.segments(weighted) if is_learned]
    assert learned == ["See you|"]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([CHAT[1]], "has no message with the role 'assistant'"),
        ([CHAT[1] | {"content": "\ufdd0"}, CHAT[2]], "U.FDD0"),
        ([CHAT[2] | {"weight": 0}, CHAT[4], CHAT[4] | {"content": ""}], "marks 2 texts of 3"),
        ([CHAT[2] | {"tool_calls": [{"function": {"name": "f"}}]}], "leaves out the tool_calls"),
    ],
)
def test_a_conversation_that_marks_do_not_fit_is_refused(messages: list, problem: str) -> None:
    source = MARKING.replace("m.role == 'assistant'", "m.role == 'assistant' and m.content")
    with pytest.raises(BadDocumentError, match=problem):
        template(source).segments(messages)


def test_a_template_may_demand_tool_calls_or_content() -> None:
    source = (
        "{% for m in messages %}{% if not (m.content or m.tool_calls) %}"
        "{{ raise_exception('empty') }}{% endif %}{{ m.content or m.tool_calls }}{% endfor %}"
    )
    calls = [CHAT[1], {"role": "assistant", "tool_calls": ["f"]}]
    assert ChatTemplate(source, {}, "t").segments(calls)[-1] == ("['f']", True)


def test_a_message_of_tool_calls_needs_no_content() -> None:
    source = "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    calls = [CHAT[1], {"role": "assistant", "content": None, "tool_calls": ["f"]}]
    assert template(source).segments(calls) == [("Hi", False), ("['f']", True)]


def test_the_template_sees_the_tools_of_a_row() -> None:
    source = "{% for t in tools or () %}{{ t | tojson }}{% endfor %}" + CHATML
    tools = [{"name": "f", "parameters": {"a": {"type": "string"}, "b": None}}]
    shown = '{"name": "f", "parameters": {"a": {"type": "string"}%s}}'
    for given, null in ((tools, ""), (json.dumps(tools), ', "b": null')):
        chat = document_of({"messages": CHAT, "tools": given}, "messages")
        pieces = template(source).segments(chat)
        assert pieces == [(shown % null + CHATML_PIECES[0][0], False), *CHATML_PIECES[1:]]
        assert template(source).prompt(chat).startswith(shown % null + "<|im_start|>system")
    with pytest.raises(BadDocumentError, match="the template leaves out the tools of the conv"):
        template().segments(chat)
    for nothing in (None, [], "", "[]"):
        chat = document_of({"messages": CHAT, "tools": nothing}, "messages")
        assert template().segments(chat) == CHATML_PIECES
    assert document_of({"text": "t", "tools": 3}, "text") == "t"
    assert document_columns("tools", ["tools", "a"]) == ["tools"]
    for wrong in ("f", ["f"], {"f": 1}, 3, "[" * 100_000):
        with pytest.raises(DataError, match="field 'tools' must be a list of JSON schemas, or"):
            document_of({"messages": CHAT, "tools": wrong}, "messages")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "arrow"])
def test_a_row_has_its_tools_in_files_of_every_kind(kind: str, tmp_path: Path) -> None:
    def calling(**arguments: int) -> list[dict]:
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        return [CHAT[1], CHAT[2] | {"tool_calls": calls}]

    rows = [{"id": 1, "messages": calling(a=1), "tools": [{"name": "f"}]}]
    rows += [{"id": 2, "messages": calling(b=2), "tools": None}]
    path, dataset = tmp_path / f"chat.{kind}", kind.partition(".")[0]
    if dataset == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if kind == "jsonl.gz" else text)
    elif dataset == "json":
        path.write_text(json.dumps(rows))
    elif dataset == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    source = open_dataset("jsonl" if dataset == "json" else dataset, str(path), "messages")
    first, second = (take(source, index) for index in range(2))
    assert (first, first.tools) == (calling(a=1), [{"name": "f"}])
    assert (second, type(second)) == (calling(b=2), list)


BAD_CHATS = {
    "role": ([{"content": "Hi"}], "message 0 .* has no text 'role'"),
    "content": ([CHAT[1], {"role": "assistant", "content": None}], "message 1 .*'content'"),
    "assistant": (CHAT[:2], "no message with the role 'assistant'"),
    "empty": ([], "no message with the role 'assistant'"),
    "weight": ([CHAT[1], CHAT[2] | {"weight": 0.5}], r"message 1 .* weight 0\.5\. Allowed: 0"),
    "unlearned": ([CHAT[1], CHAT[2] | {"weight": 0}], "'assistant', a text and another wei"),
    "tool calls": ([CHAT[1], {"role": "assistant", "tool_calls": ["f"]}], "leaves out the tool_"),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_a_malformed_conversation_is_refused(case: str) -> None:
    messages, problem = BAD_CHATS[case]
    with pytest.raises(BadDocumentError, match=problem):
        template().segments(messages)


@pytest.mark.parametrize("question", ["", "Hi"])
def test_an_assistant_that_says_nothing_is_no_text_to_learn(question: str) -> None:
    bare = template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    messages = [CHAT[1] | {"content": question}, CHAT[2] | {"content": ""}]
    encoder = Encoder(BytesTokenizer(), lambda: bare, on_error="skip")
    assert len(encoder(messages)) == 0
    assert encoder.skipped == 1


def test_a_conversation_without_tokens_is_eos_alone() -> None:
    class Words(BytesTokenizer):
        def encode_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
            return [self.encode(piece.strip()) for piece in pieces]

    bare = template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    messages = [CHAT[1] | {"content": " "}, CHAT[2] | {"content": " "}]
    encoder = Encoder(Words(), lambda: bare)
    assert encoder(messages).tolist() == [~Words.eos_id]


def test_a_conversation_that_cannot_be_rendered_can_be_found_in_its_file() -> None:
    encoder = Encoder(BytesTokenizer(), template)
    with pytest.raises(BadDocumentError, match=r"'assistant'\. The document begins \[\{'role'"):
        encoder(CHAT[:2])
    with pytest.raises(BadDocumentError, match=r"^file:3: no object$"):
        encoder(BadDocumentError("file:3: no object"))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "left to right",
        ),
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].content.no.such }}", "rejects the conversation"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "rejects the conversation"),
        ("{{ 'a' * 10**15 }}", "rejects the conversation"),
    ],
)
def test_a_template_that_does_not_fit_is_named(source: str, problem: str) -> None:
    with pytest.raises(BadDocumentError, match=f"the template.*{problem}"):
        template(source).segments(CHAT)


@pytest.mark.parametrize(
    ("opened", "closed"),
    [
        ("{{ " + "(" * 5000 + "1", ")" * 5000 + " }}"),
        ("{% if true %}" * 300, "{% endif %}" * 300),
        ("{% for i in [] %}" * 30, "{% endfor %}" * 30),
    ],
)
def test_what_is_nested_too_deeply_is_no_template(opened: str, closed: str) -> None:
    with pytest.raises(DataError, match="is not a Jinja template"):
        template(opened + closed)


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    with pytest.raises(BadDocumentError, match="rejects"):
        template("{{ messages.__class__.__mro__[1].__subclasses__() }}").segments(CHAT)


def test_a_template_is_that_of_the_config_or_of_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% if add_generation_prompt %}own {% endif %}")
    config = {"chat_template": "{% if add_generation_prompt %}config {% endif %}", "eos_token": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    def prompt(path: str | None) -> str:
        return load_template(path, str(tmp_path)).prompt([])

    assert prompt(None) == "config "
    assert prompt(str(tmp_path / "own.jinja")) == "own "
    (tmp_path / "chat_template.jinja").write_text("{% if add_generation_prompt %}file{% endif %}")
    assert prompt(None) == "file"
    assert load_template(None, "bytes").prompt([]) == "<|im_start|>assistant\n"
    with pytest.raises(DataError, match=r"data\.chat_template: .*nowhere cannot be read"):
        load_template(str(tmp_path / "nowhere"), "bytes")
    (tmp_path / "own.jinja").write_text("{% if %}")
    with pytest.raises(DataError, match=r"own\.jinja is not a Jinja template"):
        load_template(str(tmp_path / "own.jinja"), "bytes")


LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEMPLATES: dict[str, dict] = {
    "several": {
        "chat_template": [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "{{ bos_token }}" + LOOP},
        ]
    },
    "special tokens": {
        "chat_template": "{{ bos_token }}{{ pad_token }}{{ unk_token }}{{ sep_token }}" + LOOP
    },
    "tokens that there are": {
        "chat_template": "{{ cls_token is defined }} {{ mask_token is defined }}" + LOOP,
        "mask_token": "<mask>",
    },
    "no tools": {
        "chat_template": "{% if tools is not none %}tools{% endif %}"
        "{% if documents is not none %}documents{% endif %}" + LOOP
    },
    "date": {"chat_template": "{{ strftime_now('%d %b %Y') }}" + LOOP},
    "json": {"chat_template": "{{ messages[0] | tojson(indent=4, sort_keys=true) }}" + LOOP},
    "json in a line": {
        "chat_template": "{{ messages[0] | tojson(separators=(',', ':')) }}" + LOOP,
    },
    "generation": {
        "chat_template": "{% set x = 1 %}{% for m in messages %}{% generation %}\n"
        "  {% set x = 2 %}{{ m.content }}{{ x }}\n{% endgeneration %}{{ x }}{% endfor %}"
    },
    "thinking": {"chat_template": LOOP.replace("m.content", "m.thinking")},
    "reasoning": {"chat_template": LOOP.replace("m.content", "m.reasoning_content")},
    "tools": {
        "chat_template": "{% for tool in tools or () %}{{ tool | tojson(indent=1) }}{% endfor %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    },
    "fields that are null": {
        "chat_template": "{% for m in messages %}{{ m.content }}"
        "{% if 'tool_calls' in m %}{{ m.tool_calls }}{% endif %}{% endfor %}"
    },
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_is_rendered_as_by_transformers(case: str, tmp_path: Path) -> None:
    texts = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    Tokenizer(WordLevel({t: i for i, t in enumerate(texts)}, "<unk>")).save(
        str(tmp_path / "tokenizer.json")
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | TEMPLATES[case]))
    old = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(old))
    messages = [
        {"role": "user", "content": '<é & "x">', "tool_calls": None},
        {"role": "assistant", "content": "yes", "tool_calls": None},
    ]
    messages[1] |= {"thinking": {"reasoning": "hm"}, "reasoning": {"thinking": "hm"}}.get(case, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    schema = {"name": "f", "description": "é", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": schema}] if case == "tools" else None
    expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    document = document_of({"messages": messages, "tools": tools}, "messages")
    pieces = load_template(None, str(tmp_path)).segments(document)
    assert "".join(text for text, _ in pieces) == expected


def test_a_default_is_needed_among_several_templates(tmp_path: Path) -> None:
    config = {"chat_template": [{"name": "rag", "template": "x"}, {"name": "b", "template": "y"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="templates 'rag', 'b', none of which is 'default'"):
        load_template(None, str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(DataError, match=r"chat_template of .* is a int, not text"):
        load_template(None, str(tmp_path))


def test_it_is_told_which_template_writes_the_conversations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "torchtitan")
    load_template(None, str(tmp_path))
    assert (
        f"as ChatML: data.chat_template is unset, and model.tokenizer_path = '{tmp_path}' has"
        in (
            caplog.text  # an author's own tokenizer may not use that path
        )
    )
    file = tmp_path / "chat_template.jinja"
    file.write_text("{{ strftime_now('%Y') }}")
    load_template(None, str(tmp_path))
    assert f"conversations are rendered with {file}" in caplog.text
    assert "resumed on another day reads different conversations" in caplog.text


def test_the_date_of_a_template_can_be_fixed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(86_400 * 365))
    (tmp_path / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}|{{ m['content'] }}{% endfor %}"
    )
    chat = load_template(None, str(tmp_path))
    text = "".join(text for text, _ in chat.segments(CHAT))
    assert text.startswith("01 Jan 1971|")
    assert "another day" not in caplog.text


def test_an_error_within_a_template_is_the_documents(tmp_path: Path) -> None:
    source = "{{ messages[0]['content'].index('no such') }}"
    with pytest.raises(BadDocumentError, match="rejects the conversation"):
        template(source).segments(CHAT)


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


def llama_2(folder: Path, kind: str) -> HuggingFaceTokenizer:
    """A tokenizer that writes "▁" before a text, as that of Llama 2 (or not: `never`)."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    if kind == "Prepend":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    trainer = BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(["Hi there Hello you Hello there [INST] [/INST]"] * 50, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return HuggingFaceTokenizer(folder)


@pytest.mark.parametrize("kind", ["Prepend", "first", "always", "never"])
def test_a_conversation_has_the_tokens_of_its_text(tmp_path: Path, kind: str) -> None:
    tokenizer = llama_2(tmp_path, kind)
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    chat = [
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hello you"},
        {"role": "user", "content": "you"},
        {"role": "assistant", "content": "Hi"},
    ]
    text = "<s>[INST] Hi there [/INST] Hello you</s>[INST] you [/INST] Hi</s>"
    ids = Encoder(tokenizer, lambda: template(source))(chat)
    assert [i if i >= 0 else ~i for i in ids.tolist()] == tokenizer.encode(text)
    learned = map(tokenizer._tokenizer.id_to_token, ids[ids >= 0].tolist())
    assert "".join(learned) == "▁Hello▁you</s>▁Hi</s>"


@pytest.mark.parametrize("kind", ["Prepend", "first", "always"])
def test_an_answer_has_its_first_word_though_a_space_ends_the_prompt(
    tmp_path: Path, kind: str
) -> None:
    source = (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ m['content'] + ' [/INST] ' }}{% else %}{{ m['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    )
    chat = [{"role": "user", "content": "you"}, {"role": "assistant", "content": "Hello"}]
    tokenizer = llama_2(tmp_path, kind)
    ids = Encoder(tokenizer, lambda: template(source))(chat)
    assert [i if i >= 0 else ~i for i in ids.tolist()] == tokenizer.encode("you [/INST] Hello</s>")
    learned = map(tokenizer._tokenizer.id_to_token, ids[ids >= 0].tolist())
    assert "".join(learned) == "▁Hello</s>"
