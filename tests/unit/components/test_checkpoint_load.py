"""Model weights from our checkpoints and from Hugging Face folders."""

import itertools
import json
import re
import weakref
from dataclasses import dataclass, replace
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from checkpoint_run import Run, TinyArgs, TinyModel, world_of_one  # noqa: F401
from safetensors.torch import save_file
from tiny_models import TINY, tiny_model
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from torchtitan.components.checkpoint.converted import adapter_of
from torchtitan.components.checkpoint.load import load_model_weights
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.model_identity import warn_of_initial_weights
from torchtitan.components.checkpoint.reader import (
    SafetensorsReader,
    check_keys_and_shapes,
    read_safetensors_metadata,
    read_whole,
)
from torchtitan.components.checkpoint.tokenizer_files import write_bytes_tokenizer
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.errors import CheckpointError
from torchtitan.protocols import BaseStateDictAdapter, TrainSpec, register_train_spec
from torchtitan.protocols.train_spec import MODEL_REGISTRY


class TinyAdapter(BaseStateDictAdapter):
    """Hugging Face's side has other names, and the matrices of the layers transposed."""

    def to_hf(self, state_dict):
        return {f"model.{key}": self._transposed(key, value) for key, value in state_dict.items()}

    def from_hf(self, state_dict):
        return {
            key.removeprefix("model."): self._transposed(key, value)
            for key, value in state_dict.items()
            if not key.endswith("inv_freq")
        }

    def _transposed(self, key, value):
        return value.t() if "layers." in key and value.ndim == 2 else value


MODEL_CONFIGS = {"tiny": TinyArgs()}


def get_train_spec(flavor):
    return TrainSpec(
        model_cls=TinyModel,
        model_args=MODEL_CONFIGS[flavor],
        parallelize_fn=lambda model, *_: model,
        pipeline_fn=None,
        build_optimizer_fn=None,
        build_lr_scheduler_fn=None,
        build_dataloader_fn=None,
        build_tokenizer_fn=None,
        build_loss_fn=None,
        state_dict_adapter=TinyAdapter,
    )


@pytest.fixture
def registered():
    register_train_spec("tiny_with_adapter", get_train_spec)
    yield
    del MODEL_REGISTRY["tiny_with_adapter"]


@pytest.fixture
def source(registered):
    """The model whose weights are saved."""
    torch.manual_seed(7)
    return TinyModel(TinyArgs())


def hf_state(model, drop=()):
    state = TinyAdapter(model.args).to_hf(model.state_dict())
    return {key: value.contiguous() for key, value in state.items() if key not in drop}


