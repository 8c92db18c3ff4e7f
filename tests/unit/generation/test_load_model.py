"""Models and tokenizers are found from what a folder says, and misfits are refused."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import tiny_hf
import tiny_llama
import torch
import torch.nn as nn
import transformers
from harness import train
from own_parts_llama import Letters
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from torchtitan.commands.convert.command import main as convert
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.model_identity import describe_tokenizer
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.errors import BadDocumentError, CheckpointError, ConfigError, TitanError
from torchtitan.generation.load import ModelOptions, _allocate, load_model, open_source
from torchtitan.generation.text import encode_prompt
from torchtitan.models import MODEL_REGISTRY
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.planning.trace import fake_world
from torchtitan.preflight.model_fit import require_vocabulary
from torchtitan.protocols import ModelProtocol


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a short training run."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, *tiny_llama.OPTIONS, "--checkpoint.enable", "--checkpoint.interval=3")
    return folder


@pytest.fixture
def hf_folder(tmp_path):
    folder = tmp_path / "hf"
    tiny_hf.hf_model("llama3").save_pretrained(folder)
    return folder


def write_tokenizer(folder, size: int, eos: str = "w1", **names: str) -> None:
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.post_processor = TemplateProcessing(single="w2 $A", special_tokens=[("w2", 2)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, **names}))


def test_a_run_of_ours(run_folder):
    step = run_folder / "checkpoint" / "step-6"
    for folder in (run_folder, run_folder / "checkpoint", step, f"file://{step}"):
        source = open_source(ModelOptions(str(folder)))
        assert source.folder.name == "step-6"
        assert source.model_name == "tiny_llama"
        assert source.tokenizer.vocab_size == 258
        assert source.stop_tokens == {257}
    model = load_model(source).model
    expected = source.spec.model_cls(source.spec.model_args).load_checkpoint(source.folder)
    for name, param in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), param), name


def test_a_run_whose_documents_began_with_bos(run_folder, tmp_path):
    assert not open_source(ModelOptions(str(run_folder))).add_bos
    folder = tmp_path / "moved"
    shutil.copytree(run_folder / "checkpoint" / "step-6", folder)
    file = folder / "config.resolved.toml"
    file.write_text(file.read_text().replace("add_bos = false", "add_bos = true"))
    assert open_source(ModelOptions(str(folder))).add_bos
    write_tokenizer(tmp_path / "tokenizer", 258)
    without = ModelOptions(str(folder), tokenizer=str(tmp_path / "tokenizer"))
    assert not open_source(without).add_bos  # which names no bos token


@pytest.mark.parametrize("name", tiny_hf.CONFIGS)
def test_a_hugging_face_folder(name, tmp_path):
    hf, ours = tiny_hf.saved(name, tmp_path)
    loaded = load_model(open_source(ModelOptions(str(tmp_path), tokenizer="bytes")))
    assert loaded.source.model_name == name
    assert loaded.source.max_seq_len == hf.config.max_position_embeddings
    state = loaded.model.state_dict()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(state[key], tensor), key
    tokens = torch.randint(tiny_hf.VOCAB_SIZE, (1, 9))
    assert torch.equal(loaded.model(tokens), ours(tokens))


def test_the_weights_have_the_dtype_asked_for(hf_folder):
    options = ModelOptions(str(hf_folder), tokenizer="bytes", dtype="bfloat16")
    model = load_model(open_source(options)).model
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert model.tok_embeddings.weight is model.output.weight  # tied
    assert model(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


def test_the_tokenizer_of_the_folder(hf_folder):
    write_tokenizer(hf_folder, 264)
    (hf_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    source = open_source(ModelOptions(str(hf_folder)))
    assert source.stop_tokens == {1, 5, 6}
    assert encode_prompt(source.tokenizer, "w7", add_special_tokens=True) == [2, 7]
    assert encode_prompt(source.tokenizer, "w7", add_special_tokens=False) == [7]


def test_the_same_weights_are_prompted_alike_before_and_after_they_are_converted(
    hf_folder, tmp_path
):
    write_tokenizer(hf_folder, 264, bos_token="w2")
    assert convert(["from-hf", str(hf_folder), str(tmp_path / "ours")]) == 0
    hf, ours = (open_source(ModelOptions(str(f))) for f in (hf_folder, tmp_path / "ours"))
    assert hf.add_bos and ours.add_bos
    assert hf.stop_tokens == ours.stop_tokens == {1}
    assert hf.max_seq_len == ours.max_seq_len == 512
    # A tokenizer that adds no bos, and one without bos.
    write_tokenizer(hf_folder, 264, bos_token="w3")
    assert not open_source(ModelOptions(str(tmp_path / "ours"))).add_bos
    assert not open_source(ModelOptions(str(hf_folder), tokenizer="bytes")).add_bos


def transformers_stops(folder) -> set[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


@pytest.mark.parametrize(
    ("of_model", "generation"),
    [([7, 10], None), (7, None), ([7, 10], {}), ([7, 10], {"eos_token_id": [7, 8]})],
)
def test_texts_end_where_transformers_ends_them(of_model, generation, hf_folder, tmp_path):
    write_tokenizer(hf_folder, 264)
    config = json.loads((hf_folder / "config.json").read_text()) | {"eos_token_id": of_model}
    (hf_folder / "config.json").write_text(json.dumps(config))
    (hf_folder / "generation_config.json").unlink()
    if generation is not None:
        (hf_folder / "generation_config.json").write_text(json.dumps(generation))
    expected = transformers_stops(hf_folder) | {1}
    assert open_source(ModelOptions(str(hf_folder))).stop_tokens == expected
    assert convert(["from-hf", str(hf_folder), str(tmp_path / "ours")]) == 0
    assert open_source(ModelOptions(str(tmp_path / "ours"))).stop_tokens == expected


def test_a_run_ends_texts_as_the_folder_of_its_tokenizer_says(run_folder, tmp_path):
    write_tokenizer(tmp_path / "chat", 258)
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    folder = tmp_path / "moved"
    shutil.copytree(run_folder / "checkpoint" / "step-6", folder)
    file = folder / "config.resolved.toml"
    path = f'tokenizer_path = "{tmp_path / "chat"}"'
    file.write_text(file.read_text().replace('tokenizer_path = "bytes"', path))
    assert open_source(ModelOptions(str(folder))).stop_tokens == {1, 9}
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": ["1"]}')
    fails(CheckpointError, "generation_config.json: eos_token_id = ['1']", checkpoint=str(folder))


def test_the_tokenizer_of_a_run_is_found_from_anywhere_and_named_if_it_changed(
    run_folder, tmp_path, monkeypatch, caplog
):
    for name in ("own", "elsewhere/own"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tokenizer(tmp_path / name, 258, eos="w1" if name == "own" else "w9")
    folder = tmp_path / "moved"
    shutil.copytree(run_folder / "checkpoint" / "step-6", folder)
    file = folder / "config.resolved.toml"
    file.write_text(file.read_text().replace('"bytes"', '"own"'))
    manifest = Manifest.read(folder)
    manifest.model |= describe_tokenizer(HuggingFaceTokenizer(tmp_path / "own"))
    manifest.write(folder)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_source(ModelOptions(str(folder))).tokenizer.eos_id == 1
    assert "trained with" not in caplog.text
    write_tokenizer(tmp_path / "own", 258, eos="w5")
    open_source(ModelOptions(str(folder)))
    assert f"and this is {tmp_path / 'own'} with other files" in caplog.text


def fails(error: type[TitanError], *words: str, **options: str) -> None:
    with pytest.raises(error) as caught:
        open_source(ModelOptions(**options))
    for word in words:
        assert word in str(caught.value), caught.value


def test_no_such_folder(tmp_path):
    missing = str(tmp_path / "none")
    fails(CheckpointError, "no such folder", missing, checkpoint=missing)
    fails(CheckpointError, "is not a checkpoint", "manifest.json", checkpoint=str(tmp_path))
    (tmp_path / "config.resolved.toml").touch()
    fails(CheckpointError, "saved no checkpoint", "checkpoint.enable", checkpoint=str(tmp_path))


def test_a_url_is_told_not_to_be_read():
    fails(ConfigError, "s3://bucket/run: URLs are not", checkpoint="s3://bucket/run")


def test_unknown_models(run_folder, hf_folder):
    folder = str(run_folder)
    fails(ConfigError, "Did you mean 'llama3'", checkpoint=folder, model="lama3", flavor="x")
    fails(ConfigError, "'debugmodle'", checkpoint=folder, model="llama3", flavor="debugmodle")
    fails(ConfigError, "needs --flavor", "debugmodel", checkpoint=folder, model="llama3")
    fails(ConfigError, "needs --model", checkpoint=folder, flavor="debugmodel")
    config = hf_folder / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"model_type": "lama"}))
    fails(CheckpointError, "'lama'", "Did you mean 'llama'", checkpoint=str(hf_folder))
    config.write_text(json.dumps(fields | {"mlp_bias": True}))
    fails(CheckpointError, "mlp_bias = True", str(hf_folder), checkpoint=str(hf_folder))
    config.write_text("{")
    fails(CheckpointError, "config.json is damaged", checkpoint=str(hf_folder))
    config.unlink()
    fails(CheckpointError, "no config.json: give the model with --model", checkpoint=str(hf_folder))


def test_a_model_that_nobody_registered(run_folder, tmp_path):
    folder = tmp_path / "step-6"
    shutil.copytree(run_folder / "checkpoint" / "step-6", folder)
    manifest = Manifest.read(folder)
    manifest.model["name"] = "of_somebody"
    manifest.write(folder)
    fails(CheckpointError, "'of_somebody'", "--custom-import", checkpoint=str(folder))


def test_a_run_is_exported_with_what_it_imported(run_folder, tmp_path, monkeypatch):
    """`generate` finds the run's `job.custom_import` as `open_source` does."""
    for known in (MODEL_REGISTRY, sys.modules):
        monkeypatch.setitem(known, "tiny_llama", None)
        del known["tiny_llama"]  # and it is back afterwards
    step = tmp_path / "step-6"
    shutil.copytree(run_folder / "checkpoint" / "step-6", step)
    assert convert(["to-hf", str(step), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "config.json").is_file()
    del MODEL_REGISTRY["tiny_llama"]
    config = step / "config.resolved.toml"
    config.write_text(config.read_text().replace('"tiny_llama"', '"gone_llama"'))
    with pytest.raises(ConfigError, match=rf"{config}: job\.custom_import = 'gone_llama': the im"):
        convert(["to-hf", str(step), str(tmp_path / "again")])


def test_a_model_whose_tokens_see_later_ones(hf_folder, monkeypatch):
    model_cls = open_source(ModelOptions(str(hf_folder), tokenizer="bytes")).spec.model_cls
    monkeypatch.setattr(model_cls, "sees_later_tokens", True)
    with pytest.raises(
        ConfigError, match=r"llama3 is not a causal model \(Llama3Model.sees_later_tokens"
    ):
        open_source(ModelOptions(str(hf_folder), tokenizer="bytes"))


def test_a_model_that_needs_more_than_tokens(hf_folder, monkeypatch):
    model_cls = open_source(ModelOptions(str(hf_folder), tokenizer="bytes")).spec.model_cls
    monkeypatch.setattr(model_cls, "forward", lambda self, tokens, positions, *, text, more=0: None)
    with pytest.raises(ConfigError, match=r"llama3: Llama3Model\.forward needs text, which gen"):
        open_source(ModelOptions(str(hf_folder), tokenizer="bytes"))


def test_tokenizers_that_do_not_fit(hf_folder, tmp_path):
    fails(ConfigError, "no tokenizer.json", "--tokenizer bytes", checkpoint=str(hf_folder))
    fails(ConfigError, "tokenizer.json", checkpoint=str(hf_folder), tokenizer=str(tmp_path / "no"))
    write_tokenizer(tmp_path / "large", 300)
    large = str(tmp_path / "large")
    fails(ConfigError, f"{large} has 300 tokens", checkpoint=str(hf_folder), tokenizer=large)


def test_an_own_tokenizer_that_does_not_fit_is_told_by_its_class():
    found = "the tokenizer Letters has 40 tokens, but the vocabulary of the model mine has only 8"
    with pytest.raises(ConfigError, match=found):
        require_vocabulary(Letters(), SimpleNamespace(vocab_size=8), "mine")


def test_a_special_token_that_other_models_of_the_family_have(hf_folder, caplog):
    write_tokenizer(hf_folder, 264)
    tokenizer = Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(hf_folder / "tokenizer.json"))
    source = open_source(ModelOptions(str(hf_folder)))
    assert "whose vocabulary is 264: <image>." in caplog.text
    assert encode_prompt(source.tokenizer, "w7", add_special_tokens=True) == [2, 7]
    with pytest.raises(BadDocumentError, match="'<image>'"):
        encode_prompt(source.tokenizer, "w7<image>", add_special_tokens=True)


