"""Conversations as training text: a chat template, with loss on the assistant's words alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchtitan.errors import BadDocumentError, DataError, outage_or

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Used where neither the config nor the tokenizer has a template."""


class ChatTemplate:
    """A Jinja template, as tokenizers on the Hugging Face hub come with.

    Args:
        source: the template; it sees `messages`, `add_generation_prompt`, `bos_token` and
            `eos_token`.
        special_tokens: values of the last two.
        name: where it comes from, for errors.

    Raises:
        DataError: it is no Jinja template.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], name: str) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = _refuse
        self._name = name
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"{name} is not a Jinja template: {error}") from error

    def segments(self, messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
        """The conversation in pieces, each with whether it is trained on.

        Trained on is what the assistant has to write: from the end of the prompt for it to the end
        of its message. So a piece begins where generation would, and its tokens are those that the
        model will have to give.

        Raises:
            BadDocumentError: a message lacks its role or content, the assistant says nothing, or
                the template refuses the conversation, or writes what was said anew when more is.
        """
        for number, message in enumerate(messages):
            lacking = [key for key in ("role", "content") if not isinstance(message.get(key), str)]
            if lacking:
                raise BadDocumentError(f"message {number} (from 0) has no text {lacking[0]!r}")
        pieces, done = [], ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], prompt=True)
            spoken = self._render(messages[: number + 1], prompt=False)
            if not prompt.startswith(done) or not spoken.startswith(prompt):
                raise BadDocumentError(
                    f"{self._name} does not write a conversation from left to right, so what the "
                    f"assistant says in message {number} (from 0) cannot be told apart"
                )
            pieces += [(prompt[len(done) :], False), (spoken[len(prompt) :], True)]
            done = spoken
        if not pieces:
            raise BadDocumentError("the conversation has no message of the role 'assistant'")
        return [(text, trained) for text, trained in pieces if text]

    def _render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        import jinja2

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=prompt, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise BadDocumentError(f"{self._name} refuses the conversation: {error}") from error


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def load_template(path: str | None, tokenizer_path: str) -> ChatTemplate:
    """The template of a file, or else of a tokenizer's folder, or else ChatML.

    Args:
        path: `data.chat_template`.
        tokenizer_path: `model.tokenizer_path`.

    Raises:
        DataError: a file cannot be read, or is no template.
    """
    folder = Path(tokenizer_path).expanduser()
    config = _read_json(folder / "tokenizer_config.json")
    special_tokens = {}
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        special_tokens[name] = (token.get("content") if isinstance(token, dict) else token) or ""
    if path:
        return ChatTemplate(_read(Path(path).expanduser()), special_tokens, path)
    own = folder / "chat_template.jinja"
    if own.is_file():
        return ChatTemplate(_read(own), special_tokens, str(own))
    if isinstance(config.get("chat_template"), str):
        name = f"chat_template of {folder / 'tokenizer_config.json'}"
        return ChatTemplate(config["chat_template"], special_tokens, name)
    return ChatTemplate(CHATML, special_tokens, "ChatML")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"data.chat_template: {path} cannot be read: {error}"
        raise outage_or(DataError, problem, error) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # the tokenizer has its own message for that
    return content if isinstance(content, dict) else {}
