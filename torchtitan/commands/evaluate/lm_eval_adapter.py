"""Adapts a model of ours to lm-evaluation-harness (github.com/EleutherAI).

`TaskModel` answers the three kinds of requests without importing that package; only `run_tasks`
imports it, and passes the model on.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any

from torchtitan.commands.evaluate.task_options import TaskOptions
from torchtitan.errors import ConfigError
from torchtitan.generation.generator import Generator
from torchtitan.generation.load import LoadedModel
from torchtitan.generation.scoring import rolling_windows, score
from torchtitan.generation.text import TextStream, first_token
from torchtitan.tools.logging import rank0


class TaskModel:
    """Answers the requests of `lm_eval.api.model.LM`, in its terms: `args` of each is a tuple.

    Args:
        loaded: the model; several ranks share it, and each gets all requests.
        batch_size: requests in a pass.
        max_seq_len: tokens that the model may see at a time.
        add_bos: begin every context with bos.
    """

    def __init__(
        self, loaded: LoadedModel, batch_size: int, max_seq_len: int, add_bos: bool = False
    ) -> None:
        source = loaded.source
        self._model = loaded.model
        self._tokenizer = source.tokenizer
        self._generator = Generator(
            loaded.model, source.stop_tokens, loaded.tp_group, source.max_seq_len
        )
        self._batch_size = batch_size
        self.max_seq_len = max_seq_len
        self._before = first_token(self._tokenizer)
        self._prefix = [self._before] if add_bos else []

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For `(context, continuation)`, return its log-likelihood, and whether it is greedy.

        Raises:
            ConfigError: a continuation is longer than the model may see.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > self.max_seq_len:
            raise ConfigError(f"--tasks: a task scores {longest} tokens, but {self._told_length}")
        self._warn_of_cuts([len(a) + len(b) - 1 - self.max_seq_len for a, b in pairs])
        scores = score(self._model, pairs, self._batch_size, self.max_seq_len)
        return [(s.log_likelihood, s.is_greedy) for s in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For `(text,)`, return its log-likelihood, each token with as much context as allowed."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = list(self._tokenizer.encode(request.args[0]))
            for pair in rolling_windows(tokens, self._before, self.max_seq_len):
                windows.append(pair)
                owners.append(number)
        sums = [0.0] * len(requests)
        scores = score(self._model, windows, self._batch_size, self.max_seq_len)
        for number, result in zip(owners, scores, strict=True):
            sums[number] += result.log_likelihood
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For `(context, options)`, return the text that follows, up to one of `options["until"]`.

        The options are those of `transformers`: `max_gen_toks`, `do_sample`, `temperature`,
        `top_k`, `top_p`.

        Raises:
            ConfigError: raised before anything is generated: another option would change the text,
                or the new tokens leave no room for a context.
        """
        options = [TaskOptions.of(request.args[1]) for request in requests]
        contexts = [self._tokenizer.encode(request.args[0]) for request in requests]
        prompts = [self._begin(list(tokens)) for tokens in contexts]
        rooms = [self.max_seq_len - option.max_new_tokens for option in options]
        for room, option in zip(rooms, options, strict=True):
            if room < 1:
                raise ConfigError(
                    f"--tasks: a task generates {option.max_new_tokens} tokens (max_gen_toks), "
                    f"which leaves no room for the context: {self._told_length}"
                )
        self._warn_of_cuts([len(p) - room for p, room in zip(prompts, rooms, strict=True)])
        prompts = [prompt[-room:] for prompt, room in zip(prompts, rooms, strict=True)]
        texts: list[str] = []
        while (first := len(texts)) < len(prompts):
            alike = itertools.takewhile(options[first].is_like, options[first:])
            batch = list(itertools.islice(alike, self._batch_size))
            end = first + len(batch)
            texts += self._generate(prompts[first:end], batch, range(first, end))
        return texts

    def _generate(
        self, prompts: list[list[int]], options: list[TaskOptions], streams: Sequence[int]
    ) -> list[str]:
        """Generate texts with options that are alike. Each ends before one of its `until`."""
        texts = [TextStream(self._tokenizer, []) for _ in prompts]
        longest = [max(map(len, option.until), default=1) for option in options]
        ends = [""] * len(prompts)

        def on_token(number: int, token: int | None) -> bool:
            if token is None:
                return True
            # Not in the whole text, which would take longer with every token.
            ends[number] = ends[number][-longest[number] :] + texts[number].add(token)
            return any(stop in ends[number] for stop in options[number].until)

        first = options[0]
        completions = self._generator.generate(
            prompts, first.max_new_tokens, first.sampling, streams, on_token
        )
        decoded = [self._tokenizer.decode(completion.tokens) for completion in completions]
        return [
            min((text.partition(stop)[0] for stop in option.until), key=len, default=text)
            for text, option in zip(decoded, options, strict=True)
        ]

    @property
    def _told_length(self) -> str:
        return f"the model sees {self.max_seq_len} tokens at a time (--seq-len)"

    def _warn_of_cuts(self, excess: Sequence[int]) -> None:
        """Warn of cut contexts. Args: excess: tokens beyond the limit in each text, if above 0."""
        cut = [tokens for tokens in excess if tokens > 0]
        if cut:
            rank0.warning(
                "%d of %d contexts lose their beginning, up to %d tokens of it: %s",
                *(len(cut), len(excess), max(cut), self._told_length),
            )

    def _begin(self, tokens: list[int]) -> list[int]:
        """Prepend bos if it is missing; return at least one token."""
        prefix = [] if tokens[:1] == self._prefix else self._prefix
        return [*prefix, *tokens] or [self._before]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both as in the joined text, where a space may belong to either."""
        if not context:
            return [self._before], list(self._tokenizer.encode(continuation))
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole = list(self._tokenizer.encode(context + continuation))
        length = min(len(self._tokenizer.encode(context)), len(whole) - 1)
        return self._begin(whole[:length]), whole[length:]


def require_lm_eval() -> None:
    """Raise `ConfigError` if the package is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs lm-evaluation-harness, which is missing: pip install lm_eval"
        )


def run_tasks(
    model: TaskModel,
    tasks: list[str],
    num_fewshot: int | None,
    limit: int | None,
    include_path: str | None,
) -> dict[str, Any]:
    """Return the result of `lm_eval.simple_evaluate`: `results` has the metrics of each task."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Model(LM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return model.loglikelihood(requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return model.loglikelihood_rolling(requests)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return model.generate_until(requests)

    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
        raise ConfigError(f"--tasks {unknown[0]}: lm_eval has no such task.{hint}")
    return lm_eval.simple_evaluate(
        model=Model(),
        tasks=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
    )
