"""Architectures of the library transformers, against the library itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Shard

import torchtitan
from torchtitan.config import JobConfig
from torchtitan.distributed.init import initialize_weights
from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.models.from_hf import train_spec_of_hf_folder
from torchtitan.models.transformers import (
    TransformersArgs,
    TransformersModel,
    TransformersStateDictAdapter,
    configs,
)
from torchtitan.models.transformers.infra import parallelize
from torchtitan.models.transformers.model import smaller
from torchtitan.protocols.train_spec import get_train_spec

README = Path(torchtitan.__file__).parent / "models" / "transformers" / "README.md"

TRAINED = {
    "apertus": {},
    "ernie4_5": {},
    "exaone": {},
    "exaone4": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "glm4": {},
    "gpt_neox": {},
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 8},
    "nemotron": {"num_key_value_heads": 4},
    "olmo3": {"sliding_window": 8},
    "phi": {},
    "phi3": {},
    "qwen3": {},
    "smollm3": {},
    "starcoder2": {"use_bias": True, "sliding_window": None},
}
"""Type -> fields of `config.json` that are not the default."""


def config_of(kind: str, **fields: Any) -> dict[str, Any]:
    full = transformers.AutoConfig.for_model(kind, **fields).to_diff_dict()
    return smaller(full) | {"model_type": kind} | fields


def model_of(config: dict[str, Any]) -> TransformersModel:
    with torch.device("meta"):
        model = TransformersModel(TransformersArgs(config=config))
    initialize_weights(model, 0, torch.device("cpu"))
    return model.eval()


def reference_of(config: dict[str, Any], files: dict[str, torch.Tensor], folder: Path) -> Any:
    """The library's model of a folder with these weights."""
    save_file(files, folder_of(config, folder) / "model.safetensors", {"format": "pt"})
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    return model.eval()


def tokens(batch: int, seq: int) -> torch.Tensor:
    return torch.randint(264, (batch, seq), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("kind", TRAINED)
def test_logits_are_those_of_transformers(kind, tmp_path):
    config = config_of(kind, **TRAINED[kind])
    model = model_of(config)
    adapter = TransformersStateDictAdapter(model.args)
    files = adapter.to_hf(model.state_dict())
    assert all(torch.equal(adapter.from_hf(files)[n], t) for n, t in model.state_dict().items())
    reference = reference_of(model.args.to_hf_config(), files, tmp_path)
    reference.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs/model.safetensors").keys() == files.keys()
    text = tokens(2, 40)
    torch.testing.assert_close(model(text), reference(text).logits, atol=1e-5, rtol=1e-5)


def test_tensors_that_only_older_files_have_are_left_out():
    adapter = TransformersStateDictAdapter(TransformersArgs(config=config_of("gpt_neox")))
    names = ("bias", "masked_bias", "rotary_emb.inv_freq", "dense.bias")
    files = {f"gpt_neox.layers.0.attention.{name}": torch.zeros(1) for name in names}
    assert adapter.from_hf(files).keys() == {"layers.0.attention.dense.bias"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma3_text", "mistral", "qwen3"])
def test_packed_documents_are_as_if_alone(kind):
    model, lengths = model_of(config_of(kind, **TRAINED[kind])), [7, 20, 5]
    text = tokens(2, sum(lengths))
    document_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    packed = model(text, positions, document_ids)
    alone = torch.cat([model(part) for part in text.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma3_text", "smollm3"])  # whose layers differ
def test_stages_made_by_deleting_parts_equal_the_whole(kind):
    model = model_of(config_of(kind, tie_word_embeddings=False))
    text, positions = tokens(2, 40), torch.arange(40)[None]
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    for number in "123":
        del first.layers[number]
    del last.layers["0"]
    first.norm = first.output = last.tok_embeddings = None
    torch.testing.assert_close(last(first(text, positions), positions), model(text))


REFUSED = {
    "bert": "has embeddings beside its layers",
    "cohere2": "computes after its output layer",
    "granite": "computes between its embedding, layers and norm",
    "falcon": "has attention of its own",
    "gemma3": "has several parts .text_config, vision_config.",
    "gpt2": "is not an embedding, a list of layers, a norm and an output layer",
    "mamba": "has no single num_attention_heads",
    "minicpm3": "computes between its norm and its output layer",
    "mixtral": "has 0.mlp.experts.gate_up_proj in its layers: experts or a convolution",
    "diffllama": "attends several times in a layer",
    "olmo_hybrid": "has 0.linear_attn.conv1d.weight in its layers: experts or a convolution",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_we_cannot_train_is_refused(kind, tmp_path):
    config = transformers.AutoConfig.for_model(kind, num_hidden_layers=4).to_diff_dict()
    args = TransformersArgs(path=str(folder_of(config, tmp_path)))
    with pytest.raises(CheckpointError, match=REFUSED[kind]) as refused, torch.device("meta"):
        TransformersModel(args.update_from_config(JobConfig()))
    assert "torchtitan new NAME --from-hf FOLDER" in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"hidden_size": "many"}, "transformers refuses it"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type = 'su'"),
        ({"attention_dropout": 0.1}, "Set to 0: attention_dropout = 0.1"),
        ({"model_type": "phi", "embd_pdrop": 0.1}, "Set to 0: embd_pdrop = 0.1"),
        ({"model_type": "stablelm", "hidden_dropout": 0.2}, "Set to 0: hidden_dropout = 0.2"),
        ({"model_type": "starcoder2", "residual_dropout": 0.1}, "0: residual_dropout = 0.1"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "sees later ones"),
    ],
)
def test_fields_that_we_cannot_train_with_are_refused(fields, problem):
    config = {"model_type": "llama", "num_hidden_layers": 2} | fields
    with pytest.raises(CheckpointError, match=problem), torch.device("meta"):
        TransformersModel(TransformersArgs(config=config))


LONGROPE = {
    "hidden_size": 3072,
    "num_attention_heads": 32,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + n / 48 for n in range(48)],
        "long_factor": [1.0 + n for n in range(48)],
    },
}
"""As Phi-3-mini-128k, whose original length is 4096."""


