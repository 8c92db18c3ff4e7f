"""The requests of lm-evaluation-harness, answered without that package."""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_hf
import torch

from torchtitan.cli import main
from torchtitan.commands.evaluate.lm_eval_adapter import TaskModel
from torchtitan.commands.evaluate.task_options import TaskOptions
from torchtitan.errors import ConfigError
from torchtitan.generation.load import ModelOptions, load_model, open_source
from torchtitan.generation.scoring import rolling_windows, score

BOS = 256


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    tiny_hf.hf_model("llama3").save_pretrained(folder)
    return load_model(open_source(ModelOptions(str(folder), tokenizer="bytes")))


def requests(*args):
    return [SimpleNamespace(args=one) for one in args]


def task_model(loaded, batch_size=8, max_seq_len=512, add_bos=False):
    return TaskModel(loaded, batch_size, max_seq_len, add_bos)


@torch.no_grad()
def log_likelihood(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = model(torch.tensor([context + continuation]))[0, len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    total = logits.log_softmax(-1).gather(-1, targets[:, None]).sum().item()
    return total, bool((logits.argmax(-1) == targets).all())


def test_scores_do_not_depend_on_the_batch(loaded):
    pairs = [([1, 2, 3], [4]), ([5], [6, 7, 8, 9]), ([10] * 30, [11, 12])]
    for batch_size in (1, 2, 8):
        scores = score(loaded.model, pairs, batch_size)
        for result, pair in zip(scores, pairs, strict=True):
            expected, greedy = log_likelihood(loaded.model, *pair)
            assert result.log_likelihood == pytest.approx(expected, rel=1e-4)
            assert result.is_greedy == greedy


def test_what_is_too_long_loses_its_beginning(loaded):
    context, continuation = list(range(40)), [3, 4]
    [result] = score(loaded.model, [(context, continuation)], 1, max_seq_len=10)
    expected, _ = log_likelihood(loaded.model, context[-9:], continuation)
    assert result.log_likelihood == pytest.approx(expected, rel=1e-5)


def test_a_continuation_that_is_greedy(loaded):
    context = [65, 66]
    token = int(loaded.model(torch.tensor([context]))[0, -1].argmax())
    other = (token + 1) % 256
    continuations = [token], [other], [token, other]
    results = score(loaded.model, [(context, each) for each in continuations], 2)
    assert [result.is_greedy for result in results] == [True, False, False]


@pytest.mark.parametrize("window", [1, 3, 4, 10, 11, 100])
def test_rolling_windows_predict_each_token_once(window):
    tokens = list(range(10))
    pairs = rolling_windows(tokens, BOS, window)
    assert [token for _, continuation in pairs for token in continuation] == tokens
    text = [BOS, *tokens]
    for context, continuation in pairs:
        joined = [*context, *continuation]
        assert len(joined) <= window + 1 and context
        start = text.index(joined[0])
        assert text[start : start + len(joined)] == joined
    if len(pairs) > 1:
        assert len(pairs[-1][0]) + len(pairs[-1][1]) == window + 1


def test_loglikelihood(loaded):
    model = task_model(loaded)
    with_space, joined, alone = model.loglikelihood(
        requests(("a question ", "yes"), ("a question", " yes"), ("", "yes"))
    )
    assert with_space == joined  # the space moves to the continuation
    expected = log_likelihood(loaded.model, list(b"a question"), list(b" yes"))
    assert joined == (pytest.approx(expected[0], rel=1e-4), expected[1])
    assert alone[0] == pytest.approx(log_likelihood(loaded.model, [BOS], list(b"yes"))[0], rel=1e-4)


def test_loglikelihood_with_bos(loaded):
    [(result, _)] = task_model(loaded, add_bos=True).loglikelihood(requests(("a", "b")))
    expected, _ = log_likelihood(loaded.model, [BOS, *b"a"], list(b"b"))
    assert result == pytest.approx(expected, rel=1e-4)


def test_a_context_has_one_bos(loaded):
    tokenizer = SimpleNamespace(encode=lambda text: [BOS, *text.encode()], bos_id=BOS, eos_id=257)
    source = replace(loaded.source, tokenizer=tokenizer)
    model = task_model(replace(loaded, source=source), add_bos=True)
    [(result, _)] = model.loglikelihood(requests(("a", "b")))
    assert result == pytest.approx(log_likelihood(loaded.model, [BOS, *b"a"], list(b"b"))[0])


def test_loglikelihood_rolling(loaded):
    whole, windows = (
        task_model(loaded, max_seq_len=n).loglikelihood_rolling(requests(("abcdefg",), ("hi",)))
        for n in (100, 4)
    )
    assert whole[0] == pytest.approx(log_likelihood(loaded.model, [BOS], list(b"abcdefg"))[0])
    assert whole[1] == pytest.approx(windows[1])
    parts = [([BOS], list(b"abcd")), (list(b"cd"), list(b"efg"))]
    assert windows[0] == pytest.approx(
        sum(log_likelihood(loaded.model, *part)[0] for part in parts)
    )


def test_generate_until(loaded):
    model = task_model(loaded)
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    [text] = model.generate_until(requests(("some context", options)))
    assert len(text) >= 6
    stop = text[4:6]
    [stopped] = model.generate_until(requests(("some context", options | {"until": [stop]})))
    assert stopped == text[: text.index(stop)]
    [also] = model.generate_until(requests(("some context", options | {"until": stop})))
    assert also == stopped


def test_texts_do_not_depend_on_the_batch(loaded):
    settings = [
        {"do_sample": True, "max_gen_toks": 9},
        {"do_sample": True, "max_gen_toks": 9, "until": ["e", "\x00"]},
        {"do_sample": False, "max_gen_toks": 5},
    ]
    asked = requests(*((f"{'long ' * n}context", settings[n // 2 % 3]) for n in range(9)))
    alone = task_model(loaded, batch_size=1).generate_until(asked)
    assert task_model(loaded, batch_size=4).generate_until(asked) == alone


def test_a_stop_is_looked_for_at_the_end_of_a_text(loaded, monkeypatch):
    decoded = 0

    def decode(ids):
        nonlocal decoded
        decoded += len(ids)
        return "".join(chr(i % 64 + 64) for i in ids)

    monkeypatch.setattr(loaded.source.tokenizer, "decode", decode)
    model = task_model(loaded)
    options = {"until": ["no such text"], "max_gen_toks": 200, "do_sample": False}
    [text] = model.generate_until(requests(("a", options)))
    assert decoded < 20 * len(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 0.1, "do_sample": True}, "min_p = 0.1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty = 1.2"),
        ({"num_beams": 4}, "num_beams = 4"),
        ({"max_gen_toks": 512}, "512 tokens .* no room for the context: the model sees 512"),
    ],
)
def test_what_a_task_cannot_have_is_refused_before_anything_is_generated(loaded, options, message):
    model = task_model(loaded)
    model._generator = None
    with pytest.raises(ConfigError, match=message):
        model.generate_until(requests(("context", {"until": []}), ("context", options)))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "stop_strings": None},
        {"do_sample": False, "min_p": 0.1, "temperature": 0.7},
        {"do_sample": True, "temperature": 1.0, "top_k": 1, "min_p": 0.0},
    ],
)
def test_options_without_effect_are_accepted(loaded, options):
    model = task_model(loaded)
    plain, same = model.generate_until(
        requests(("a", {"max_gen_toks": 4}), ("a", options | {"max_gen_toks": 4}))
    )
    assert plain == same


