"""Parses a task's options for generated text in lm-evaluation-harness (`generation_kwargs`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchtitan.errors import ConfigError
from torchtitan.generation.sampling import Sampling

DEFAULT_NEW_TOKENS = 256
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Synonyms; the first one in a task counts, as in lm-evaluation-harness."""
_UNDERSTOOD = frozenset({"until", "do_sample", "temperature", "top_k", "top_p", *_LIMITS})
_NO_EFFECT = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
}
"""Unsupported options of `transformers` -> the value with which they have no effect."""
_NO_EFFECT_ON_DRAWING = {"min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
"""The same for options that have no effect on greedy generation."""
_HARMLESS = frozenset({"use_cache", "early_stopping", "length_penalty"})
"""Options that change no text; those for beams have no effect, since there are no beams."""


@dataclass(frozen=True)
class TaskOptions:
    """Settings for generating one text."""

    until: list[str]
    """Each ends the text."""
    max_new_tokens: int
    sampling: Sampling

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> TaskOptions:
        """Parse the options. Raises `ConfigError` for one that matters and is not supported."""
        sampling = _sampling(fields)
        no_effect = dict(_NO_EFFECT)
        if sampling.temperature > 0:
            no_effect |= _NO_EFFECT_ON_DRAWING
            harmless = _HARMLESS
        else:
            harmless = _HARMLESS | _NO_EFFECT_ON_DRAWING.keys()
        for name, value in fields.items():
            if name in _UNDERSTOOD or name in harmless or value is None:
                continue
            if name not in no_effect or value != no_effect[name]:
                allowed = ", ".join(sorted(_UNDERSTOOD))
                raise ConfigError(
                    f"--tasks: a task has {name} = {value!r} in its generation_kwargs, which is "
                    f"not supported, and would change its texts. Allowed: {allowed}"
                )
        until = fields.get("until") or []
        limits = [fields[name] for name in _LIMITS if fields.get(name) is not None]
        return cls(
            [stop for stop in ([until] if isinstance(until, str) else until) if stop],
            int(limits[0]) if limits else DEFAULT_NEW_TOKENS,
            sampling,
        )

    def is_like(self, other: TaskOptions) -> bool:
        """Whether texts with both can be generated at the same time."""
        return (self.max_new_tokens, self.sampling) == (other.max_new_tokens, other.sampling)


def _sampling(fields: Mapping[str, Any]) -> Sampling:
    temperature = fields.get("temperature")
    if not fields.get("do_sample", bool(temperature)) or temperature == 0:
        return Sampling(temperature=0)
    temperature = 1.0 if temperature is None else temperature
    # In `transformers`, top_k = 0 means none.
    return Sampling(temperature, fields.get("top_k") or None, fields.get("top_p"))