def test_a_degree_that_does_not_fit_the_processes(hf_folder):
    options = ModelOptions(str(hf_folder), tokenizer="bytes", tensor_parallel_degree=3)
    with pytest.raises(ConfigError, match="--tensor-parallel-degree 3 must divide"):
        open_source(options)


def test_a_converted_model_of_no_flavor_is_found_by_its_args(hf_folder, tmp_path):
    assert convert(["from-hf", str(hf_folder), str(tmp_path / "ours")]) == 0
    source = open_source(ModelOptions(str(tmp_path / "ours"), tokenizer="bytes"))
    expected = open_source(ModelOptions(str(hf_folder), tokenizer="bytes"))
    assert source.model_name == "llama3"
    model, original = (load_model(s).model.state_dict() for s in (source, expected))
    torch.testing.assert_close(model, original, rtol=0, atol=0)


def test_a_converted_model_brings_its_tokenizer(hf_folder, tmp_path):
    write_tokenizer(hf_folder, 200)
    assert convert(["from-hf", str(hf_folder), str(tmp_path / "ours")]) == 0
    source = open_source(ModelOptions(str(tmp_path / "ours")))
    assert source.tokenizer.vocab_size == 200


def test_a_converted_model_within_the_folder_of_a_run_is_not_of_that_run(
    run_folder, hf_folder, tmp_path
):
    write_tokenizer(hf_folder, 200)
    (tmp_path / "run").mkdir()
    shutil.copy(run_folder / "config.resolved.toml", tmp_path / "run")
    assert convert(["from-hf", str(hf_folder), str(tmp_path / "run" / "ours")]) == 0
    source = open_source(ModelOptions(str(tmp_path / "run" / "ours")))
    assert not source.of_run
    assert source.tokenizer.vocab_size == 200
    assert source.max_seq_len == 512


