"""The adapter under the real lm-evaluation-harness, on tasks of our own, without a network."""

import json
import math
from types import SimpleNamespace

import pytest
import tiny_hf

from torchtitan.cli import main
from torchtitan.commands.evaluate.lm_eval_adapter import TaskModel
from torchtitan.generation.load import ModelOptions, load_model, open_source
from torchtitan.generation.scoring import score

pytest.importorskip("lm_eval")

DOCUMENTS = [
    {"question": "def f(self", "choices": [" zzz", "):"], "answer": 1},
    {"question": "import", "choices": [" os", " qqq"], "answer": 0},
    {"question": "for i in", "choices": [" range", " @@@@@"], "answer": 0},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output_type}
doc_to_text: "{text}"
doc_to_target: "{target}"
metric_list:
  - metric: {metric}
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of a model, and what `torchtitan eval --tasks` wrote of it."""
    folder = tmp_path_factory.mktemp("lm_eval")
    model, tasks, out = folder / "model", folder / "tasks", folder / "out.json"
    tasks.mkdir()
    tiny_hf.hf_model("llama3").save_pretrained(model)
    data = tasks / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))

    def write_task(name, output_type, text, target, metric, more=""):
        fields = {"output_type": output_type, "text": text, "target": target, "metric": metric}
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, data=data, **fields) + more)

    choices = 'doc_to_choice: "{{choices}}"\n'
    write_task("tiny_choice", "multiple_choice", "{{question}}", "{{answer}}", "acc", choices)
    write_task("tiny_rolling", "loglikelihood_rolling", "", "{{question}}", "bits_per_byte")
    until = 'generation_kwargs:\n  until: ["x"]\n  max_gen_toks: 8\n'
    write_task(
        "tiny_generate", "generate_until", "{{question}}", "{{answer}}", "exact_match", until
    )
    names = ["tiny_choice", "tiny_rolling", "tiny_generate"]
    command = ["eval", "--checkpoint", str(model), "--tokenizer", "bytes", "--tasks", *names]
    assert main([*command, "--include-path", str(tasks), "--json", str(out)]) == 0
    return model, tasks, json.loads(out.read_text())["results"]


def test_multiple_choice(results):
    folder, _, found = results
    loaded = load_model(open_source(ModelOptions(str(folder), tokenizer="bytes")))
    right = 0
    for document in DOCUMENTS:
        question = list(document["question"].encode())
        pairs = [(question, list(choice.encode())) for choice in document["choices"]]
        likelihoods = [result.log_likelihood for result in score(loaded.model, pairs, 2)]
        right += likelihoods.index(max(likelihoods)) == document["answer"]
    assert found["tiny_choice"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))


def test_rolling(results):
    folder, _, found = results
    loaded = load_model(open_source(ModelOptions(str(folder), tokenizer="bytes")))
    model = TaskModel(loaded, batch_size=8, max_seq_len=512)
    texts = [document["question"] for document in DOCUMENTS]
    total = sum(model.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in texts]))
    expected = -total / math.log(2) / sum(map(len, texts))
    assert found["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(expected)


def test_generated_text_is_scored(results):
    assert results[2]["tiny_generate"]["exact_match,none"] == 0  # no text is the answer's number


def test_an_unknown_task_is_refused(results, capsys):
    folder, tasks, _ = results
    with pytest.raises(SystemExit) as caught:
        main(
            ["eval", "--checkpoint", str(folder), "--tokenizer", "bytes", "--tasks", "tiny_choise"]
            + ["--include-path", str(tasks)]
        )
    assert caught.value.code == 2
    assert "Did you mean 'tiny_choice'" in capsys.readouterr().err
