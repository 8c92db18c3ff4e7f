"""The tiny models in float64, where layouts differ by 1e-13: `--job.custom_import=exact_models`.

Importing this makes float32 and bfloat16 mean float64 in the whole process: of weights, optimizers
and of everything that torchtitan casts to them, such as losses, routers and Muon's products.

The batches are uneven: rows begin with prompts of any length, without labels. In each third step
the first half of the rows has no label, so that one of two data ranks has none; in the next one,
a single row has some.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tiny_models import TINY, VOCABULARY, tiny_spec

from torchtitan.authoring.verify.batches import batch_of_texts
from torchtitan.authoring.verify.float64 import in_float64
from torchtitan.authoring.verify.probe import packed_documents
from torchtitan.config import JobConfig
from torchtitan.models.deepseek_v3.loss import build_multi_token_loss
from torchtitan.protocols import TrainSpec, register_train_spec

_UNTIL_THE_END = ExitStack()
_UNTIL_THE_END.enter_context(in_float64())

ROWS, SEQ_LEN = 8, 32


class UnevenBatches:
    def __init__(
        self, later: int, config: JobConfig, tokenizer: Any, rank: int, ranks: int
    ) -> None:
        self._later, self._training, self._step = later, config.training, 0
        self._rows = torch.arange(ROWS).chunk(ranks)[rank]
        self._waiting: list[dict[str, torch.Tensor]] = []

    def __iter__(self) -> UnevenBatches:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if not self._waiting:
            self._step += 1
            batch = self._batch(self._step)
            parts = self._rows.split(self._training.local_batch_size)
            self._waiting = [{name: t[rows] for name, t in batch.items()} for rows in parts]
        return self._waiting.pop(0)

    def _batch(self, step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        stream = torch.randint(VOCABULARY, (ROWS, SEQ_LEN + 1), generator=generator)
        prompts = torch.randint(SEQ_LEN, (ROWS, 1), generator=generator)
        without = {0: slice(1, ROWS), 1: slice(0), 2: slice(ROWS // 2)}[step % 3]
        prompts[without] = SEQ_LEN + 1
        stream = stream.where(torch.arange(SEQ_LEN + 1) > prompts, ~stream)
        masked = self._training.document_mask
        documents = packed_documents(ROWS, SEQ_LEN + 1, step) if masked else None
        return batch_of_texts(stream, self._later, documents)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": torch.stack([self._rows, torch.full_like(self._rows, self._step)], dim=1)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = int(state_dict["rows"][0, 1])

    def close(self) -> None:
        pass


def _with_experts(name: str, **changes: Any) -> Any:
    args: Any = TINY[name]
    return replace(args, n_layers=4, moe=replace(args.moe, hidden_dim=48, **changes))


_LOSSES = {"aux_loss_weight": 0.05, "z_loss_weight": 0.02}
MODEL_CONFIGS: dict[str, Any] = {
    "llama3": TINY["llama3"],
    "llama3, tied": replace(TINY["llama3, tied"], n_layers=4),
    "gemma3": TINY["gemma3"],
    "qwen3, experts": _with_experts("qwen3, experts", use_bias=True, **_LOSSES),
    "gpt_oss": _with_experts("gpt_oss", **_LOSSES),
    "llama4": _with_experts("llama4", **_LOSSES),
    "deepseek_v3": replace(
        _with_experts("deepseek_v3", aux_loss_weight=0.5, aux_loss_per_sequence=True), mtp_depth=2
    ),
}


def get_train_spec(flavor: str) -> TrainSpec:
    args = MODEL_CONFIGS[flavor]
    spec = replace(tiny_spec(flavor), model_args=args, build_tokenizer_fn=None)
    if later := getattr(args, "mtp_depth", 0):
        loss = partial(build_multi_token_loss, weight=args.mtp_loss_weight)
        spec = replace(spec, build_loss_fn=loss)
    return replace(spec, build_dataloader_fn=partial(UnevenBatches, later))


register_train_spec("exact", get_train_spec)
