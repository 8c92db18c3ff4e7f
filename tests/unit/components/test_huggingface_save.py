"""Models saved as Hugging Face folders open in `transformers`, and compute the same there."""

import dataclasses
import gc
import json
import logging
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from checkpoint_run import world_of_one  # noqa: F401
from safetensors.torch import load_file
from tiny_models import TINY, tiny_spec
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from torchtitan.commands.convert.from_hf import convert_from_hf
from torchtitan.commands.convert.to_hf import convert_to_hf
from torchtitan.components.checkpoint import huggingface_save, safetensors_files
from torchtitan.components.checkpoint.huggingface import (
    ExportAssets,
    check_exchange,
    export_config,
)
from torchtitan.components.checkpoint.huggingface_save import (
    check_export,
    plan_tensors,
    save_huggingface,
    share_out,
)
from torchtitan.components.checkpoint.load import load_weights_of_parts
from torchtitan.components.checkpoint.model_identity import warn_of_initial_weights
from torchtitan.components.checkpoint.tokenizer_files import write_bytes_tokenizer
from torchtitan.components.tokenizer import BytesTokenizer, HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.distributed.init import initialize_weights
from torchtitan.errors import CheckpointError
from torchtitan.models import MODEL_REGISTRY
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs
from torchtitan.models.which_model import model_of_hf_folder
from torchtitan.protocols.train_spec import model_flavors

pytestmark = pytest.mark.usefixtures("world_of_one")

ASSETS = ExportAssets("bytes", max_seq_len=128)
TEXT = "Zero-bubble schedules: ∂L/∂w comes later.\n\tEnd."


def build(name, seed=0):
    spec = tiny_spec(name)
    model = spec.model_cls(spec.model_args)
    initialize_weights(model, seed, torch.device("cpu"))
    for parameter in model.parameters():
        if parameter.ndim > 1:  # far from zero, so that a difference would show
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def save(model, folder, dtype=torch.float32):
    save_huggingface([model], folder, dtype, ASSETS, dist.group.WORLD)


@pytest.mark.parametrize("name", TINY)
def test_transformers_opens_the_folder_and_computes_the_same_logits(tmp_path, name):
    model, folder = build(name), tmp_path / "out"
    save(model, folder)
    theirs, found = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(found.values()), found
    assert theirs.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    assert ids[0].tolist() == BytesTokenizer().encode(TEXT)
    assert tokenizer.decode(ids[0]) == TEXT
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs.eval()(ids).logits, atol=1e-4, rtol=1e-4)


