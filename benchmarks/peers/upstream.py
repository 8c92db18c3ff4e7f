"""The `torchtitan` package of PyPI, 0.2.2, as a contestant, under the Python that has it:
`VENV/bin/python benchmarks/peers/upstream.py PLAN`.

Run as a file and not as a module, so that `torchtitan` is that package and not this repository.
It runs on CUDA devices; for a CPU, `_run_on_cpu` gives it a device that has what it asks of one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from turns import Turns


def _run_on_cpu() -> None:
    """Called before the package is imported, which looks for a device then."""
    import torch._utils

    torch._utils._get_available_device_type = lambda: "cpu"
    none = SimpleNamespace(total_memory=1, name="cpu")
    for name, value in {
        "get_device_name": lambda *_: "cpu",
        "get_device_properties": lambda *_: none,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "memory_stats": lambda *_: {},
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
    }.items():
        setattr(torch.cpu, name, value)


def main(plan_file: str) -> None:
    plan = json.loads(Path(plan_file).read_text())
    turns = Turns(plan)
    if not torch.cuda.is_available():
        _run_on_cpu()

    from torchtitan.components.dataloader import ParallelAwareDataloader

    from torchtitan.config import ConfigManager
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs
    from torchtitan.protocols import train_spec
    from torchtitan.tools.logging import init_logger
    from torchtitan.train import Trainer

    class Batches(IterableDataset):
        def __iter__(self) -> Any:
            sequences = torch.load(plan["sequences"], weights_only=True)
            for sequence in sequences:
                yield {"input": sequence[:-1]}, sequence[1:]

    class Contestant(Trainer):
        def train_step(self, data_iterator: Any) -> None:
            turns.before_step()
            super().train_step(data_iterator)

        def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
            loss = super().forward_backward_step(**kwargs)
            turns.losses.append(loss.detach())
            return loss

    sizes = plan["model"]
    spec = train_spec.get_train_spec("llama3")
    spec.model_args["benchmark"] = TransformerModelArgs(
        dim=sizes["dim"],
        n_layers=sizes["n_layers"],
        n_heads=sizes["n_heads"],
        n_kv_heads=sizes["n_kv_heads"],
        vocab_size=sizes["vocab_size"],
        multiple_of=sizes["ffn_dim"],  # rounds two thirds of 4 x dim up to this
        rope_theta=sizes["rope_theta"],
        norm_eps=sizes["norm_eps"],
    )
    spec.build_tokenizer_fn = None
    spec.build_dataloader_fn = lambda **_: ParallelAwareDataloader(
        Batches(), dp_rank=0, dp_world_size=1, batch_size=plan["local_batch_size"]
    )

    train_spec.get_train_spec = lambda _: spec

    init_weights = Transformer.init_weights

    def same_weights(model: Any, *args: Any, **kwargs: Any) -> None:
        init_weights(model, *args, **kwargs)
        adapter = spec.state_dict_adapter(spec.model_args["benchmark"], None)
        weights = adapter.from_hf(load_file(Path(plan["weights"], "model.safetensors")))
        # Compiled blocks have a name more.
        names = {name.replace("_orig_mod.", ""): name for name in model.state_dict()}
        weights = {names[name]: weight for name, weight in weights.items()}
        missing = model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys, missing
        assert all("freqs" in name for name in missing.missing_keys), missing

    Transformer.init_weights = same_weights

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(plan["port"])}
    init_logger()
    options: dict[str, Any] = {
        "job.dump_folder": plan["folder"],
        "model.name": "llama3",
        "model.flavor": "benchmark",
        "optimizer.lr": plan["lr"],
        "optimizer.beta1": plan["betas"][0],
        "optimizer.beta2": plan["betas"][1],
        "optimizer.eps": plan["eps"],
        "optimizer.weight_decay": plan["weight_decay"],
        "lr_scheduler.warmup_steps": 0,
        "lr_scheduler.decay_ratio": 0.0,
        "training.local_batch_size": plan["local_batch_size"],
        "training.global_batch_size": plan["local_batch_size"] * plan["accumulation_steps"],
        "training.seq_len": plan["seq_len"],
        "training.steps": plan["steps"],
        "training.max_norm": plan["max_norm"],
        "training.mixed_precision_param": plan["precision"],
        "activation_checkpoint.mode": "none",
    }
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    if plan["compile"]:
        arguments.append("--compile.enable")
    trainer = Contestant(ConfigManager().parse_args(arguments))
    trainer.train()
    turns.finish()
    trainer.close()


if __name__ == "__main__":
    main(sys.argv[1])
