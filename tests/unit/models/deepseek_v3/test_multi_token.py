"""Multi-token prediction: what its blocks may see, what they learn, and where their weights go."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from checkpoint_run import Run, world_of_one  # noqa: F401
from model_cases.deepseek_v3 import V3, hf_model
from safetensors.torch import load_file, save_file

from torchtitan.components.checkpoint.load import load_weights_of_parts
from torchtitan.components.loss import IGNORE_INDEX, CrossEntropy, cross_entropy
from torchtitan.config import load_config
from torchtitan.data.packing import to_batch
from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, DeepSeekV3StateDictAdapter
from torchtitan.models.deepseek_v3.loss import MultiTokenLoss

DEPTH = 2
ARGS = dataclasses.replace(V3, mtp_depth=DEPTH)
SEQ = 12


def model_of(args=ARGS) -> DeepSeekV3Model:
    torch.manual_seed(0)
    model = DeepSeekV3Model(args)
    model.init_weights()
    return model.eval()


def batch_of(stream: np.ndarray) -> dict[str, torch.Tensor]:
    """The batch of one row, of a stream `[SEQ + 1]` that is one document."""
    positions = np.arange(len(stream))[None]
    return to_batch(stream[None], positions, np.zeros_like(positions), False, DEPTH)


def test_each_block_sees_one_token_more_than_the_one_before():
    model = model_of()
    stream = np.random.default_rng(0).integers(1, V3.vocab_size, SEQ + 1)

    def logits(changed: int | None = None) -> torch.Tensor:
        """`[SEQ, 1 + DEPTH, vocab]`."""
        tokens = stream.copy()
        if changed is not None:
            tokens[changed] = 0
        batch = batch_of(tokens)
        return model(batch["tokens"], next_tokens=batch["next_tokens"])[0]

    whole = logits()
    torch.testing.assert_close(whole[:, 0], model(batch_of(stream)["tokens"])[0])
    for changed in range(SEQ + 1):
        other = (logits(changed) - whole).abs().amax(-1) > 1e-4
        for depth in range(1 + DEPTH):
            first = max(changed - depth, 0)  # position i sees the tokens up to i + depth
            assert not other[:first, depth].any()
            assert first >= SEQ or other[first, depth]


def test_the_loss_is_that_of_the_next_token_and_the_gradient_that_of_all():
    weight, vocab = 0.3, 7
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 1 + DEPTH, vocab, requires_grad=True)
    labels = torch.randint(vocab, (2, 5, 1 + DEPTH))
    labels[0, 3:, 0] = labels[1, 2:, 1] = labels[:, 4:, 2] = IGNORE_INDEX
    loss_fn = MultiTokenLoss(CrossEntropy(0.0), weight)
    loss = loss_fn(logits, labels)
    losses = [cross_entropy(logits[:, :, i], labels[..., i]) for i in range(1 + DEPTH)]
    torch.testing.assert_close(loss, losses[0])
    expected = losses[0] + weight * (losses[1] + losses[2]) / DEPTH
    [grad], [expected] = (torch.autograd.grad(x, logits) for x in (loss, expected))
    torch.testing.assert_close(grad, expected)

    assert loss_fn.count_labels(labels) == 8
    with torch.no_grad():
        loss_fn(logits, labels)  # does not count
    [(total, count)] = loss_fn.metrics().values()
    assert (total, count) == (pytest.approx((losses[1] + losses[2]).item()), 15)
    assert loss_fn.metrics() == {"mtp_loss": (0, 0)}
    assert torch.equal(loss_fn(logits[:, :, 0], labels[..., 0]), losses[0])


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_parameters_are_counted(depth):
    args = dataclasses.replace(V3, mtp_depth=depth)
    model = model_of(args)
    nparams, flops = args.get_nparams_and_flops(SEQ)
    assert nparams == sum(p.numel() for p in model.parameters())
    used = [p for name, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in name]
    share = args.moe.top_k / args.moe.num_experts
    matrices = sum(p.numel() for p in used) + depth * model.output.weight.numel()
    matrices += share * sum(p.numel() for p in model.parameters() if p.ndim == 3)
    heads = args.n_heads * (args.qk_dim + args.v_dim)
    assert flops == 6 * matrices + 6 * (args.n_layers + depth) * heads * SEQ


def test_further_layers_of_hugging_face_files_are_read(tmp_path):
    model, adapter = model_of(), DeepSeekV3StateDictAdapter(ARGS)
    state = model.state_dict()
    theirs = adapter.to_hf(state)
    back = adapter.from_hf(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    first = V3.n_layers
    assert theirs[f"model.layers.{first}.eh_proj.weight"] is state["mtp.0.projection.weight"]
    norm = f"model.layers.{first + 1}.shared_head.norm.weight"
    assert theirs[norm] is state["mtp.1.norm.weight"]

    hf_model(V3).save_pretrained(tmp_path)  # without further layers
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=rf"layers\.{first}\."):
        model_of().load_checkpoint(tmp_path)
    published = {name: tensor.contiguous() for name, tensor in theirs.items()}
    for layer in (first, first + 1):
        published[f"model.layers.{layer}.embed_tokens.weight"] = theirs["model.embed_tokens.weight"]
        published[f"model.layers.{layer}.shared_head.head.weight"] = theirs["lm_head.weight"]
    save_file({name: tensor.clone() for name, tensor in published.items()}, path)
    loaded = model_of(ARGS)
    torch.nn.init.zeros_(loaded.output.weight)
    assert loaded.mtp_embeddings is loaded.tok_embeddings
    loaded.load_checkpoint(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    model_of(dataclasses.replace(V3, mtp_layers=DEPTH)).load_checkpoint(tmp_path)  # leaves them out

    copy = f"model.layers.{first}.embed_tokens.weight"
    tensors = load_file(path)
    tensors[copy] = tensors[copy] + 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=re.escape(f"{copy} differs")) as failed:
        model_of().load_checkpoint(tmp_path)
    assert "tie_word_embeddings" not in str(failed.value)


def test_weights_without_further_layers_are_a_start(tmp_path):
    first = Run(tmp_path, model=model_of(V3))
    first.train(2)
    model = model_of()
    torch.nn.init.zeros_(model.tok_embeddings.weight)
    further = model.mtp[0].projection.weight.detach().clone()
    folder = tmp_path / "checkpoint" / "step-2"
    with pytest.raises(CheckpointError, match=r"mtp\.0\."):
        load_weights_of_parts([model], folder, None)
    load_weights_of_parts([model], folder, None, exclude=r"^mtp\.")
    assert torch.equal(model.mtp_embeddings.weight, first.model.tok_embeddings.weight)
    assert torch.equal(model.mtp[0].projection.weight, further)


def test_weights_with_further_layers_are_a_start_without(tmp_path):
    """As files of Hugging Face are; but no weights may be missing."""
    first = Run(tmp_path, model=model_of())
    first.train(2)
    folder = tmp_path / "checkpoint" / "step-2"
    trained = first.model.state_dict()
    for depth in (0, 1):
        model = model_of(dataclasses.replace(V3, mtp_depth=depth))
        torch.nn.init.zeros_(model.output.weight)
        model.load_checkpoint(folder)
        state = model.state_dict()
        assert len([name for name in state if name.startswith("mtp.1")]) == 0
        for name, tensor in state.items():
            if not name.endswith(".router.load"):
                assert torch.equal(tensor, trained[name]), name


def test_config_json_has_the_number_of_layers():
    assert ARGS.to_hf_config()["num_nextn_predict_layers"] == DEPTH
    assert V3.to_hf_config()["num_nextn_predict_layers"] == 0


def test_split_backward_passes_are_refused_with_several_layers():
    split = load_config(
        [
            "--model.name=deepseek_v3",
            "--parallelism.pipeline_parallel_degree=2",
            "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
            "--activation_checkpoint.mode=none",
        ]
    )
    with pytest.raises(ConfigError, match=r"pipeline_parallel_schedule.*mtp_depth = 2"):
        ARGS.update_from_config(split)
    dataclasses.replace(ARGS, mtp_depth=1).update_from_config(split)


@pytest.mark.parametrize("point", ["mtp_embeddings", "mtp"])
def test_further_layers_stay_with_the_output_layer(point):
    """A stage would otherwise predict from logits."""
    split = load_config(["--parallelism.pipeline_parallel_split_points", point])
    with pytest.raises(ConfigError, match=rf"split_points.*'{point}' must be in the stage"):
        ARGS.update_from_config(split)
    V3.update_from_config(split)  # has no such module, which is told where the model is cut