def test_what_layers_share_is_written_for_each_of_them(tmp_path):
    """As Hugging Face's model does not share it."""
    model, folder = build("llama3, tied"), tmp_path / "out"
    for layer in model.layers.values():
        layer.feed_forward = model.layers["0"].feed_forward
    save(model, folder)
    theirs, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs.eval()(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_config_json_travels_through_transformers_and_back(name, tmp_path):
    args = TINY[name]
    config = export_config(args) | {"max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.architectures == config["architectures"]
    theirs.save_pretrained(tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    for fields in (config, back):
        assert type(args).from_hf_config(fields).to_hf_config() == args.to_hf_config()


OURS = [n for n, make in MODEL_REGISTRY.items() if make.__module__.startswith("torchtitan.")]
"""Not what other tests have registered."""


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_flavor_can_be_exported(name):
    flavors = model_flavors(name)
    assert flavors
    for flavor in flavors:
        args = MODEL_REGISTRY[name](flavor).model_args
        back = type(args).from_hf_config(export_config(args))
        for field in {"text_len", "mtp_depth"} & vars(args).keys():  # the file does not say
            back = dataclasses.replace(back, **{field: getattr(args, field)})
        assert back.get_nparams_and_flops(4096) == args.get_nparams_and_flops(4096), flavor


def test_a_tensor_that_the_adapter_does_not_know_is_refused_before_training():
    model, config = build("llama3"), JobConfig()
    model.scale = torch.nn.Parameter(torch.ones(1))
    check_export(model, config)
    config.checkpoint.last_save_in_hf = True
    with pytest.raises(CheckpointError, match=r"last_save_in_hf = true: .*'scale' is not one of "):
        check_export(model, config)


def test_what_hugging_face_cannot_express_is_refused():
    moe = MoEArgs(num_experts=4, top_k=2, hidden_dim=32, num_shared_experts=1)
    with pytest.raises(CheckpointError, match=r"Qwen3MoeForCausalLM.*moe\.num_shared_experts"):
        export_config(Qwen3ModelArgs(moe=moe))
    config = JobConfig()
    config.checkpoint.last_save_in_hf = True
    spec = MODEL_REGISTRY["qwen3"]("debugmodel_moe")
    with pytest.raises(CheckpointError, match=r"^checkpoint\.last_save_in_hf = true: Hugging Face"):
        check_exchange(config, spec, Qwen3ModelArgs(moe=moe))


@pytest.mark.parametrize("name", sorted(name for name in TINY if TINY[name].num_experts))
def test_a_bias_that_the_router_would_lose_is_refused(name):
    args = TINY[name]
    biased = dataclasses.replace(args, moe=dataclasses.replace(args.moe, use_bias=True))
    if name == "deepseek_v3":
        assert type(args).from_hf_config(export_config(biased)).moe.use_bias
        return
    export_config(args)
    with pytest.raises(CheckpointError, match=r"it would have moe\.use_bias = False \(now True\)"):
        export_config(biased)


@pytest.mark.parametrize("name", ["llama3, tied", "qwen3, experts", "deepseek_v3"])
def test_ours_reads_it_back(tmp_path, name, monkeypatch):
    monkeypatch.setattr(huggingface_save, "MAX_FILE_BYTES", 50_000)
    model, other = build(name), build(name, seed=1)
    save(model, tmp_path / "out")
    other.load_checkpoint(tmp_path / "out")
    for key, value in model.state_dict().items():
        if not key.endswith("router.load"):
            assert torch.equal(other.state_dict()[key], value), key


def test_a_router_without_a_bias_stays_so(tmp_path):
    """transformers gives it one of zero, which changes nothing."""
    args = TINY["deepseek_v3"]
    unbiased = dataclasses.replace(args, moe=dataclasses.replace(args.moe, use_bias=False))
    model, folder = build("deepseek_v3"), tmp_path / "out"
    for layer in model.layers.values():
        if layer.moe is not None:
            layer.moe.router.selection_bias = None
    model.args = unbiased
    save(model, folder)
    known = model_of_hf_folder(folder)
    assert not known.args.moe.use_bias
    convert_from_hf(folder, tmp_path / "ours", known, None)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs.eval()(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("through", ["save", "to_hf", "from_hf"])
def test_the_bias_of_a_router_is_not_rounded(through, tmp_path):
    model, folder, bfloat16 = build("deepseek_v3"), tmp_path / "out", torch.bfloat16
    bias = model.layers["1"].moe.router.selection_bias
    bias.copy_(1 + 1e-3 * torch.arange(8))
    save(model, folder, bfloat16 if through == "save" else torch.float32)
    if through != "save":
        known = model_of_hf_folder(folder)
        convert_from_hf(folder, tmp_path / "ours", known, bfloat16 if through != "to_hf" else None)
        folder = tmp_path / "back"
        convert_to_hf(tmp_path / "ours", folder, known, bfloat16 if through == "to_hf" else None)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    assert torch.equal(tensors.pop("model.layers.1.mlp.gate.e_score_correction_bias"), bias)
    dtypes = {key: t.dtype for key, t in tensors.items() if not key.endswith("correction_bias")}
    assert set(dtypes.values()) == {bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=bfloat16)
    assert torch.equal(theirs.model.layers[1].mlp.gate.e_score_correction_bias, bias)


def test_files_are_what_the_safetensors_library_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_save, "PIECE_BYTES", 1000)
    monkeypatch.setattr(huggingface_save, "MAX_FILE_BYTES", 50_000)
    model, folder = build("llama3, tied"), tmp_path / "out"
    save(model, folder, torch.bfloat16)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    adapter = tiny_spec("llama3, tied").state_dict_adapter(model.args)
    expected = adapter.to_hf(model.state_dict())
    assert "lm_head.weight" not in expected
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for t in expected.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 4 and files[-1] == "model-00004-of-00004.safetensors"
    for file in files:
        assert (folder / file).stat().st_size < 60_000
        for key, tensor in load_file(folder / file).items():
            assert index["weight_map"][key] == file
            assert torch.equal(tensor, expected[key].bfloat16())
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["max_position_embeddings"] == 128
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)
    assert HuggingFaceTokenizer(folder).vocab_size == 258
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_a_rank_is_told_its_own_share_alone():
    """64 ranks in two replicas of 32, which have 4 rows each of three tensors in three files."""
    spec = safetensors_files.TensorSpec(torch.float32, (128, 8))
    rows = [((4 * (rank % 32), 0), (4, 8)) for rank in range(64)]
    parts = [dict.fromkeys("abc", (spec, box)) for box in rows]
    files = {f"{name}.safetensors": {name: spec} for name in "abc"}
    tensors = plan_tensors(files, 64)
    assert [(t.name, t.writer) for t in tensors] == [("a", 0), ("b", 21), ("c", 42)]
    assert [t.writer for t in plan_tensors(files, 2)] == [0, 1, 0]
    shares = share_out(tensors, parts)
    for number, tensor in enumerate(tensors):
        senders = [rank for rank, share in enumerate(shares) if number in share.sends]
        assert tensor.writer in senders and sorted(rank % 32 for rank in senders) == [*range(32)]
        written = shares[tensor.writer].writes
        assert written == {number: sorted(((r, rows[r]) for r in senders), key=lambda s: s[1])}
    assert [rank for rank, share in enumerate(shares) if share.writes] == [0, 21, 42]
    assert any(share.sends for share in shares[43:])  # replicas take turns
    for wrong in parts[:31], [*parts[:32], {"c": (spec, ((2, 0), (4, 8)))}]:
        with pytest.raises(RuntimeError, match=r"the ranks have .* elements of"):
            share_out(tensors, wrong)


def test_rank_0_plans_without_collecting_garbage(tmp_path, monkeypatch):
    """It holds a million parts of a large model on a thousand ranks, and none is garbage."""
    collects, plan = [], huggingface_save.plan_files

    def listen(*args):
        collects.append(gc.isenabled())
        return plan(*args)

    monkeypatch.setattr(huggingface_save, "plan_files", listen)
    save(build("llama3"), tmp_path / "saved")
    assert collects == [False] and gc.isenabled()


def test_fields_of_the_folder_that_the_run_started_from_are_kept(tmp_path):
    model, first = build("qwen3"), tmp_path / "first"
    save(model, first)
    path = first / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 999}))
    (first / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    (first / "chat_template.jinja").write_text("{{ messages }}")
    assets = ExportAssets(str(first), 128, (first,))
    save_huggingface([model], tmp_path / "next", torch.float16, assets, dist.group.WORLD)
    config = json.loads((tmp_path / "next" / "config.json").read_text())
    assert config["max_position_embeddings"] == 999 and config["torch_dtype"] == "float16"
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "next" / name).read_bytes() == (first / name).read_bytes()

    longer = dataclasses.replace(assets, max_seq_len=4096)
    save_huggingface([model], tmp_path / "longer", torch.float16, longer, dist.group.WORLD)
    extended = json.loads((tmp_path / "longer" / "config.json").read_text())
    assert extended == config | {"max_position_embeddings": 4096}

    other = build("llama3")  # whose config.json would be wrong
    save_huggingface([other], tmp_path / "other", torch.float16, assets, dist.group.WORLD)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["max_position_embeddings"] == 512