def test_a_checkpoint_moved_out_of_its_run_knows_its_config(run_folder, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(run_folder / "checkpoint" / "step-6", folder)
    source = open_source(ModelOptions(str(folder)))
    assert source.job_config.training.steps == 6
    assert source.tokenizer.vocab_size == 258


def test_what_only_training_adds_to_the_loss_is_left_out(run_folder, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(run_folder / "checkpoint" / "step-6", folder)
    config = (folder / "config.resolved.toml").read_text()
    assert "z_loss_weight = 0.0" in config
    text = config.replace("z_loss_weight = 0.0", "z_loss_weight = 0.5")
    (folder / "config.resolved.toml").write_text(text)
    source = open_source(ModelOptions(str(folder)))
    assert source.job_config.loss.z_loss_weight == 0.0


class Projected(Llama3Model):
    """With a random matrix that no checkpoint needs to hold, as it is the same each time."""

    def __init__(self, args):
        super().__init__(args)
        self.register_buffer("projection", torch.empty(8, 8), persistent=False)

    def init_weights(self):
        super().init_weights()
        self.projection.normal_(generator=torch.Generator().manual_seed(1))


def test_what_no_checkpoint_holds_is_drawn(run_folder):
    source = open_source(ModelOptions(str(run_folder)))
    source.spec.model_cls = Projected
    drawn = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(load_model(source).model.projection, drawn)


class Padded(ModelProtocol):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3, padding_idx=1)

    def init_weights(self) -> None:
        nn.init.sparse_(self.table.weight, sparsity=0.5)
        self.table.weight.tril_()


def test_no_initialiser_of_sharded_weights_runs_before_they_are_read():
    with torch.device("meta"):
        model = Padded()
    with fake_world(2, rank=0):
        weight = model.table.weight.detach()
        weight = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(0)])
        model.table.weight = nn.Parameter(weight)
        _allocate(model, torch.device("cpu"))
        assert model.table.weight.to_local().shape == (2, 3)
