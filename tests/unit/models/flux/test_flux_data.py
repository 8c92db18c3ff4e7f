"""What a training step of FLUX.1 is made of."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from diffusers import FluxTransformer2DModel
from harness import read_lines, train

from torchtitan.config import JobConfig, load_config
from torchtitan.errors import ConfigError, DataError
from torchtitan.models.flux import MODEL_CONFIGS, validate
from torchtitan.models.flux.config import Flux
from torchtitan.models.flux.data import NoisySample, build_dataloader, open_images, pack, unpack
from torchtitan.models.flux.loss import velocity_loss
from torchtitan.models.flux.shapes import COLORS, SHAPES, ShapeEncoders, Shapes
from torchtitan.models.flux.validate import SHARES

ARGS = MODEL_CONFIGS["debugmodel"]
CONFIG = "torchtitan/models/flux/train_configs/debug_model.toml"


def job(*options: str) -> JobConfig:
    given = "--model.name=flux", "--model.flavor=debugmodel", "--training.seq_len=16"
    return load_config([*given, "--training.local_batch_size=2", *options])


def row(height: int = 8, width: int = 8, n_text: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = {"latents": (16, height, width), "t5": (n_text, 64), "clip": (32,)}
    return {name: random.standard_normal(size, np.float32) for name, size in sizes.items()}


def sample(seed: int = 0, args=ARGS, share=None, dropout: float = 0.0, **shape: int):
    make = NoisySample(args, 16, text_dropout=dropout, guidance=3.5)
    return make(row(**shape), torch.Generator().manual_seed(seed), share)


def test_patches_are_packed_by_rows_and_unpacked():
    latents = torch.arange(2 * 4 * 6.0).view(2, 4, 6)
    patches = pack(latents)
    assert patches.shape == (6, 8)
    assert patches[1].tolist() == [2, 3, 8, 9, 26, 27, 32, 33]  # as diffusers: channel, row, column
    assert torch.equal(unpack(patches, 3), latents)


def test_a_sample_lies_between_image_and_noise():
    made, image = sample(), pack(torch.from_numpy(row()["latents"]))
    share = made["times"] / 1_000_000
    noise = image + made["labels"]
    torch.testing.assert_close(made["tokens"], (1 - share) * image + share * noise)
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.1
    assert made["widths"] == 4 and "guidance" not in made
    assert sample(args=replace(ARGS, guidance=True))["guidance"] == 3500
    assert sample(share=0.25)["times"] == 250_000


def test_times_are_logit_normal():
    times = torch.tensor([sample(seed)["times"].item() / 1_000_000 for seed in range(500)])
    logits = times.logit()
    assert abs(logits.mean()) < 0.15 and abs(logits.std() - 1) < 0.1


def test_each_encoding_of_a_text_is_dropped_by_itself():
    made = [sample(seed, dropout=0.25) for seed in range(400)]
    without = torch.tensor([[not s["text"].any(), not s["pooled"].any()] for s in made]).float()
    assert torch.allclose(without.mean(0), torch.tensor(0.25), atol=0.07)
    assert abs(without.prod(1).mean() - 0.25**2) < 0.04
    assert Flux().text_dropout ** 2 == pytest.approx(0.2, abs=1e-3)


def test_short_texts_are_padded():
    text = sample(n_text=3)["text"]
    assert text.shape == (8, 64) and text[:3].all() and not text[3:].any()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"width": 10}, r"are \[16, 8, 10\], \[3, 64\], \[32\], .*seq_len = 16 patches"),
        ({"height": 7}, r"\[16, 7, 8\], .* be \[16, height, width\] of .* of 2 x 2"),
        ({"n_text": 9}, r"\[9, 64\], .* but must be .*, up to \[8, 64\], and"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(DataError, match=message):
        sample(**shape)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "split"])
def test_tables_are_read_by_every_layout_alike(kind, tmp_path):
    data = Dataset.from_list([{**row(), "caption": str(i)} for i in range(5)])
    options = [f"--training.dataset={'parquet' if kind == 'parquet' else 'arrow'}"]
    if kind == "parquet":
        data.to_parquet(tmp_path / "rows.parquet")
    elif kind == "arrow":
        data.save_to_disk(tmp_path)
    else:
        DatasetDict({"train": data.select([0]), "other": data}).save_to_disk(tmp_path)
        options.append("--training.split=other")
    options += [f"--training.dataset_path={tmp_path}", "--training.global_batch_size=4"]
    one = build_dataloader(ARGS, job(*options), None, 0, 1)
    two = [build_dataloader(ARGS, job(*options), None, rank, 2) for rank in range(2)]
    for _ in range(3):  # more than an epoch
        passes, shares = [next(one), next(one)], [next(loader) for loader in two]
        for whole, share in zip(passes, shares, strict=True):
            assert whole.keys() == share.keys()
            assert all(torch.equal(whole[name], share[name]) for name in whole)
    assert one.metrics() == {"data_epoch": 12 / 5}
    state, following = one.state_dict(), next(one)
    again = build_dataloader(ARGS, job(*options, "--debug.seed=7"), None, 0, 1)
    again.load_state_dict(state)
    assert torch.equal(next(again)["tokens"], following["tokens"])
    for loader in (one, again, *two):
        loader.close()


def test_each_epoch_has_every_row_in_an_order_of_its_own(tmp_path):
    rows = [{**row(), "clip": np.full(32, i + 1, np.float32)} for i in range(6)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    options = "--training.dataset=parquet", f"--training.dataset_path={tmp_path}"
    loader = build_dataloader(ARGS, job(*options), None, 0, 1)
    loader._make.text_dropout = 0.0
    seen = [int(number) for _ in range(6) for number in next(loader)["pooled"][:, 0]]
    assert sorted(seen[:6]) == sorted(seen[6:]) == [1, 2, 3, 4, 5, 6]
    assert seen[:6] != seen[6:]
    loader.close()


def test_what_is_no_table_of_encoded_images_is_refused(tmp_path):
    Dataset.from_list([{"latent": [1.0], "clip": [1.0]}]).to_parquet(tmp_path / "rows.parquet")
    for options, kind, message in [
        (
            ("--training.dataset=text",),
            ConfigError,
            r"dataset = \"text\": images are read from 'parquet'",
        ),
        (("--training.dataset_path=data",), ConfigError, r"training.dataset = .* is unset: set it"),
        (("--training.seq_len=20",), ConfigError, r"seq_len = 20: the drawn shapes are square"),
        (
            ("--training.dataset=parquet", f"--training.dataset_path={tmp_path}"),
            DataError,
            r"training.dataset = 'parquet': no column 'latents'. Did you mean 'latent'\?",
        ),
    ]:
        with pytest.raises(kind, match=message):
            build_dataloader(ARGS, job(*options), None, 0, 1)
    config = job("--training.dataset=parquet", f"--training.dataset_path={tmp_path}")
    with pytest.raises(ConfigError, match=r"validation.dataset = .* is unset: set it"):
        open_images(ARGS, config, "validation")
    config.data.sources = [config.training]
    with pytest.raises(ConfigError, match=r"data.sources: images are read from a single"):
        build_dataloader(ARGS, config, None, 0, 1)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (row(width=10), "latents, t5, clip of a row"),
        (row() | {"t5": [[1.0], [2.0, 3.0]]}, "t5 of a row is"),
    ],
)
def test_a_damaged_row_is_named(damaged, message, tmp_path):
    Dataset.from_list([damaged]).to_parquet(tmp_path / "rows.parquet")
    options = "--training.dataset=parquet", f"--training.dataset_path={tmp_path}"
    loader = build_dataloader(ARGS, job(*options), None, 0, 1)
    with pytest.raises(DataError, match=rf"^training.dataset: row 0 \(from 0\): {message}"):
        next(loader)
    loader.close()


def test_drawings_show_what_their_captions_say():
    encoders, drawings = ShapeEncoders(ARGS), Shapes(ARGS, 64)
    for index in range(10):
        picture = encoders.pixels(drawings[index]["latents"][None])[0]
        lit = picture[:, (picture > 0).any(0)]
        (color,) = [
            name for name, rgb in COLORS.items() if (lit.T - torch.tensor(rgb)).abs().max() < 1e-4
        ]
        texts = [encoders.text([f"{color} {shape}"], 8)[0][0] for shape in SHAPES]
        assert any(torch.equal(drawings[index]["t5"], text) for text in texts)
    held_out = Shapes(ARGS, 64, held_out=True)
    assert not torch.equal(held_out[0]["latents"], drawings[0]["latents"])
    with pytest.raises(ConfigError, match=r"'red dog': no word 'dog'. Known: red, green"):
        encoders.text(["red dog"], 8)


def test_the_debug_config_learns_and_validates_at_fixed_shares_of_noise(tmp_path):
    options = "--job.config_file", CONFIG, "--training.steps=30", "--validation.freq=15"
    small = (
        "--training.seq_len=16",
        "--training.local_batch_size=8",
        "--lr_scheduler.warmup_steps=3",
    )
    saves = "--checkpoint.enable", "--checkpoint.last_save_in_hf", "--validation.steps=8"
    lines = train(tmp_path, *options, *small, *saves, "--metrics.log_freq=1")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["data_epoch"] == pytest.approx(30 * 8 / 1000)
    for line in read_lines(tmp_path / "validation.jsonl"):
        each = [line[f"loss/noise_{share}"] for share in SHARES]
        assert line["loss"] == pytest.approx(np.mean(each))
    exported = tmp_path / "checkpoint" / "step-30-hf"
    _, info = FluxTransformer2DModel.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    assert json.loads((exported / "config.json").read_text()) == ARGS.to_hf_config()


def validated(monkeypatch, local_batch_size: int, ranks: int, *options: str) -> torch.Tensor:
    """Sums of all data ranks, as `sum_over_data`, for a velocity that depends on the sample."""
    local = f"--training.local_batch_size={local_batch_size}"
    config, own = job("--validation.steps=3", local, *options), []
    monkeypatch.setattr(validate, "sum_over_data", lambda sums, _: own.append(sums) or sum(own))
    for rank in range(ranks):
        validator = validate.FluxValidator(ARGS, config, None, None, None, rank, ranks)
        validator.validate([], lambda batch: velocity_loss(batch["tokens"].cos(), batch["labels"]))
    return sum(own)


def test_validation_does_not_depend_on_the_passes_of_training(monkeypatch):
    expected = validated(monkeypatch, 1, 1, "--validation.local_batch_size=8")
    assert expected[:, 1].tolist() == [8 * 16 * 64] * 3 + [0] * 5
    for local_batch_size, ranks in ((1, 1), (3, 2), (8, 4), (16, 1)):
        found = validated(monkeypatch, local_batch_size, ranks)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
