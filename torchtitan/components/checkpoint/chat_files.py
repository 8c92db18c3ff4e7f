"""Find the chat template and the end-of-turn token of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from torchtitan.data.chat import CHATML, load_template, read_fields
from torchtitan.errors import BadDocumentError, DataError
from torchtitan.tools.foreign_files import is_file, read_text
from torchtitan.tools.logging import logger

_ANSWER = "Yes."
_EXAMPLE = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": _ANSWER}]


def chat_template_of(path: str | None, tokenizer: str) -> str:
    """Return the template that `load_template` uses, or "" if it is one of the tokenizer's files.

    Args:
        path: `data.chat_template`.
        tokenizer: `model.tokenizer_path`.
    """
    if path:
        try:
            return read_text(Path(path).expanduser(), DataError)
        except DataError as error:
            logger.warning("data.chat_template is not exported: %s", error)
            return ""
    folder = Path(tokenizer).expanduser()
    if is_file(folder / "chat_template.jinja", DataError):
        return ""
    return (
        CHATML if read_fields(folder / "tokenizer_config.json").get("chat_template") is None else ""
    )


def end_of_turn(folder: Path, template: str | None = None) -> int | None:
    """Return the special token that follows an assistant's message in the folder's template.

    None if there is no such token, or if the template refuses a conversation of two messages.

    Args:
        folder: folder with a tokenizer.
        template: `data.chat_template`, a file that replaces the folder's template.
    """
    import tokenizers

    if not is_file(folder / "tokenizer.json", DataError):
        return None
    try:
        pieces = load_template(template, str(folder), tell=False).segments(_EXAMPLE)
    except BadDocumentError:
        return None
    except DataError as error:
        logger.warning("the token that ends a turn is unknown: %s", error)
        return None
    text = "".join(text for text, _ in pieces)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    after = tokenizer.encode(text.rpartition(_ANSWER)[2], add_special_tokens=False).ids
    return next((token for token in after if token in added and added[token].special), None)
