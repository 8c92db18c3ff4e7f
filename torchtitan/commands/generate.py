"""`torchtitan generate`: continue prompts with a trained model."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from torchtitan.components.checkpoint.tokenizer_files import end_of_turn
from torchtitan.config.options import parse_options, require_at_least_one, shown_as
from torchtitan.data.chat import load_template
from torchtitan.data.rows import document_of
from torchtitan.errors import ConfigError, DataError, begin_errors_with, outage_or
from torchtitan.generation.generator import Completion, Generator
from torchtitan.generation.load import (
    CheckpointSource,
    LoadedModel,
    ModelOptions,
    load_model,
    open_source,
    process_group,
)
from torchtitan.generation.sampling import Sampling
from torchtitan.generation.text import TextStream, encode_prompt
from torchtitan.runtime.world import rank, world_size
from torchtitan.tools.foreign_files import parse_json
from torchtitan.tools.logging import init_logger
from torchtitan.tools.result_file import require_folder, write_result

DESCRIPTION = """\
Continue prompts with a trained model, from a torchtitan checkpoint or a Hugging Face folder. See
docs/generating.md.

  torchtitan generate --checkpoint outputs --prompt "def main(" --temperature 0
  torchtitan generate --checkpoint Qwen3-0.6B --prompt "Once" --top-p 0.9
  torchrun --nproc-per-node 2 -m torchtitan generate \\
    --checkpoint Llama-3.1-8B --tensor-parallel-degree 2 --prompt "Once"

Text is written to stdout as it is generated; several prompts or samples follow one another.

Exit code: 0, or 2 for a mistake in the command or the checkpoint."""

DEFAULT_NEW_TOKENS = 256


@dataclass
class Options(ModelOptions):
    prompt: Annotated[tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="TEXT")] = field(
        default_factory=list
    )
    """Text to continue; may be given several times."""
    prompt_file: Annotated[str | None, shown_as("FILE")] = None
    """File whose text is the prompt; a .jsonl file has one prompt per line: {"prompt": "..."}, or
    with --chat {"messages": [...]}"""
    chat: bool = False
    """Each prompt is a user's message, rendered by the chat template of the run or tokenizer."""
    max_new_tokens: Annotated[int | None, shown_as("N")] = None
    """Tokens to generate. Default: 256, or fewer if the model's longest sequence leaves fewer"""
    temperature: float = 1.0
    """Divisor of the logits; 0 always takes the most likely token (greedy)."""
    top_k: Annotated[int | None, shown_as("N")] = None
    """Sample from this many most likely tokens."""
    top_p: Annotated[float | None, shown_as("P")] = None
    """Sample from the most likely tokens that together have this probability."""
    seed: int = 0
    """Seed; the same seed gives the same text for any batch size and number of ranks."""
    num_samples: int = 1
    """Texts per prompt."""
    batch_size: int = 16
    """Texts generated at the same time."""
    ignore_eos: bool = False
    """Continue after the model ends the text."""
    add_special_tokens: Annotated[bool | None, shown_as("{True,False}")] = None
    """Prepend the tokens that tokenizer.json adds, such as bos. Default: yes for Hugging Face
    folders and checkpoints converted from them; for a run's own checkpoint, only bos, and only if
    the run had data.add_bos"""
    json: Annotated[str | None, shown_as("FILE")] = None
    """Write one JSON object per text to this file: prompt, text, tokens, finish_reason."""


def main(argv: list[str]) -> int:
    """Run the command with the arguments after `torchtitan generate`; return the exit code."""
    options = parse_options(Options, argv, "torchtitan generate", DESCRIPTION)
    init_logger()
    require_at_least_one(options, "max_new_tokens", "num_samples", "batch_size")
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    if world_size() != options.tensor_parallel_degree:
        raise ConfigError(
            f"--tensor-parallel-degree {options.tensor_parallel_degree}: must equal the number of "
            f"processes, {world_size()}, because generation shards the model over all of them"
        )
    require_folder(options.json, "--json")
    texts = read_prompts(options)
    source = open_source(options)
    special, add_bos = options.add_special_tokens, False
    if special is None:  # a chat template writes bos itself where it is needed
        special, add_bos = not source.of_run and not options.chat, source.add_bos
    if options.chat:
        texts = render_chats(source, texts)
        add_bos &= source.of_run
    prompts = [encode_prompt(source.tokenizer, text, special, add_bos) for text in texts]
    max_new_tokens = limit_of_new_tokens(source, prompts, options.max_new_tokens)
    with process_group():
        return _generate(options, load_model(source), texts, prompts, max_new_tokens, sampling)


def render_chats(source: CheckpointSource, prompts: list[Any]) -> list[str]:
    """Render conversations up to the assistant's answer, and note the token that ends it.

    Args:
        prompts: a user's message each, or lists of messages.
    """
    chat_template = source.job_config.data.chat_template
    tokenizer_path = source.job_config.model.tokenizer_path
    template = load_template(chat_template, tokenizer_path)
    turn = end_of_turn(Path(tokenizer_path).expanduser(), chat_template)
    source.stop_tokens |= set() if turn is None else {turn}
    texts = []
    for number, prompt in enumerate(prompts, start=1):
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        with begin_errors_with(f"prompt {number}"):
            texts.append(template.prompt(prompt))
    return texts