def test_each_file_is_synced_once(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def spy(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    folder = tmp_path / "out"
    save(build("llama3"), folder)
    parent = tmp_path.name  # for the names of the new folder, first out.partial, then out
    assert sorted(synced) == sorted([*os.listdir(folder), "out.partial", parent, parent])


def test_a_failed_save_leaves_the_older_folder(tmp_path, monkeypatch):
    model, folder = build("llama3"), tmp_path / "out"
    save(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(self, name, tensor, start=0):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_files.SafetensorsWriter, "write", disk_full)
    with pytest.raises(CheckpointError, match=r"out could not be saved: OSError.*No space"):
        save(build("llama3", seed=1), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    save(build("llama3", seed=1), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} != before


def test_an_export_that_is_refused_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*args):
        raise CheckpointError("no such scaling in config.json")

    monkeypatch.setattr(huggingface_save, "write_assets", refuse)
    with pytest.raises(CheckpointError, match=r"^no such scaling"):
        save(build("llama3"), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_folder_of_another_model_is_refused_whatever_the_shapes(tmp_path, caplog):
    save(build("llama3"), tmp_path / "out")
    spec = tiny_spec("llama3")
    for changes, message in (
        ({"n_heads": 8, "n_kv_heads": 4}, r"n_heads = 4 \(now 8\)"),
        ({"norm_eps": 1e-6}, r"norm_eps = 1e-05 \(now 1e-06\)"),
    ):
        model = spec.model_cls(dataclasses.replace(spec.model_args, **changes))
        with pytest.raises(CheckpointError, match=message):
            model.load_checkpoint(tmp_path / "out")
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        longer = dataclasses.replace(spec.model_args, rope_theta=1e6)
        spec.model_cls(longer).load_checkpoint(tmp_path / "out")
    assert "other rotary positions: rope_theta = 500000.0 (now 1000000.0)" in caplog.text
    with pytest.raises(CheckpointError, match=r"out: config\.json: model_type is 'llama'"):
        build("qwen3").load_checkpoint(tmp_path / "out")


def test_a_vocabulary_may_be_replaced(tmp_path):
    source = build("llama3")
    save(source, tmp_path / "out")
    spec = tiny_spec("llama3")
    args = dataclasses.replace(spec.model_args, vocab_size=spec.model_args.vocab_size + 8)
    model = spec.model_cls(args)
    with pytest.raises(CheckpointError, match=r"different shapes for lm_head"):
        model.load_checkpoint(tmp_path / "out")
    load_weights_of_parts([model], tmp_path / "out", None, exclude=r"^(tok_embeddings|output)\.")
    assert torch.equal(model.norm.weight, source.norm.weight)


def test_weights_that_know_bos_are_not_trained_without_it_in_silence(tmp_path, caplog, monkeypatch):
    save(build("llama3"), tmp_path / "out")
    config, tokenizer = JobConfig(), BytesTokenizer()
    config.model.tokenizer_path = str(tmp_path / "out")
    config.checkpoint.initial_load_in_hf = True
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        warn_of_initial_weights(config, tokenizer)  # which adds none
        monkeypatch.setattr(BytesTokenizer, "adds_bos", True, raising=False)
        config.data.add_bos = True
        warn_of_initial_weights(config, tokenizer)
        assert not caplog.messages
        config.data.add_bos = False
        warn_of_initial_weights(config, tokenizer)
    assert len(caplog.messages) == 1 and "set data.add_bos = true" in caplog.text
    config.checkpoint.initial_load_in_hf = False
    warn_of_initial_weights(config, tokenizer)
    assert len(caplog.messages) == 1


def test_weights_with_a_tokenizer_do_not_read_bytes_in_silence(tmp_path, caplog):
    folder = tmp_path / "out"
    save(build("llama3"), folder)
    config, tokenizer = JobConfig(), BytesTokenizer()
    config.checkpoint.initial_load_path = str(folder)
    file = folder / "tokenizer.json"
    file.unlink(missing_ok=True)
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        warn_of_initial_weights(config, tokenizer)
        write_bytes_tokenizer(folder)
        warn_of_initial_weights(config, tokenizer)
        file.write_text('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}')
        warn_of_initial_weights(config, object())  # a tokenizer that was chosen
        assert not caplog.messages
        warn_of_initial_weights(config, tokenizer)
    assert len(caplog.messages) == 1
    start = f'model.tokenizer_path = "bytes": the weights in {folder} were probably trained with'
    assert caplog.messages[0].startswith(start)
    convert_from_hf(folder, tmp_path / "ours", model_of_hf_folder(folder), None)
    config.checkpoint.initial_load_path = str(tmp_path / "ours")
    warn_of_initial_weights(config, tokenizer)
    assert caplog.messages[-1] == caplog.messages[0]