def save_shards(state, folder):
    """Two files and an index, as `save_pretrained` writes a large model."""
    keys = sorted(state)
    shards = {"model-1.safetensors": keys[:3], "model-2.safetensors": keys[3:]}
    for name, names in shards.items():
        save_file({key: state[key] for key in names}, folder / name)
    weight_map = {key: name for name, names in shards.items() for key in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same_weights(model, source):
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_loads_a_checkpoint_of_ours(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    model = TinyModel(TinyArgs())
    assert model.load_checkpoint(tmp_path / "checkpoint" / "step-2") is model
    assert_same_weights(model, run.model)


def test_buffers_that_no_checkpoint_holds_are_set(source, tmp_path):
    class Model(TinyModel):
        def __init__(self, args):
            super().__init__(args)
            self.register_buffer("angles", torch.full((2,), torch.nan), persistent=False)

        def init_weights(self):
            super().init_weights()
            self.angles.fill_(3)
            self.load_checkpoint(tmp_path)  # as of pretrained weights

    save_file(hf_state(source), tmp_path / "model.safetensors")
    model = Model(TinyArgs()).load_checkpoint(tmp_path)
    assert model.angles.tolist() == [3, 3]
    assert_same_weights(model, source)
    assert model.init_weights.__func__ is Model.init_weights


@dataclass
class WiderArgs(TinyArgs):
    window: int = 8


def test_weights_of_another_model_of_the_same_shapes_are_not_loaded_in_silence(tmp_path, caplog):
    Run(tmp_path).train(2)
    folder = tmp_path / "checkpoint" / "step-2"
    TinyModel(TinyArgs()).load_checkpoint(folder)
    assert "another model" not in caplog.text
    TinyModel(WiderArgs()).load_checkpoint(folder)
    assert "step-2 was saved from another model: window = None (now 8)" in caplog.text


def test_the_initial_weights_of_another_tokenizer_are_named(tmp_path, caplog):
    Run(tmp_path).train(2)
    write_bytes_tokenizer(tmp_path)
    config = JobConfig()
    config.checkpoint.initial_load_path = str(tmp_path / "checkpoint" / "step-2")
    warn_of_initial_weights(config, None)
    assert "trained with" not in caplog.text
    warn_of_initial_weights(config, HuggingFaceTokenizer(tmp_path))
    assert f"and this run uses {tmp_path}" in caplog.text


def test_the_folder_of_a_run_is_told_from_a_damaged_checkpoint(tmp_path):
    Run(tmp_path).train(4)
    for folder in (tmp_path, tmp_path / "checkpoint"):
        with pytest.raises(CheckpointError, match=r"is the folder of a run.*checkpoint/step-4$"):
            Manifest.read(folder)


def test_loads_one_safetensors_file(source, tmp_path):
    save_file(hf_state(source), tmp_path / "model.safetensors")
    assert_same_weights(TinyModel(TinyArgs()).load_checkpoint(tmp_path), source)
    weight_map = dict.fromkeys(hf_state(source), "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"  # which names the same file
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same_weights(TinyModel(TinyArgs()).load_checkpoint(tmp_path), source)


def test_loads_safetensors_shards(source, tmp_path):
    save_shards(hf_state(source), tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "consolidated.safetensors")  # not in the index
    assert_same_weights(TinyModel(TinyArgs()).load_checkpoint(str(tmp_path)), source)


class OtherAdapter(TinyAdapter):
    """Of a model that reuses the class."""


class DerivedModel(TinyModel):
    pass


class DerivedAdapter(TinyAdapter):
    pass


def test_of_several_adapters_the_closest_is_taken(registered, monkeypatch, tmp_path):
    model, derived = TinyModel(TinyArgs()), DerivedModel(TinyArgs())
    assert type(adapter_of(derived, tmp_path)) is TinyAdapter

    def later(flavor):  # it tells no flavors, since its module's are of another factory
        return replace(get_train_spec("tiny"), state_dict_adapter=OtherAdapter)

    def of_derived(flavor):
        spec = get_train_spec("tiny")
        return replace(spec, model_cls=DerivedModel, state_dict_adapter=DerivedAdapter)

    monkeypatch.setitem(MODEL_REGISTRY, "of_derived", of_derived)
    monkeypatch.setitem(MODEL_REGISTRY, "later", later)
    assert type(adapter_of(model, tmp_path)) is OtherAdapter
    assert type(adapter_of(derived, tmp_path)) is DerivedAdapter
    # A job's model has that of its own TrainSpec.
    for spec in (get_train_spec("tiny"), later("")):
        assert type(adapter_of(spec.meta_model(), tmp_path)) is spec.state_dict_adapter


def test_converts_the_dtype(source, tmp_path):
    state = {key: value.bfloat16() for key, value in hf_state(source).items()}
    save_file(state, tmp_path / "model.safetensors")
    model = TinyModel(TinyArgs()).load_checkpoint(tmp_path)
    assert model.output.weight.dtype == torch.float32
    assert torch.equal(model.output.weight, source.output.weight.bfloat16().float())


def test_allocates_a_model_on_the_meta_device(source, tmp_path):
    save_file(hf_state(source), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = TinyModel(TinyArgs())
    model.load_checkpoint(tmp_path)
    assert_same_weights(model, source)
    assert torch.equal(model.scale, torch.ones(4))  # a buffer that no file holds


@pytest.mark.parametrize("written_twice", [False, True])
def test_tied_weights_need_to_be_in_the_file_only_once(registered, tmp_path, written_twice):
    torch.manual_seed(7)
    source = TinyModel(TinyArgs(tied=True))
    state = hf_state(source, drop=() if written_twice else {"model.output.weight"})
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "model.safetensors")
    model = TinyModel(TinyArgs(tied=True)).load_checkpoint(tmp_path)
    assert_same_weights(model, source)
    assert model.output.weight is model.tok_embeddings.weight


def test_the_adapter_is_found_within_the_wrapper_of_the_compiler(source, tmp_path):
    """That of `compile.scope = "model"`."""
    save_file(hf_state(source), tmp_path / "model.safetensors")
    model = TinyModel(TinyArgs())
    load_model_weights(torch.compile(model, backend="eager"), tmp_path)
    assert_same_weights(model, source)


def test_the_adapter_may_pass_over_a_key(source, tmp_path):
    state = hf_state(source) | {"model.layers.0.rotary.inv_freq": torch.ones(2)}
    save_file(state, tmp_path / "model.safetensors")
    assert_same_weights(TinyModel(TinyArgs()).load_checkpoint(tmp_path), source)


def test_a_missing_key_is_named(source, tmp_path):
    save_file(hf_state(source, drop={"model.output.weight"}), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{tmp_path} lacks model\.output\.weight$"):
        TinyModel(TinyArgs()).load_checkpoint(tmp_path)


def test_an_unexpected_key_is_named(source, tmp_path):
    save_file(hf_state(source) | {"model.bias": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has model\.bias, which this run does not use"):
        TinyModel(TinyArgs()).load_checkpoint(tmp_path)


def test_many_wrong_shapes_are_counted_and_the_first_few_named(source, tmp_path):
    save_shards(hf_state(source), tmp_path)
    message = (
        r"layers\.0\.weight \(saved \[4, 4\] in model-1\.safetensors, needed \[8, 8\]\).* and 3 "
    )
    with pytest.raises(CheckpointError, match=message):
        TinyModel(TinyArgs(dim=8)).load_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_safetensors_file_is_named(source, tmp_path, keep):
    save_shards(hf_state(source), tmp_path)
    shard = tmp_path / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{shard} is damaged"):
        TinyModel(TinyArgs()).load_checkpoint(tmp_path)


def test_a_missing_shard_is_named(source, tmp_path):
    save_shards(hf_state(source), tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is missing"):
        TinyModel(TinyArgs()).load_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", '{"weight_map": {"a', "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(source, tmp_path, text):
    save_shards(hf_state(source), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(index))} is damaged"):
        TinyModel(TinyArgs()).load_checkpoint(tmp_path)


def test_a_model_without_an_adapter_says_so(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"TrainSpec of TinyModel has a state_dict_adapter"):
        TinyModel(TinyArgs()).load_checkpoint(tmp_path)


def test_a_folder_that_is_no_checkpoint_says_what_one_is(tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"neither .*manifest\.json.*upstream's see docs/.*nor model\.safetensors",
    ):
        TinyModel(TinyArgs()).load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        TinyModel(TinyArgs()).load_checkpoint(tmp_path / "nowhere")
    Run(tmp_path).train(2)
    with pytest.raises(CheckpointError, match=r"Give one of its checkpoints: .*step-2$"):
        TinyModel(TinyArgs()).load_checkpoint(tmp_path / "checkpoint")


def balanced(tmp_path, **moe):
    """A run of a model whose experts are balanced so."""
    first = TINY["qwen3, experts"].moe
    model = tiny_model("qwen3, experts", moe=replace(first, **{"aux_loss_weight": 0.0} | moe))
    return Run(tmp_path, model=model)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ({}, {"aux_loss_weight": 0.01}),
        ({"aux_loss_weight": 0.01}, {}),
        ({}, {"z_loss_weight": 0.01}),
        ({}, {"use_bias": True}),
        ({"aux_loss_weight": 0.01}, {"use_bias": True}),
    ],
)
def test_weights_start_a_run_whose_experts_are_balanced_in_another_way(tmp_path, was, now):
    first = balanced(tmp_path, **was)
    first.train(2)
    model = balanced(tmp_path / "now", **now).model
    torch.nn.init.zeros_(model.output.weight)
    model.load_checkpoint(tmp_path / "checkpoint" / "step-2")
    for name, param in first.model.named_parameters():
        assert torch.equal(model.get_parameter(name), param), name
    # To go on with a run is another thing.
    with pytest.raises(CheckpointError, match=r"router.*saved from another model: moe\."):
        balanced(tmp_path, **now).manager.load()


def test_a_bias_by_which_experts_were_chosen_is_not_lost(tmp_path):
    balanced(tmp_path, use_bias=True).train(2)
    with pytest.raises(CheckpointError, match=r"selection_bias, which this run does not use"):
        balanced(tmp_path / "now").model.load_checkpoint(tmp_path / "checkpoint" / "step-2")
    model = balanced(tmp_path / "now", use_bias=True).model
    model.load_checkpoint(tmp_path / "checkpoint" / "step-2")


def test_experts_are_put_together_a_layer_at_a_time(tmp_path, monkeypatch):
    """Of all layers at once, the new memory would be as large as the model."""
    from torchtitan.models.common.expert_state_dict import ExpertsAdapter

    first = tiny_model("qwen3, experts")
    save_file(
        {k: v.clone() for k, v in adapter_of(first, tmp_path).to_hf(first.state_dict()).items()},
        tmp_path / "model.safetensors",
    )
    held, join = [], ExpertsAdapter._join

    def joined(self, key, matrices):
        whole = join(self, key, matrices)
        if whole.is_meta:  # which takes no memory
            return whole
        held.append((key.split(".")[1], weakref.ref(whole)))
        assert len({layer for layer, ref in held if ref() is not None}) == 1
        return whole

    monkeypatch.setattr(ExpertsAdapter, "_join", joined)
    model = tiny_model("qwen3, experts").requires_grad_(False)
    for param in model.parameters():
        param.zero_()
    model.load_checkpoint(tmp_path)
    assert {layer for layer, _ in held} == {"0", "1"}
    torch.testing.assert_close(model.state_dict(), first.state_dict())


def test_a_tensor_is_put_together_from_its_shards(tmp_path):
    whole, contents, places, chunks = torch.arange(12.0).view(3, 4), b"", {}, []
    for rows, columns in itertools.product([(0, 2), (2, 3)], [(0, 1), (1, 4)]):
        part, file = whole[slice(*rows), slice(*columns)].clone(), BytesIO()
        torch.save(part, file)
        begin = torch.Size([rows[0], columns[0]])
        chunks.append(ChunkStorageMetadata(begin, part.shape))
        length = len(file.getvalue())
        places[MetadataIndex("w", begin)] = _StorageInfo("__0_0.distcp", len(contents), length)
        contents += file.getvalue()
    (tmp_path / "__0_0.distcp").write_bytes(contents)
    properties = TensorProperties(dtype=whole.dtype)
    entry = TensorStorageMetadata(properties, whole.shape, chunks)
    read = read_whole(tmp_path, Metadata({"w": entry}, storage_data=places), ["w"])
    torch.testing.assert_close(read["w"], whole, rtol=0, atol=0)


def test_a_tensor_that_was_saved_transposed_is_refused(tmp_path):
    entry = TensorStorageMetadata(TensorProperties(), torch.Size([3, 4]), [])
    place = _StorageInfo("__0_0.distcp", 0, 48)
    metadata = Metadata({"w": entry}, storage_data={MetadataIndex("w"): place})
    needed = r"w \(saved \[3, 4\] in __0_0\.distcp, needed \[4, 3\]\)"
    with pytest.raises(CheckpointError, match=needed):
        check_keys_and_shapes(tmp_path, metadata, {"w": torch.zeros(4, 3)})


def test_of_a_safetensors_file_a_rank_reads_its_own_slice(tmp_path):
    whole, target = torch.arange(20.0).view(4, 5), torch.empty(2, 3)
    save_file({"w": whole}, tmp_path / "model.safetensors")
    index = MetadataIndex("w", torch.Size([0, 0]))
    start, lengths = torch.Size([1, 2]), torch.Size([2, 3])
    item = ReadItem(LoadItemType.TENSOR, index, index.offset, index, start, lengths)
    planner = SimpleNamespace(resolve_tensor=lambda item: target, commit_tensor=lambda *of: None)
    reader = SafetensorsReader(tmp_path, read_safetensors_metadata(tmp_path))
    reader.read_file("model.safetensors", LoadPlan([item]), planner)
    assert torch.equal(target, whole[1:3, 2:])
