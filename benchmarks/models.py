"""Compare our models with those of `transformers`: forward and backward pass, and generation.

Both have the same weights and tokens, and take turns in one process, so that disturbances of the
machine that last longer than a turn affect both; the result is the ratio of neighbouring turns.
Equal losses and equal generated tokens show that both do the same work.

    python -m benchmarks.models [--model qwen3 ...] [--rounds 9] [--profile]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.report import Bar, Spread, Table, verdict
from benchmarks.trainer import Times
from torchtitan.generation.generator import Generator
from torchtitan.generation.sampling import Sampling
from torchtitan.models.from_hf import train_spec_of_hf_folder

BATCH, SEQ_LEN = 2, 512
PROMPT, NEW_TOKENS = 64, 32
LOSS_TOLERANCE = 1e-4

_COMMON: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 4096,  # otherwise the output layer would take most of the time
    "max_position_embeddings": 2048,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 512}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 512,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama3": {"model_type": "llama", "rope_parameters": _ROPE},
    "qwen3": {"model_type": "qwen3", "rope_parameters": _ROPE},
    "qwen3 (experts)": {
        **{"model_type": "qwen3_moe", "rope_parameters": _ROPE, "num_experts": 8},
        **{**_EXPERTS, "norm_topk_prob": True},
    },
    "deepseek_v3": {
        **{"model_type": "deepseek_v3", "rope_parameters": _YARN, **_EXPERTS},
        **{"num_key_value_heads": 8, "head_dim": 32, "first_k_dense_replace": 1},
        **{"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
        **{"q_lora_rank": 256, "kv_lora_rank": 128, "v_head_dim": 64},
        **{"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "num_nextn_predict_layers": 0},
    },
    "gpt_oss": {
        **{"model_type": "gpt_oss", "rope_parameters": _YARN | {"truncate": False}},
        **{"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 512},
        "sliding_window": 128,
    },
    "llama4": {
        **{"model_type": "llama4_text", "rope_parameters": _ROPE, "num_local_experts": 8},
        **{"intermediate_size": 512, "intermediate_size_mlp": 1536},
        **{"interleave_moe_layer_step": 2, "attention_chunk_size": 256},
    },
    "gemma3": {
        **{"model_type": "gemma3_text", "sliding_window": 256, "sliding_window_pattern": 2},
        "query_pre_attn_scalar": 64,
    },
}
"""Row of the table -> fields of a `config.json`."""
_TINY = {"num_hidden_layers": 1, "vocab_size": 128}


@dataclass
class Comparison:
    """Seconds of each turn, ours and theirs."""

    name: str
    ours: Times = field(default_factory=Times)
    theirs: Times = field(default_factory=Times)
    difference: float = 0.0
    """Relative difference of the losses."""

    def ratio(self, clock: str) -> Spread:
        """Return our speed relative to theirs, by neighbouring turns; by `wall` or `cpu`."""
        return Spread.of_ratios(getattr(self.theirs, clock), getattr(self.ours, clock))


def build(name: str, quick: bool) -> tuple[Any, Any]:
    """Build the model of `transformers` with default settings, and ours with its weights."""
    import transformers

    fields = _COMMON | CONFIGS[name] | (_TINY if quick else {})
    config = transformers.CONFIG_MAPPING[fields.pop("model_type")](**fields)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        _, spec = train_spec_of_hf_folder(Path(folder))
        ours = spec.model_cls(spec.model_args).load_checkpoint(folder)
    return theirs, ours


def take_turns(
    name: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int
) -> Comparison:
    result = Comparison(name)
    ours(), theirs()
    for number in range(rounds):
        turns = [(ours, result.ours), (theirs, result.theirs)]
        for function, times in turns if number % 2 else reversed(turns):
            start = _now()
            function()
            times.add(start, _now())
    return result


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def training_step(model: Any, logits_of: Callable[[torch.Tensor], torch.Tensor], seq_len: int):
    """Return a function that does one forward and backward pass, and returns the loss."""
    tokens = torch.randint(100, (BATCH, seq_len + 1), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        model.zero_grad(set_to_none=True)
        logits = logits_of(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        return loss.item()

    return step


def compare_training(name: str, rounds: int, quick: bool = False) -> Comparison:
    """Compare training steps. Raises `RuntimeError` if the losses differ."""
    theirs, ours = build(name, quick)
    seq_len = 32 if quick else SEQ_LEN
    steps = (
        training_step(ours.train(), ours, seq_len),
        training_step(theirs.train(), lambda ids: theirs(ids, use_cache=False).logits, seq_len),
    )
    losses = [step() for step in steps]
    difference = abs(losses[0] - losses[1]) / losses[1]
    if difference > LOSS_TOLERANCE:
        raise RuntimeError(f"{name}: the losses differ by {difference:.1e}")
    result = take_turns(name, *steps, rounds)
    result.difference = difference
    return result


def compare_generation(name: str, rounds: int, quick: bool = False) -> Comparison:
    """Compare greedy generation of one prompt. Raises `RuntimeError` if the tokens differ."""
    theirs, ours = build(name, quick)
    generator, theirs = Generator(ours), theirs.eval()
    prompt = torch.randint(100, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    mask, greedy, new = torch.ones_like(prompt), Sampling(temperature=0), 4 if quick else NEW_TOKENS

    def our_tokens() -> list[int]:
        return generator.generate(prompt.tolist(), new, greedy)[0].tokens

    def their_tokens() -> list[int]:
        out = theirs.generate(
            prompt, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0
        )
        return out[0, PROMPT:].tolist()

    if our_tokens() != their_tokens():
        raise RuntimeError(f"{name}: the generated tokens differ")
    return take_turns(name, our_tokens, their_tokens, rounds)


def training_table(comparisons: list[Comparison]) -> Table:
    rows = []
    for c in comparisons:
        ratio = c.ratio("wall")
        tokens = BATCH * SEQ_LEN
        rows.append(
            [
                c.name,
                f"{tokens / Spread.of(c.ours.wall).median:.0f}",
                f"{tokens / Spread.of(c.theirs.wall).median:.0f}",
                f"**{ratio.median:.2f}** ({ratio.low:.2f} to {ratio.high:.2f})",
                str(c.ratio("cpu")),
                f"{c.difference:.0e}",
                verdict(ratio.median, at_least=1.0),
            ]
        )
    return Table(
        "Forward and backward pass against transformers",
        [
            "model",
            "ours, tokens/s",
            "transformers, tokens/s",
            "ratio",
            "by CPU time",
            "loss difference",
            "target",
        ],
        rows,
        f"{BATCH} sequences of {SEQ_LEN} tokens, float32, 4 layers of dim 512, {_versions()}; "
        "median (lowest to highest) of "
        f"{len(comparisons[0].ours.wall)} rounds, a turn of each.",
        [Bar(c.name, c.ratio("wall"), 1.0) for c in comparisons],
        "tokens/s of ours over those of transformers",
    )


def generation_table(comparisons: list[Comparison]) -> Table:
    rows = []
    for c in comparisons:
        ratio = c.ratio("wall")
        rows.append(
            [
                c.name,
                f"{NEW_TOKENS / Spread.of(c.ours.wall).median:.0f}",
                f"{NEW_TOKENS / Spread.of(c.theirs.wall).median:.0f}",
                f"**{ratio.median:.2f}** ({ratio.low:.2f} to {ratio.high:.2f})",
                str(c.ratio("cpu")),
            ]
        )
    return Table(
        "Greedy generation against transformers",
        ["model", "ours, tokens/s", "transformers, tokens/s", "ratio", "by CPU time"],
        rows,
        f"{NEW_TOKENS} new tokens after a prompt of {PROMPT}, both with a cache; the same tokens.",
        [Bar(c.name, c.ratio("wall")) for c in comparisons],
        "tokens/s of ours over those of transformers",
    )


def _versions() -> str:
    import transformers

    return f"transformers {transformers.__version__} as it comes (attention and experts by default)"


def run(quick: bool = False) -> list[Table]:
    """Run all models."""
    names, rounds = (["llama3", "gpt_oss"], 2) if quick else (list(CONFIGS), 7)
    return [
        training_table([compare_training(name, rounds, quick) for name in names]),
        generation_table([compare_generation(name, rounds, quick) for name in names]),
    ]


def profile(name: str) -> None:
    """Print the time profile of one step of each."""
    theirs, ours = build(name, quick=False)
    for title, model, logits_of in (
        ("ours", ours, ours),
        ("transformers", theirs, lambda ids: theirs(ids, use_cache=False).logits),
    ):
        step = training_step(model.train(), logits_of, SEQ_LEN)
        step()
        with torch.profiler.profile() as profiler:
            step()
        averages = profiler.key_averages()
        print(f"{name}, {title}")
        print(averages.table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, nargs="+", default=list(CONFIGS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead")
    args = parser.parse_args(argv)
    if args.profile:
        for name in args.model:
            profile(name)
        return 0
    print(training_table([compare_training(n, args.rounds) for n in args.model]).markdown())
    print(generation_table([compare_generation(n, args.rounds) for n in args.model]).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
