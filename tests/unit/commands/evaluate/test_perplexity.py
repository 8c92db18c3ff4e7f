"""`torchtitan eval --dataset`: each token is predicted once, whatever the batches."""

import itertools
import json
import math
from dataclasses import replace

import datasets
import numpy as np
import pytest
import tiny_hf
import torch
from tokenizers import Tokenizer, models, processors

from torchtitan.cli import main
from torchtitan.commands.evaluate.command import Options, _open_dataset
from torchtitan.commands.evaluate.perplexity import TokenStream, evaluate, pad_batch
from torchtitan.components.loss import IGNORE_INDEX, cross_entropy
from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.data import build, sources
from torchtitan.errors import BadDocumentError, CheckpointError, DataError
from torchtitan.generation.load import ModelOptions, load_model, open_source

TEXTS = ["first document", "", "the second, with é and 東京", "x" * 40]
NBYTES = sum(len(text.encode()) for text in TEXTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    tiny_hf.hf_model("gemma3").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(open_source(ModelOptions(str(folder), tokenizer="bytes")))


def test_sequences_overlap_in_one_token():
    stream = TokenStream(TEXTS, BytesTokenizer(), max_tokens=None)
    sequences = list(stream.sequences(8))
    eos = BytesTokenizer.eos_id
    tokens = [id for text in TEXTS if text for id in [*text.encode(), eos]]
    assert [id for sequence in sequences for id in sequence[1:]] == tokens
    assert sequences[0][0] == BytesTokenizer.bos_id
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(sequences))
    assert {len(sequence) for sequence in sequences[:-1]} == {9}
    assert (stream.tokens, stream.bytes, stream.documents) == (len(tokens), NBYTES, 3)


def test_bos_is_read_but_not_predicted():
    stream = TokenStream(TEXTS, BytesTokenizer(), max_tokens=None, add_bos=True)
    tokens, labels = pad_batch(list(stream.sequences(8)))
    bos, eos = BytesTokenizer.bos_id, BytesTokenizer.eos_id
    learned = labels[labels != IGNORE_INDEX].tolist()
    assert learned == [id for text in TEXTS if text for id in [*text.encode(), eos]]
    assert len(learned) == stream.tokens
    assert tokens[0, 0] == bos and (tokens == bos).sum() == 3 and tokens.min() >= 0


@pytest.mark.parametrize("add_bos", [False, True])
def test_max_tokens_ends_within_a_document(add_bos):
    """A text file is one of up to a MiB."""
    text = "\u00e9" * 1000
    for end, size in {1: 0, 16: 16, 25: 24, 2001: 2000, 3000: 2015}.items():
        stream = TokenStream([text, "x" * 15], BytesTokenizer(), end, add_bos)
        labels = pad_batch(list(stream.sequences(8)))[1]
        assert (labels != IGNORE_INDEX).sum() == stream.tokens == min(end, 2017)
        assert stream.bytes == size and stream.documents == 1 + (end == 3000)


def test_it_tells_how_far_it_is(loaded, monkeypatch, caplog):
    monkeypatch.setattr("torchtitan.commands.evaluate.perplexity._SECONDS_OF_A_LINE", 0.0)
    with caplog.at_level("INFO", "torchtitan"):
        result = evaluate(loaded, TEXTS, 20, 1, max_tokens=30)
    assert caplog.messages[0].startswith("20 tokens so far, loss ")
    assert caplog.messages[1] == f"30 tokens so far, loss {result.loss:.4f}"


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="no document with text"):
        list(TokenStream(["", ""], BytesTokenizer(), None).sequences(8))


def test_a_malformed_row_keeps_its_message():
    """Streamed sources give the error in the place of the row."""
    texts = ["first document", BadDocumentError("rows.jsonl:2: no key 'text'")]
    with pytest.raises(DataError, match=r"^rows\.jsonl:2: no key 'text'$"):
        list(TokenStream(texts, BytesTokenizer(), None).sequences(8))


@torch.no_grad()
@pytest.mark.parametrize(
    ("document", "kind"), [(np.array([1, 2]), "an array of token ids"), ([{}], "a conversation")]
)
def test_what_training_reads_beside_texts_is_refused(document, kind):
    with pytest.raises(DataError, match=f"is {kind}, but eval measures texts"):
        list(TokenStream([document], BytesTokenizer(), None).sequences(8))


