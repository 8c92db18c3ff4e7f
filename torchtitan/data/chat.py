"""Turns conversations into training text by a chat template, with loss on assistant text only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torchtitan.errors import BadDocumentError, DataError, begin_errors_with
from torchtitan.tools.foreign_files import is_file, read_json, read_text
from torchtitan.tools.logging import rank0

from .rows import Conversation

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Used where neither the config nor the tokenizer has a template."""

_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Special tokens passed to a template, if the tokenizer has them."""

MARKS = "\ufdd0", "\ufdd1"
"""Written around the text of a `{% generation %}` block. Unicode reserves both as no characters."""

_REASONING = ("reasoning_content", "thinking", "reasoning")


Tools = list[dict[str, Any]] | None
"""JSON schemas."""


class ChatTemplate:
    """A Jinja template, as shipped with tokenizers on the Hugging Face hub.

    Args:
        source: the template; it sees `messages`, `tools`, `add_generation_prompt`, the special
            tokens, and the names of `chat_environment`.
        special_tokens: `bos_token` and others -> their texts.
        name: origin of the template, for errors.

    Raises:
        DataError: `source` is no Jinja template.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], name: str) -> None:
        import jinja2

        from .chat_environment import compile_template

        self._name = name
        self._special_tokens = special_tokens
        try:
            self._template, self._reads_tools, self._has_marks = compile_template(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise DataError(f"{name} is not a Jinja template: {error}") from error

    def segments(self, messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
        """Split the conversation into pieces `(text, trained)`.

        Trained pieces are the text that the assistant has to write: from the end of its generation
        prompt to the end of its message. So a piece begins where generation would, and its tokens
        are those that the model will have to generate. But if the template has `{% generation %}`
        blocks, they are the trained pieces. A message of weight 0 is not trained.

        Raises:
            BadDocumentError: a message lacks its role or content, or has another weight than 0 and
                1; the assistant says nothing; or the template refuses the conversation, leaves
                tools or their calls out, or has no `{% generation %}` blocks and renders earlier
                messages differently when later ones follow.
        """
        tools = _tools_of(messages)
        messages = _checked(messages)
        pieces = (self._marked if self._has_marks else self._located)(messages, tools)
        if not any(text and learned for text, learned in pieces):
            others = ", a text and another weight than 0" if pieces else ""
            raise BadDocumentError(
                f"the conversation has no message with the role 'assistant'{others}"
            )
        return [(text, trained) for text, trained in pieces if text]

    def _located(self, messages: list[dict[str, Any]], tools: Tools) -> list[tuple[str, bool]]:
        """Split the conversation where the assistant's prompts and messages end."""
        pieces, done = [], ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            said = messages[: number + 1]
            prompt = self._render(messages[:number], tools, prompt=True)
            spoken = self._render(said, tools, prompt=False)
            if not prompt.startswith(done) or not spoken.startswith(prompt):
                raise BadDocumentError(
                    f"{self._name} does not render a conversation from left to right, so the "
                    f"assistant's text in message {number} (counted from 0) cannot be located. Set "
                    "data.chat_template to a template that marks it by {% generation %}"
                )
            self._require_calls(said, tools, spoken)
            learned = message.get("weight") != 0
            pieces += [(prompt[len(done) :], False), (spoken[len(prompt) :], learned)]
            done = spoken
        return pieces

    def _marked(self, messages: list[dict[str, Any]], tools: Tools) -> list[tuple[str, bool]]:
        """Split the conversation at the template's marks."""
        for number, message in enumerate(messages):
            if message.get("tool_calls"):
                said = messages[: number + 1]
                self._require_calls(said, tools, self._render(said, tools, prompt=False))
        text = self._render_with_marks(messages, tools, prompt=False)
        begin, end = MARKS
        if text.count(begin) != text.count(end):
            raise BadDocumentError("the conversation has U+FDD0 or U+FDD1, which are no characters")
        parts = re.split(f"[{begin}{end}]", text)
        weights = [one.get("weight") for one in messages if one["role"] == "assistant"]
        if 0 not in weights:
            return [(part, number % 2 == 1) for number, part in enumerate(parts)]
        if len(parts) // 2 != len(weights):
            raise BadDocumentError(
                f"{self._name} marks {len(parts) // 2} texts of {len(weights)} messages of the "
                "assistant by {% generation %}, so it is unclear which have the weight 0"
            )
        learned = [False, *(value for weight in weights for value in (weight != 0, False))]
        return list(zip(parts, learned, strict=True))

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """Return the text before the assistant's next message. Raises `BadDocumentError`."""
        return self._render(_checked(messages), _tools_of(messages), prompt=True)

    def _require_calls(self, said: list[dict[str, Any]], tools: Tools, spoken: str) -> None:
        """Raise `BadDocumentError` if the last message has tool calls that `spoken` leaves out."""
        if said[-1].get("tool_calls") and self._without_calls(said, tools) == spoken:
            raise BadDocumentError(
                f"{self._name} leaves out the tool_calls of message {len(said) - 1} (counted from "
                "0). Set data.chat_template to a template that renders them"
            )

    def _without_calls(self, messages: list[dict[str, Any]], tools: Tools) -> str | None:
        """Render the messages, the last one without its tool calls; None if this is refused."""
        *before, message = messages
        without = {key: value for key, value in message.items() if key != "tool_calls"}
        try:
            return self._render([*before, without], tools, prompt=False)
        except BadDocumentError:  # the template needs calls, or text in their place
            return None

    def _render(self, messages: list[dict[str, Any]], tools: Tools, prompt: bool) -> str:
        text = self._render_with_marks(messages, tools, prompt)
        return re.sub(f"[{''.join(MARKS)}]", "", text) if self._has_marks else text

    def _render_with_marks(self, messages: list[dict[str, Any]], tools: Tools, prompt: bool) -> str:
        import jinja2

        if tools and not self._reads_tools:
            raise BadDocumentError(
                f"{self._name} leaves out the tools of the conversation. Set data.chat_template to "
                "a template that renders them"
            )
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=prompt,
                **self._special_tokens,
            )
        except (
            *(jinja2.TemplateError, TypeError, ValueError),
            *(LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError),
        ) as error:
            raise BadDocumentError(f"{self._name} rejects the conversation: {error}") from error


def _tools_of(messages: list[dict[str, Any]]) -> Tools:
    return messages.tools if isinstance(messages, Conversation) else None


def _checked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages as `transformers` renders them. Raises `BadDocumentError`."""
    for number, message in enumerate(messages):
        needed = ("role",) if message.get("tool_calls") else ("role", "content")
        lacking = [key for key in needed if not isinstance(message.get(key), str)]
        if lacking:
            raise BadDocumentError(f"message {number} (counted from 0) has no text {lacking[0]!r}")
        if message.get("weight") not in (None, 0, 1):
            raise BadDocumentError(
                f"message {number} (counted from 0) has the weight {message['weight']!r}. "
                "Allowed: 0 (not learned) and 1"
            )
    # In a table, a field that this message does not have is null.
    given = [{key: value for key, value in one.items() if value is not None} for one in messages]
    return [_with_reasoning(one) for one in given]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give the reasoning all names that templates read: gpt-oss's reads `thinking`."""
    found = [message[name] for name in _REASONING if name in message]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else message


def load_template(path: str | None, tokenizer_path: str, tell: bool = True) -> ChatTemplate:
    """Load the template of a file, or else of a tokenizer's folder, or else ChatML.

    Args:
        path: `data.chat_template`.
        tokenizer_path: `model.tokenizer_path`.
        tell: log which one is used.

    Raises:
        DataError: a file cannot be read or is no template, or the tokenizer has several templates
        and none is the default.
    """
    from .chat_environment import date_is_fixed

    folder = Path(tokenizer_path).expanduser()
    config = read_fields(folder / "tokenizer_config.json")
    source, name = _source(path, folder, config)
    template = ChatTemplate(source, _special_tokens(folder, config), name)
    if tell:
        if source is CHATML:
            rank0.warning(
                "conversations are rendered as ChatML: data.chat_template is unset, and "
                "model.tokenizer_path = %r has no chat template",
                tokenizer_path,
            )
        else:
            rank0.info("conversations are rendered with %s", name)
        if "strftime_now" in source and not date_is_fixed():
            rank0.warning(
                "%s renders the date on which a run starts, so a run that is resumed on another "
                "day reads different conversations. To fix the date, set the environment variable "
                "SOURCE_DATE_EPOCH (seconds since 1970)",
                name,
            )
    return template


def _source(path: str | None, folder: Path, config: dict[str, Any]) -> tuple[str, str]:
    """Return a template and its name for messages."""
    if path:
        with begin_errors_with("data.chat_template"):
            return read_text(Path(path).expanduser(), DataError), path
    own = folder / "chat_template.jinja"
    if is_file(own, DataError):
        return read_text(own, DataError), str(own)
    found = config.get("chat_template")
    if found is None:
        return CHATML, "ChatML"
    name = f"chat_template of {folder / 'tokenizer_config.json'}"
    if isinstance(found, list):
        named = [one for one in found if isinstance(one, dict) and "name" in one]
        found = {one["name"]: one.get("template") for one in named}
    if isinstance(found, dict):
        if "default" not in found:
            raise DataError(
                f"{name} has the templates {', '.join(map(repr, found))}, none of which is "
                "'default'. Write one of them to a file, and give it in data.chat_template"
            )
        found, name = found["default"], f"'default' in {name}"
    if not isinstance(found, str):
        raise DataError(f"{name} is a {type(found).__name__}, not text")
    return found, name


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the texts of the special tokens that the tokenizer has."""
    old = read_fields(folder / "special_tokens_map.json")
    texts = {}
    for name in (f"{kind}_token" for kind in _SPECIAL_TOKENS):
        token = old.get(name) if config.get(name) is None else config[name]
        if isinstance(token, dict):  # an AddedToken written out
            token = token.get("content")
        if token is not None:
            texts[name] = str(token)
    return texts


def read_fields(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON object file; none if the file is missing or damaged.

    Raises `OutageError` if it cannot be read now: a rank must not go on without what others read.
    """
    try:
        return read_json(path, DataError)
    except DataError:
        return {}  # opening the tokenizer reports it
