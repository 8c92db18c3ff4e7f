"""FLUX.1 computes what diffusers computes, and exchanges weights with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_flux
import torch
from diffusers import FluxTransformer2DModel
from harness import command
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.config import JobConfig
from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.models.flux import MODEL_CONFIGS, FluxModel, FluxModelArgs
from torchtitan.models.from_hf import train_spec_of_hf_folder
from torchtitan.protocols.train_spec import get_train_spec

DEV = tiny_flux.DEV
PUBLISHED = {  # of FLUX.1-dev, transformer/config.json
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.30.0.dev0",
    "_name_or_path": "../checkpoints/flux-dev/transformer",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}


@pytest.fixture(params=[tiny_flux.ARGS, DEV], ids=["schnell", "dev"])
def models(request, tmp_path):
    """The model of diffusers, ours with its weights, and the folder of both."""
    hf = tiny_flux.hf_model(request.param)
    hf.save_pretrained(tmp_path, max_shard_size="200KB")
    return hf, FluxModel(request.param).load_checkpoint(tmp_path).eval(), tmp_path


@torch.no_grad()
@pytest.mark.parametrize("size", [(6, 6), (4, 10)], ids=["square", "wide"])
def test_it_computes_what_diffusers_computes(models, size):
    hf, ours, _ = models
    batch = tiny_flux.batch_of(ours.args, 2, *size)
    expected = tiny_flux.hf_velocity(hf, batch)
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(**batch), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_images_of_other_shapes_share_a_batch(models):
    _, ours, _ = models
    wide, high = (tiny_flux.batch_of(ours.args, 1, *size) for size in ((4, 9), (9, 4)))
    both = {name: torch.cat([wide[name], high[name]]) for name in wide}
    torch.testing.assert_close(ours(**both), torch.cat([ours(**wide), ours(**high)]))
    assert not torch.allclose(ours(**wide), ours(**high), atol=1e-3)  # only the width differs


def test_gradients(models):
    hf, ours, _ = models
    batch = tiny_flux.batch_of(ours.args, 2, 3, 4)
    for model, velocity in (
        (hf, tiny_flux.hf_velocity(hf.requires_grad_(), batch)),
        (ours, ours.requires_grad_()(**batch)),
    ):
        velocity.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    adapter = get_train_spec("flux", "debugmodel").state_dict_adapter(ours.args)
    found = adapter.to_hf({name: p.grad for name, p in ours.named_parameters()})
    for name, parameter in hf.named_parameters():
        error = (found[name] - parameter.grad).norm()
        assert error <= 1e-4 * parameter.grad.norm(), name


def test_an_exported_model_is_read_by_diffusers(models, tmp_path):
    hf, ours, folder = models
    name, spec = train_spec_of_hf_folder(folder)
    assert (name, replace(spec.model_args, text_len=7)) == ("flux", ours.args)
    saved, exported = tmp_path / "ours" / "step-1", tmp_path / "hf"
    assert command("convert", "from-hf", str(folder), str(saved)).exit_code == 0
    done = command("convert", "to-hf", str(saved), str(exported))
    assert done.exit_code == 0, done.err
    back, info = FluxTransformer2DModel.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    for key, tensor in hf.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key


def test_flavors_are_as_published():
    assert FluxModelArgs.from_hf_config(PUBLISHED) == MODEL_CONFIGS["flux-dev"]
    schnell = FluxModelArgs.from_hf_config(PUBLISHED | {"guidance_embeds": False})
    assert replace(schnell, text_len=256) == MODEL_CONFIGS["flux-schnell"]
    for flavor, size in (("flux-dev", 11_901_408_320), ("flux-schnell", 11_891_178_560)):
        with torch.device("meta"):
            model = FluxModel(MODEL_CONFIGS[flavor])
        assert sum(p.numel() for p in model.parameters()) == size
        assert MODEL_CONFIGS[flavor].get_nparams_and_flops(4096)[0] == size


def test_flops_equal_those_counted_in_forward_and_backward():
    model, batch = tiny_flux.varied(FluxModel(DEV)).requires_grad_(), {}
    for name, tensor in tiny_flux.batch_of(DEV, 2, 3, 4).items():
        batch[name] = tensor.requires_grad_() if tensor.is_floating_point() else tensor
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch).sum().backward()
    per_image = 12 * DEV.get_nparams_and_flops(12)[1]
    per_image -= 2 * 2 * 256 * DEV.dim  # waves of time and guidance need no gradient
    assert counter.get_total_flops() / 2 == pytest.approx(per_image, abs=12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, r"_class_name is 'SD3.*, not 'FluxTrans"),
        ({"patch_size": 2}, r"patch_size = 2 is not supported"),
        ({"out_channels": 128}, r"out_channels = 128 is not supported"),
        ({"attention_head_dim": 64}, r"attention_head_dim = 64 is not supported"),
        ({"use_lora": True}, r"unknown fields: use_lora = True"),
        ({"num_layers": None}, r"num_layers = None must be of type int"),
        ({"num_single_layers": -1}, r"num_single_layers = -1 must be >= 0"),
        ({"axes_dims_rope": [-16, 88, 56]}, r"axes_dims_rope = -16 must be >= 1"),
    ],
)
def test_a_config_of_another_architecture_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        FluxModelArgs.from_hf_config(PUBLISHED | changes)


def test_another_model_of_diffusers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "SanaTransformer2DModel"}')
    with pytest.raises(
        CheckpointError, match=r"_class_name = 'SanaTransformer2DModel' is not supp"
    ):
        train_spec_of_hf_folder(tmp_path)


def test_an_unknown_tensor_is_named():
    adapter = get_train_spec("flux", "debugmodel").state_dict_adapter(tiny_flux.ARGS)
    with pytest.raises(
        CheckpointError, match=r"'transformer_blocks\.1\.ff\.net\.1\.weight' is not"
    ):
        adapter.from_hf({"transformer_blocks.1.ff.net.1.weight": torch.empty(1)})


def test_init_weights_sets_everything_and_starts_at_zero():
    with torch.device("meta"):
        model = FluxModel(DEV)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not model(**tiny_flux.batch_of(DEV, 1, 2, 2)).any()


def test_blocks_compile_to_one_graph_a_kind():
    torch.compiler.reset()
    model, batch = tiny_flux.varied(FluxModel(DEV)), tiny_flux.batch_of(DEV, 2, 3, 4)
    expected, counter = model(**batch), CompileCounterWithBackend("aot_eager")
    for layer in model.layers.values():
        layer.forward = torch.compile(layer.forward, backend=counter, fullgraph=True)
    torch.testing.assert_close(model(**batch), expected)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tensor_parallel_degree", 2, r"n_heads = 3\). Degrees that do: 1, 3"),
        ("context_parallel_degree", 7, r"degree = 7: cuts .* into 14 chunks, but its text_len is"),
        ("enable_async_tensor_parallel", True, r"parallel = true: the sequence is not divided"),
    ],
)
def test_a_layout_that_it_cannot_have_is_refused(key, value, message):
    config = JobConfig()
    config.model.name = "flux"
    setattr(config.parallelism, key, value)
    with pytest.raises(ConfigError, match=message):
        DEV.update_from_config(config)