@torch.no_grad()
def test_longrope_rotates_as_transformers_does_at_the_length_of_the_job(tmp_path):
    config = smaller({"model_type": "phi3", **LONGROPE})
    job = JobConfig()
    for length in (40, 16, 17):
        job.training.seq_len = length
        args = TransformersArgs(config=config).update_from_config(job)
        assert args.max_seq_len == (None if length > 16 else 16)
        with torch.device("meta"):
            model = TransformersModel(args)
        initialize_weights(model, 0, torch.device("cpu"))
        files = TransformersStateDictAdapter(args).to_hf(model.state_dict())
        reference = reference_of(args.to_hf_config(), files, tmp_path)
        text = tokens(2, length)
        torch.testing.assert_close(model(text), reference(text).logits, atol=1e-5, rtol=1e-5)
        # Each rank of context parallelism has a part of the positions, and documents begin at 0.
        part = text[:, :8], torch.arange(8)[None]
        torch.testing.assert_close(model(*part), model(text)[:, :8], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("training", "validation"), [(16, 17), (17, 16)])
def test_longrope_needs_validation_on_the_same_side(training, validation):
    job = JobConfig()
    job.training.seq_len, job.validation.seq_len = training, validation
    args = TransformersArgs(config=smaller({"model_type": "phi3", **LONGROPE}))
    args.update_from_config(job)
    job.validation.enable = True
    with pytest.raises(ConfigError, match=r"validation.seq_len.* up to 16 tokens otherwise"):
        args.update_from_config(job)


def test_weights_of_split_layers_that_no_plan_splits_are_refused():
    with torch.device("meta"):
        model = TransformersModel(TransformersArgs(config=config_of("phi", qk_layernorm=True)))
    with pytest.raises(ConfigError, match=r"plan lacks self_attn.k_layernorm. Set it to 1"):
        parallelize.apply_tp(model, None, JobConfig())


def test_each_rank_applies_an_activation_with_weights_to_its_features(monkeypatch):
    plans = []
    monkeypatch.setattr(parallelize, "apply_tensor_parallel", lambda *args: plans.append(args[-1]))
    with torch.device("meta"):
        model = TransformersModel(TransformersArgs(config=config_of("apertus")))
    parallelize.apply_tp(model, None, JobConfig())
    assert plans[0]["mlp.act_fn"].sequence_sharding == (Shard(2),)


def test_flops_where_heads_differ_by_layer():
    config = config_of("llama") | {"model_type": "gemma4_unified_text"}
    config |= {
        "layer_types": [*["sliding_attention"] * 3, "full_attention"],
        "per_layer_config": {},
    }
    del config["rope_parameters"]
    wide = config | {"per_layer_config": {"3": {"head_dim": 32}}}
    flops, more = (TransformersArgs(config=c).get_nparams_and_flops(64)[1] for c in (config, wide))
    queries, matrices = 8 * 16, 128 * (8 + 2 * 8 + 8) * 16  # that the last layer has more
    assert more - flops == 12 * 64 * queries + 6 * matrices


def folder_of(config: dict[str, Any], folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "name"),
    [({"model_type": "olmo2"}, "transformers"), (config_of("qwen3", use_cache=False), "qwen3")],
)
def test_a_folder_that_no_other_model_reads(config, name, tmp_path):
    assert train_spec_of_hf_folder(folder_of(config, tmp_path))[0] == name


def test_a_folder_that_the_model_of_its_architecture_refuses(tmp_path):
    config = config_of("qwen3", attention_bias=True)
    with pytest.raises(CheckpointError, match="attention_bias = True is not supported"):
        train_spec_of_hf_folder(folder_of(config, tmp_path))


def test_flavors_of_a_folder(tmp_path):
    config = transformers.AutoConfig.for_model("olmo3").to_diff_dict()
    flavors = configs(folder_of(config, tmp_path))
    full, small = (flavors[name].hf_config() for name in ("full", "debugmodel"))
    assert (full.hidden_size, full.num_hidden_layers, full.vocab_size) == (4096, 32, 50304)
    assert (small.hidden_size, small.num_hidden_layers, small.vocab_size) == (128, 4, 264)
    assert small.layer_types == full.layer_types[-4:]
    nparams, _ = flavors["debugmodel"].get_nparams_and_flops(64)
    model = model_of(flavors["debugmodel"].config)
    assert nparams == sum(param.numel() for param in model.parameters())


def test_the_readmes_model_of_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "assets" / "OLMo-2-0425-1B"
    folder.mkdir(parents=True)
    folder_of(transformers.AutoConfig.for_model("olmo2").to_diff_dict(), folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchtitan.protocols.train_spec.MODEL_REGISTRY", {})
    code = README.read_text().partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "olmo2.py", "exec"), {"__name__": "olmo2"})
    config = get_train_spec("olmo2", "debugmodel").model_args.hf_config()
    assert (config.model_type, config.num_hidden_layers) == ("olmo2", 4)