def read_prompts(options: Options) -> list[Any]:
    """Read the texts, or lists of messages, of `--prompt` and `--prompt-file`."""
    texts = list(options.prompt)
    if options.prompt_file is not None:
        path = Path(options.prompt_file)
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            problem = f"--prompt-file {path} cannot be read: {reason}"
            raise outage_or(DataError, problem, error) from error
        if path.suffix != ".jsonl":
            return [*texts, content]
        # str.splitlines would also split at U+2028 and others, which JSON text may contain.
        for number, line in enumerate(content.split("\n"), start=1):
            if not line.strip():
                continue
            texts.append(_prompt_of(line, options.chat, f"{path}:{number}"))
    if not texts:
        raise ConfigError("no prompt: give --prompt TEXT or --prompt-file FILE")
    return texts


def _prompt_of(line: str, chat: bool, where: str) -> Any:
    try:
        row = parse_json(line)
        if chat and "messages" in row:
            return document_of(row, "messages")
        prompt = row["prompt"]
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        allowed = '{"prompt": "..."}' + (' or {"messages": [...]}' if chat else "")
        raise DataError(f"{where}: not {allowed}") from error
    if not isinstance(prompt, str):
        raise DataError(f"{where}: prompt is not a string")
    return prompt


def limit_of_new_tokens(
    source: CheckpointSource, prompts: list[list[int]], wanted: int | None
) -> int:
    """Return the number of tokens to generate. Raises `ConfigError` if the model supports fewer."""
    limit, longest = source.max_seq_len, max(map(len, prompts))
    if limit is None:
        return wanted or DEFAULT_NEW_TOKENS
    if longest >= limit or longest + (wanted or 1) > limit:
        raise ConfigError(
            f"the longest prompt has {longest} tokens and {wanted or 1} or more should follow, "
            f"but {source.model_name} of {source.folder} supports sequences of at most {limit}"
        )
    return wanted or min(DEFAULT_NEW_TOKENS, limit - longest)


def _generate(
    options: Options,
    loaded: LoadedModel,
    texts: list[str],
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
) -> int:
    source = loaded.source
    stop_tokens = () if options.ignore_eos else source.stop_tokens
    generator = Generator(loaded.model, stop_tokens, loaded.tp_group, source.max_seq_len)
    samples = options.num_samples
    texts = [text for text in texts for _ in range(samples)]
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    titles = [
        f"--- prompt {i // samples + 1}, sample {i % samples + 1}\n" for i in range(len(texts))
    ]
    if len(texts) == 1:
        titles = [""]
    printer = Printer(source, titles, texts, prompts)
    completions: list[Completion] = []
    start = time.perf_counter()
    for first in range(0, len(prompts), options.batch_size):

        def show(number: int, token: int | None, first: int = first) -> None:
            printer.add(first + number, token)

        numbers = range(first, min(first + options.batch_size, len(prompts)))
        completions += generator.generate(
            [prompts[i] for i in numbers],
            max_new_tokens,
            sampling,
            streams=numbers,
            on_token=show,
        )
    seconds = time.perf_counter() - start
    if rank() == 0:
        tokens = sum(len(completion.tokens) for completion in completions)
        sys.stderr.write(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s\n")
        if options.json is not None:
            write_result(options.json, _json_lines(texts, completions, printer), "--json")
    return 0


class Printer:
    """Writes texts to stdout in order, the first unfinished one while it is generated."""

    def __init__(
        self,
        source: CheckpointSource,
        titles: list[str],
        texts: list[str],
        prompts: list[list[int]],
    ) -> None:
        self.generated = [""] * len(texts)
        self._unwritten = [title + text for title, text in zip(titles, texts, strict=True)]
        self._streams = [TextStream(source.tokenizer, prompt) for prompt in prompts]
        self._over = [False] * len(texts)
        self._current = 0
        self._write()

    def add(self, number: int, token: int | None) -> None:
        """Add the next token of text `number`; None when the text is over."""
        stream = self._streams[number]
        text = stream.end() if token is None else stream.add(token)
        self.generated[number] += text
        self._unwritten[number] += text
        if token is None:
            self._unwritten[number] += "\n"
            self._over[number] = True
        self._write()

    def _write(self) -> None:
        while self._current < len(self._over):
            text, self._unwritten[self._current] = self._unwritten[self._current], ""
            if rank() == 0 and text:
                sys.stdout.write(text)
                sys.stdout.flush()
            if not self._over[self._current]:
                return
            self._current += 1


def _json_lines(texts: list[str], completions: list[Completion], printer: Printer) -> str:
    lines = [
        {
            "prompt": text,
            "text": generated,
            "tokens": completion.tokens,
            "finish_reason": completion.finish_reason,
        }
        for text, generated, completion in zip(texts, printer.generated, completions, strict=True)
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