def test_a_top_k_of_0_is_none():
    options = {"do_sample": True, "temperature": 0.5}
    assert TaskOptions.of(options | {"top_k": 0}) == TaskOptions.of(options)


def test_contexts_that_are_cut_are_counted(loaded, caplog):
    model = task_model(loaded, max_seq_len=10)
    model.loglikelihood(requests(("a" * 9, "bc"), ("a", "b")))
    model.generate_until(requests(("a" * 6, {"max_gen_toks": 4})))
    assert not caplog.records
    model.loglikelihood(requests(("a" * 12, "bc"), ("a", "b")))
    assert "1 of 2 contexts lose their beginning, up to 3 tokens" in caplog.text
    [text] = model.generate_until(requests(("b" + "a" * 6, {"max_gen_toks": 4})))
    assert "1 of 1 contexts lose their beginning, up to 1 tokens" in caplog.text
    assert [text] == model.generate_until(requests(("a" * 6, {"max_gen_toks": 4})))
    with pytest.raises(ConfigError, match="scores 11 tokens, but the model sees 10"):
        model.loglikelihood(requests(("a", "b" * 11)))


def test_tasks_see_as_much_as_the_model_is_made_for(tmp_path, monkeypatch):
    tiny_hf.hf_model("llama3", max_position_embeddings=4096).save_pretrained(tmp_path)
    lengths = []

    def run_tasks(model, *_):
        lengths.append(model.max_seq_len)
        return {"results": {}}

    monkeypatch.setattr("torchtitan.commands.evaluate.command.run_tasks", run_tasks)
    monkeypatch.setattr("torchtitan.commands.evaluate.command.require_lm_eval", lambda: None)
    command = ["eval", "--checkpoint", str(tmp_path), "--tokenizer", "bytes", "--tasks", "x"]
    assert main(command) == main([*command, "--seq-len", "3000"]) == 0
    assert lengths == [4096, 3000]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_the_package_is_missing(loaded, capsys):
    checkpoint = str(loaded.source.folder)
    with pytest.raises(SystemExit) as caught:
        main(["eval", "--checkpoint", checkpoint, "--tokenizer", "bytes", "--tasks", "hellaswag"])
    assert caught.value.code == 2
    assert "pip install lm_eval" in capsys.readouterr().err