@pytest.mark.parametrize("piece", [8192, 7])
def test_the_loss_is_that_of_every_token(piece, loaded, monkeypatch):
    """Against the log-likelihoods of one sequence after the other, also if read in pieces."""
    monkeypatch.setattr("torchtitan.generation.cache.PIECE", piece)
    sequences = list(TokenStream(TEXTS, BytesTokenizer(), None).sequences(20))
    total = 0.0
    for sequence in sequences:
        logits = loaded.model(torch.tensor([sequence[:-1]]))[0]
        targets = torch.tensor(sequence[1:])
        total -= logits.log_softmax(-1).gather(-1, targets[:, None]).sum().item()
    tokens = sum(len(sequence) - 1 for sequence in sequences)
    lengths = set()
    hook = loaded.model.register_forward_pre_hook(lambda _, args: lengths.add(args[0].shape[1]))
    for batch_size in (1, 3, 50):
        result = evaluate(loaded, TEXTS, 20, batch_size)
        assert result.tokens == tokens and result.bytes == NBYTES
        assert result.loss == pytest.approx(total / tokens, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
        assert result.bits_per_byte == pytest.approx(total / math.log(2) / NBYTES, rel=1e-5)
    hook.remove()
    assert max(lengths) == min(20, piece)


def test_a_loss_counts_its_labels_as_in_training(loaded, monkeypatch):
    class OfLetters:
        def count_labels(self, labels):
            return (labels >= ord("a")).sum()

        def __call__(self, pred, labels):
            return cross_entropy(pred, labels.where(labels >= ord("a"), IGNORE_INDEX))

    loss = OfLetters()
    spec = replace(loaded.source.spec, build_loss_fn=lambda job_config: loss)
    monkeypatch.setattr(loaded.source, "spec", spec)
    tokens, labels = pad_batch(list(TokenStream(TEXTS, BytesTokenizer(), None).sequences(20)))
    with torch.no_grad():
        expected = loss(loaded.model(tokens), labels) / loss.count_labels(labels)
    assert evaluate(loaded, TEXTS, 20, 2).loss == pytest.approx(expected.item(), rel=1e-5)


def test_weights_that_are_no_numbers_have_no_loss(folder):
    loaded = load_model(open_source(ModelOptions(str(folder), tokenizer="bytes")))
    next(loaded.model.parameters()).data.fill_(math.nan)
    with pytest.raises(CheckpointError, match="logits are NaN or infinite"):
        evaluate(loaded, TEXTS, 16, 2)


def test_the_command(folder, tmp_path, capsys):
    texts, out = tmp_path / "texts.txt", tmp_path / "out.json"
    texts.write_text("some text to evaluate")
    command = ["eval", "--checkpoint", str(folder), "--tokenizer", "bytes"]
    command += ["--dataset", "text", "--dataset-path", str(texts)]
    assert main([*command, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["tokens"] == 22 and result["bytes"] == 21 and result["seq_len"] == 512
    assert f"{result['loss']:.4f}" in capsys.readouterr().out


def test_a_split(folder, tmp_path):
    texts = {"train": ["one"], "test": ["one", "two"]}
    parts = {name: datasets.Dataset.from_dict({"text": of}) for name, of in texts.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "texts")
    command = ["eval", "--checkpoint", str(folder), "--tokenizer", "bytes", "--dataset", "arrow"]
    command += ["--dataset-path", str(tmp_path / "texts"), "--json", str(tmp_path / "out.json")]
    assert main([*command, "--split", "test"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["documents"] == 2


def test_a_dataset_of_the_users(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "evaluated_dataset.py").write_text(
        "from torchtitan.data import register_dataset\n"
        "register_dataset('evaluated', lambda path, text_key: ['one', 'two'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sources, "DATASETS", dict(sources.DATASETS))
    command = ["eval", "--checkpoint", str(folder), "--tokenizer", "bytes"]
    assert main([*command, "--dataset", "evaluated", "--custom-import", "evaluated_dataset"]) == 0
    assert "(2 documents, 6 bytes)" in capsys.readouterr().out


def test_rank_zero_alone_asks_the_hub(tmp_path, monkeypatch):
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}')
    options = Options("", dataset="hf", dataset_path=str(tmp_path))
    assert list(_open_dataset(options)) == ["one"]
    streams = {
        (str(tmp_path), None, "train"): (
            None,
            datasets.IterableDataset.from_generator(lambda: iter([{"text": "of rank 0"}])),
        )
    }
    monkeypatch.setattr(build, "on_rank_zero", lambda function, group: streams)
    assert list(_open_dataset(options)) == ["of rank 0"]


def test_a_text_that_is_cut_within_its_first_character(folder, tmp_path, capsys):
    texts, out = tmp_path / "texts.txt", tmp_path / "out.json"
    texts.write_text("日本")
    command = ["eval", "--checkpoint", str(folder), "--tokenizer", "bytes", "--dataset", "text"]
    command += ["--dataset-path", str(texts), "--max-tokens", "1", "--json", str(out)]
    assert main(command) == 0
    result = json.loads(out.read_text())
    assert result["tokens"] == 1 and result["bytes"] == 0 and result["loss"] > 0
    assert result["bits_per_byte"] is None
    told = capsys.readouterr().out
    assert "bits per byte  -\n" in told
    assert told.endswith(f" bytes), in sequences of {result['seq_len']:,}\n")


def test_bos_is_as_the_tokenizer_has_it_and_as_the_options_say(folder, tmp_path):
    """Against the sums of texts that begin with bos, or not."""
    with_bos = tmp_path / "tokenizer"
    with_bos.mkdir()
    ids = {chr(n): n for n in range(256)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 256)])
    tokenizer.save(str(with_bos / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (with_bos / "tokenizer_config.json").write_text(json.dumps(names))
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out.json"
    texts.write_text('{"text": "first"}\n{"text": "second"}\n')

    def loss(tokenizer: object, *options: str) -> float:
        command = ["eval", "--checkpoint", str(folder), "--tokenizer", str(tokenizer), *options]
        command += ["--dataset", "jsonl", "--dataset-path", str(texts), "--json", str(out)]
        assert main(command) == 0
        return json.loads(out.read_text())["loss"]

    loaded = load_model(open_source(ModelOptions(str(folder), tokenizer="bytes")))
    plain, begun = (
        evaluate(loaded, ["first", "second"], 512, 4, add_bos=add_bos).loss
        for add_bos in (False, True)
    )
    assert plain != pytest.approx(begun, rel=1e-3)
    assert loss("bytes") == pytest.approx(plain)
    assert loss("bytes", "--add-bos") == pytest.approx(begun)
    assert loss(with_bos) == pytest.approx(begun)
    assert loss(with_bos, "--no-add-bos") == pytest.approx(plain)

    (with_bos / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(SystemExit):
        loss(with_bos, "--add-bos")


MISTAKES = {
    "neither": ([], "give either --dataset NAME or --tasks"),
    "both": (["--dataset", "stdlib", "--tasks", "x"], "give either"),
    "dataset": (
        ["--dataset", "sdtlib"],
        "--dataset sdtlib: no such dataset. Did you",
    ),
    "path": (["--dataset", "text"], "needs dataset_path"),
    "seq_len": (["--dataset", "stdlib", "--seq-len", "513"], "at most 512"),
    "batch": (["--dataset", "stdlib", "--batch-size", "0"], "--batch-size 0"),
    "bos": (["--dataset", "stdlib", "--add-bos", "--no-add-bos"], "either --add-bos or"),
    "json": (["--dataset", "stdlib", "--json", "/no/such/file"], "--json /no/such/file"),
    "folder": (["--dataset", "stdlib", "--json", "/"], "--json /: a folder. Give a file"),
    "split": (["--dataset", "stdlib", "--split", "test"], "split = 'test' has no effect"),
    "limit": (["--dataset", "stdlib", "--limit", "1"], "--limit has no effect without --tasks"),
    "tokens": (["--tasks", "x", "--max-tokens", "1"], "has no effect without --dataset; remove"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake(mistake, folder, capsys):
    options, message = MISTAKES[mistake]
    with pytest.raises(SystemExit) as caught:
        main(["eval", "--checkpoint", str(folder), "--tokenizer", "bytes", *options])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and message in err, err
