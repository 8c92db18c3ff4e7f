"""`encode` and `sample` on a tiny release with random encoders, beside diffusers' pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_flux
import torch
from diffusers import AutoencoderKL
from harness import command
from PIL import Image
from tiny_models import TINY

from torchtitan.components.checkpoint.huggingface import export_config
from torchtitan.config import load_config
from torchtitan.errors import DataError
from torchtitan.models.flux import encode, sample
from torchtitan.models.flux.data import build_dataloader, unpack
from torchtitan.models.flux.encoders import Encoders

CAPTIONS = ["a red fox", "a blue house"]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    tiny_flux.save_release(folder)
    tiny_flux.hf_model().save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def images(tmp_path):
    folder, random = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for name, caption in zip(("one.png", "two.jpg"), CAPTIONS, strict=True):
        pixels = random.integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption + "\n")
    return folder


def options_of(release: Path, out: Path) -> list[str]:
    size = "--width", "16", "--height", "8", "--device", "cpu", "--dtype", "float32"
    return [*size, "--encoders", str(release), "--out", str(out)]


def test_encoded_images_are_trained_on(release, images, tmp_path, capsys):
    options = [*options_of(release, tmp_path / "data"), "--text-len", "7"]
    for shard in "0", "1":
        assert encode.main([str(images), *options, "--shards", "2", "--shard", shard]) == 0
    assert "part-00001-of-00002.parquet: 1 images, training.seq_len = 8" in capsys.readouterr().out

    given = "--model.name=flux", "--model.flavor=debugmodel", "--training.seq_len=8"
    data = "--training.dataset=parquet", f"--training.dataset_path={tmp_path / 'data'}"
    config = load_config([*given, *data, "--training.local_batch_size=2"])
    loader = build_dataloader(tiny_flux.ARGS, config, None, 0, 1)
    loader._make.text_dropout = 0.0
    batch = next(loader)
    loader.close()
    found = batch["tokens"] - batch["times"][:, None, None] / 1e6 * batch["labels"]
    order = [0, 1] if torch.equal(batch["text"], _texts(release, CAPTIONS)) else [1, 0]
    torch.testing.assert_close(batch["text"], _texts(release, [CAPTIONS[i] for i in order]))

    vae = AutoencoderKL.from_pretrained(release / "vae")
    for place, image in enumerate(order):
        pixels = encode.pixels_of(images / ("one.png", "two.jpg")[image], 16, 8)
        latents = vae.encode(pixels[None]).latent_dist.mode()
        expected = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        torch.testing.assert_close(unpack(found[place], 4), expected[0], atol=5e-3, rtol=1e-3)


def _texts(release: Path, captions: list[str]) -> torch.Tensor:
    encoders = Encoders(release, torch.device("cpu"), torch.float32)
    return encoders.text(captions, 7)[0].half().float()


@pytest.mark.parametrize("guidance", [False, True])
def test_samples_are_those_of_diffusers(guidance, release, tmp_path, capsys):
    """With its schedule, for [dev] shifted by the size of the image."""
    transformer = tiny_flux.hf_model(tiny_flux.DEV if guidance else tiny_flux.ARGS)
    transformer.save_pretrained(checkpoint := tmp_path / "transformer")
    given = [CAPTIONS[0], "--checkpoint", str(checkpoint), "--steps", "3"]
    assert sample.main([*given, *options_of(release, tmp_path / "out")]) == 0
    ours = np.asarray(Image.open(tmp_path / "out" / "00000.png"))

    noise = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    pipeline = tiny_flux.pipeline_of(release, transformer)
    pipeline.set_progress_bar_config(disable=True)
    inputs = {"prompt": CAPTIONS[0], "width": 16, "height": 8, "num_inference_steps": 3}
    theirs = pipeline(**inputs, latents=noise, output_type="np").images[0]
    assert ours.shape == theirs.shape == (8, 16, 3) and ours.std() > 5
    assert np.abs(ours - 255 * theirs).max() <= 1


def test_classifier_free_guidance_goes_away_from_no_text(release):
    model = sample.load(release / "transformer")
    batch = tiny_flux.batch_of(tiny_flux.ARGS, 1, 2, 2)
    noise, texts = batch["tokens"], (batch["text"], batch["pooled"])
    nothing = [torch.zeros_like(text) for text in texts]
    step = [1.0, 0.9]
    with_text, without = (sample.denoise(model, noise, step, *t, 2) for t in (texts, nothing))
    guided = sample.denoise(model, noise, step, *texts, 2, cfg=3.0)
    torch.testing.assert_close(guided, without + 3 * (with_text - without))


def test_the_captions_may_be_in_one_file(images):
    first = "first\u2028line"  # which JSON text may contain as it is
    lines = [{"file_name": "two.jpg", "text": "other"}, {"file_name": "one.png", "text": first}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (images / "metadata.jsonl").write_text(text, encoding="utf-8")
    assert encode.captioned(images) == [(images / "one.png", first), (images / "two.jpg", "other")]

    (images / "metadata.jsonl").write_bytes(b'{"file_name": "one.png", "text": "caf\xe9"}')
    with pytest.raises(DataError, match=r"metadata.jsonl is damaged: .*0xe9"):
        encode.captioned(images)


def test_mistakes_end_in_one_message(release, images, tmp_path, capsys, monkeypatch):
    options = options_of(release, tmp_path / "out")
    given = ["a", "--checkpoint", str(release / "transformer")]

    def message(main, arguments):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "--width 10: must be a multiple of 4" in message(
        encode.main, [str(images), *options, "--width", "10"]
    )
    (file := tmp_path / "file").touch()
    for main, arguments in ((encode.main, [str(images)]), (sample.main, given)):
        assert "--device gpu: " in message(main, [*arguments, *options, "--device", "gpu"])
        assert f"--out {file}" in message(main, [*arguments, *options_of(release, file)])
    (images / "two.txt").unlink()
    assert "two.jpg has no caption" in message(encode.main, [str(images), *options])
    assert f"--encoders {tmp_path} cannot be read: Error no file named model_index" in message(
        sample.main, [*given, *options_of(tmp_path, tmp_path)]
    )
    assert "no/folder: there is no such folder" in message(
        sample.main, [*given, *options_of(Path("no/folder"), tmp_path)]
    )
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "need the packages diffusers, transformers and Pillow" in message(
        sample.main, [*given, *options]
    )
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install pillow" in message(sample.main, [*given, *options])
    assert "there is no caption" in message(sample.main, [*given[1:], *options])


def test_the_schedule_is_that_of_the_release():
    assert sample.schedule(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = sample.schedule(4, patches=4096)
    assert shifted[0] == 1.0 and shifted[-1] == 0.0
    assert shifted[2] == pytest.approx(np.exp(1.15) / (np.exp(1.15) + 1))


def test_generate_says_that_it_writes_texts(release):
    done = command("generate", "--checkpoint", str(release / "transformer"), "--prompt", "a")
    assert done.exit_code == 2 and "flux is not a causal model" in done.err


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(export_config(TINY["llama3"])))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SystemExit):
        sample.main(["a", "--checkpoint", str(tmp_path), "--encoders", "shapes", "--out", "out"])
    assert "is of llama3 (no predefined flavor), which makes no images" in capsys.readouterr().err
