"""Hugging Face's `Trainer` as a contestant: `python -m benchmarks.peers.hugging_face PLAN`.

Its defaults, but for what the comparison fixes: the batch, AdamW's numbers (fused, as ours),
clipping, a constant rate, no checkpoints.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

from benchmarks.peers.turns import Turns


class Sequences(Dataset):
    """`[n, seq + 1]` token ids."""

    def __init__(self, sequences: torch.Tensor) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens, labels = self._sequences[index, :-1], self._sequences[index, 1:]
        # The model shifts `labels` itself, which would lose the last token; `shift_labels` are not
        # shifted. The trainer counts the tokens of `labels`.
        return {"input_ids": tokens, "labels": labels, "shift_labels": labels}


class Contestant(transformers.Trainer):
    turns: Turns

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.turns.losses.append(loss)
        return loss

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]  # ours decays norms too

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class BeforeStep(transformers.TrainerCallback):
    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._turns.before_step()


def main(plan_file: str) -> None:
    plan = json.loads(Path(plan_file).read_text())
    turns = Turns(plan)
    model = transformers.AutoModelForCausalLM.from_pretrained(plan["weights"], dtype="float32")
    trainer = Contestant(
        model,
        transformers.TrainingArguments(
            output_dir=plan["folder"],
            max_steps=plan["steps"],
            per_device_train_batch_size=plan["local_batch_size"],
            gradient_accumulation_steps=plan["accumulation_steps"],
            optim="adamw_torch_fused",
            learning_rate=plan["lr"],
            adam_beta1=plan["betas"][0],
            adam_beta2=plan["betas"][1],
            adam_epsilon=plan["eps"],
            weight_decay=plan["weight_decay"],
            max_grad_norm=plan["max_norm"],
            lr_scheduler_type="constant",
            logging_steps=10,
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=plan["precision"] == "bfloat16",
            use_cpu=not torch.cuda.is_available(),  # which bf16 asks for
            torch_compile=plan["compile"],
            remove_unused_columns=False,  # it does not know `shift_labels`
        ),
        train_dataset=Sequences(torch.load(plan["sequences"], weights_only=True)),
        callbacks=[BeforeStep(turns)],
    )
    trainer.turns = turns
    trainer.train()
    turns.finish()


if __name__ == "__main__":
    main(sys.argv[1])
