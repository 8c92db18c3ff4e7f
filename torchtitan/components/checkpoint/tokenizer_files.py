"""The tokenizer's files in a Hugging Face folder, and its chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torchtitan.components.tokenizer import BytesTokenizer, HuggingFaceTokenizer, Tokenizer
from torchtitan.data.chat import CHATML, load_template, read_fields
from torchtitan.errors import BadDocumentError, CheckpointError, DataError
from torchtitan.tools.foreign_files import is_file, read_text
from torchtitan.tools.logging import logger

from .folder import final_folder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_BOS, _EOS = "<|bos|>", "<|eos|>"
"""Of the tokenizer `bytes`."""
_ANSWER = "Yes."
_EXAMPLE = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": _ANSWER}]


def write_tokenizer(folder: Path, tokenizer: str, add_bos: bool | None) -> Tokenizer | None:
    """Write a tokenizer's files and return it; None if there is none that can be opened.

    Args:
        tokenizer: `bytes` or a folder; "": none.
        add_bos: whether the training documents began with BOS; None: unknown.
    """
    if not tokenizer:
        return None
    if tokenizer == "bytes":
        write_bytes_tokenizer(folder, bool(add_bos))
        return BytesTokenizer()
    source = Path(tokenizer).expanduser()
    for name in TOKENIZER_FILES:
        if is_file(source / name, CheckpointError):
            shutil.copyfile(source / name, folder / name)
    try:
        opened = HuggingFaceTokenizer(source)
    except DataError as error:
        logger.warning("%s is saved without a tokenizer: %s", final_folder(folder), error)
        return None
    # The copied files are not changed, since each class of tokenizers stores this differently.
    if None not in (add_bos, opened.bos_id) and opened.adds_bos != add_bos:
        logger.warning(
            "the run had data.add_bos = %s, but its tokenizer, %s, %s, and so does the exported "
            "one: prompts will not begin like the documents of the run",
            json.dumps(add_bos),
            tokenizer,
            "begins texts with bos" if opened.adds_bos else "does not begin texts with bos",
        )
    return opened


def write_bytes_tokenizer(folder: Path, add_bos: bool = False) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` with the ids of `BytesTokenizer`.

    Args:
        add_bos: begin texts with BOS, unless they are encoded without special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    # A byte-level BPE without merges: every byte is a token. The vocabulary must name bytes by
    # GPT-2's characters: themselves if printable in Latin-1, the others in order by those from 256.
    characters = pre_tokenizers.ByteLevel.alphabet()
    bytes_in_their_order = sorted(range(256), key=lambda byte: (chr(byte) not in characters, byte))
    vocabulary = dict(zip(sorted(characters), bytes_in_their_order, strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_BOS, special=True), AddedToken(_EOS, special=True)])
    assert tokenizer.token_to_id(_BOS) == BytesTokenizer.bos_id
    assert tokenizer.token_to_id(_EOS) == BytesTokenizer.eos_id
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{_BOS} $A",
            pair=f"{_BOS} $A {_BOS}:1 $B:1",
            special_tokens=[(_BOS, BytesTokenizer.bos_id)],
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": _EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


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
