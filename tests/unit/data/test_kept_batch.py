"""A bad batch is kept as it was, of whatever kind it is, and shown."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchtitan import cli
from torchtitan.data.kept_batch import keep_batch, show_batch
from torchtitan.errors import DataError

FACTS = {"step": 3, "tokenizer": "bytes"}


def test_latents_are_kept_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latents = torch.tensor([[0.25, float("nan")], [-1.5, 3.0]]).bfloat16()
    batch = {"tokens": latents, "labels": torch.rand(2, 3, 2), "times": torch.tensor([7, 2**40])}
    keep_batch(tmp_path, 0, [batch, batch], FACTS)

    kept = np.load(tmp_path / "data-rank-0.npz")
    assert kept["tokens"].dtype == np.float32
    np.testing.assert_array_equal(kept["tokens"], torch.cat([latents, latents]).float())
    np.testing.assert_array_equal(kept["labels"][:2], batch["labels"])
    assert kept["times"].tolist() == 2 * [7, 2**40]

    show_batch(tmp_path)
    shown = capsys.readouterr().out
    assert "row 0: tokens float32 [2] from 0.25 to 0.25, 1 NaN or infinite, labels" in shown
    assert "row 3: tokens float32 [2] from -1.5 to 3, labels float32 [3, 2] from" in shown
    assert shown.endswith(", times 1099511627776\n")


def test_rows_of_ids_are_shown_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = torch.tensor([list(b"words")])
    batch = {"tokens": tokens, "labels": tokens, "positions": tokens, "document_ids": tokens}
    keep_batch(tmp_path, 0, [batch], FACTS)
    assert set(np.load(tmp_path / "data-rank-0.npz")) == {"tokens", "labels"}
    show_batch(tmp_path)
    assert "5 tokens, 5 trained on, 5 distinct ---\nwords" in capsys.readouterr().out


def test_other_inputs_are_shown_below_a_text(tmp_path: Path, capsys: Any) -> None:
    tokens = torch.tensor([list(b"words")])
    batch = {"tokens": tokens, "labels": tokens, "weights": torch.tensor([0.5])}
    keep_batch(tmp_path, 0, [batch], FACTS)
    show_batch(tmp_path)
    assert capsys.readouterr().out.endswith("\nwords\nweights 0.5\n")


def test_micro_batches_of_other_lengths_are_kept_each_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def batch(length: int, **others: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"tokens": torch.rand(2, length), "labels": torch.ones(2, 4), **others}

    batches = [batch(6, file=torch.ones(2)), batch(7, file=torch.ones(2), mask=torch.ones(2))]
    keep_batch(tmp_path, 0, batches, FACTS)

    kept = np.load(tmp_path / "data-rank-0.npz")
    assert set(kept) == {"0.tokens", "1.tokens", "labels", "file", "1.mask"}
    np.testing.assert_array_equal(kept["1.tokens"], batches[1]["tokens"])
    assert kept["labels"].shape == (4, 4)

    show_batch(tmp_path)
    shown = capsys.readouterr().out
    assert "row 1: tokens float32 [6]" in shown
    assert "row 3: tokens float32 [7]" in shown


def test_a_damaged_file_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut off anywhere, as by a crash, or with another byte anywhere."""
    tokens = torch.tensor([list(b"words")])
    keep_batch(tmp_path, 0, [{"tokens": tokens, "labels": tokens}], FACTS)
    file = tmp_path / "data-rank-0.npz"
    whole = file.read_bytes()
    damaged = {f"first {n} bytes": whole[:n] for n in range(0, len(whole), 7)}
    damaged |= {
        f"byte {n}": whole[:n] + bytes([whole[n] ^ 255]) + whole[n + 1 :]
        for n in range(0, len(whole), 3)
    }
    refused = 0
    for how, content in damaged.items():
        file.write_bytes(content)
        try:
            cli.main(["data", "batch", str(tmp_path)])
        except SystemExit as end:
            refused += 1
            assert end.code == 2
            shown = capsys.readouterr().err
            assert shown.startswith(f"error: {file} is damaged: "), (how, shown)
            assert shown.count("\n") == 1, (how, shown)
    assert refused > len(damaged) / 2  # not what is no part of a row, as times of the archive


@pytest.mark.parametrize("facts", ["[]", "{}", '{"tokenizer": 5}', "{", "[" * 100_000])
def test_damaged_facts_are_one_message(facts: str, tmp_path: Path) -> None:
    (tmp_path / "batch.json").write_text(facts)
    with pytest.raises(
        DataError, match=r"holds no kept batch|is damaged: it has no tokenizer entry"
    ):
        show_batch(tmp_path)


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    keep_batch(tmp_path, 0, [], FACTS)
    (tmp_path / "data-rank-0 (copy).npz").touch()
    (tmp_path / "data-rank-0.npz").unlink()
    show_batch(tmp_path)
