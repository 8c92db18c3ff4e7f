"""Convert text to token ids and back, with bytes or a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torchtitan.config import JobConfig
from torchtitan.config.load import fail
from torchtitan.errors import BadDocumentError, DataError, refuse_incomplete
from torchtitan.tools.foreign_files import is_file, read_bytes, read_json_if_any


class Tokenizer(Protocol):
    """Interface that `build_tokenizer_fn` returns.

    It may also have `fingerprint`, a string that differs between tokenizers; resumed runs compare
    it.
    """

    vocab_size: int
    """One more than the largest id."""
    bos_id: int | None
    """Token that begins documents with `data.add_bos`, if there is one."""
    eos_id: int
    """Token that ends each document."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without adding special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens."""


class BytesTokenizer:
    """UTF-8 bytes as ids 0 to 255, then BOS and EOS. Lossless, and needs no file."""

    vocab_size = 258
    bos_id: int | None = 256
    eos_id = 257
    fingerprint = path = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text. Invalid UTF-8 becomes U+FFFD: a model may stop inside a character."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class HuggingFaceTokenizer:
    """The `tokenizer.json` of a folder, run by the `tokenizers` library.

    The end-of-sequence token (required) and the beginning-of-sequence token (optional) are taken by
    name from `tokenizer_config.json` or `special_tokens_map.json`, or by id from
    `generation_config.json` or `config.json`; the first file that has one wins.

    Raises:
        DataError: the folder or a file is missing or damaged, or no EOS token is given.
        OutageError: a file cannot be read now.
        BadDocumentError: in `encode...`, for a text with an id refused by `leave_out`.
    """

    def __init__(self, folder: str | Path) -> None:
        import tokenizers

        self.path = str(folder)
        self._folder = Path(folder)
        path = self._folder / "tokenizer.json"
        if not is_file(path, DataError):
            missing = "has no tokenizer.json" if self._folder.is_dir() else "is not a folder"
            raise DataError(
                f"model.tokenizer_path = {str(folder)!r} {missing}. Give a folder with a Hugging "
                "Face tokenizer.json, or 'bytes', which needs no file"
            )
        content = read_bytes(path, DataError)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        """Hash of `tokenizer.json`, the same for the same tokenizer in any folder."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises no narrower type
            raise DataError(f"{path} is not a valid tokenizer: {error}") from error
        # Some folders are configured for inference; training must not truncate or pad.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Not the number of entries, since ids can have gaps.
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1

        eos_id = self._special_id("eos")
        if eos_id is None:
            raise DataError(
                f"{self._folder} does not define which token ends a document. Set eos_token in "
                "its tokenizer_config.json"
            )
        self.eos_id = eos_id
        self.bos_id = self._special_id("bos")
        self.limit: int | None = None
        """Texts with ids from this one on are refused, see `leave_out`."""

    def leave_out(self, limit: int) -> list[str] | None:
        """Refuse texts with ids from `limit` on, for which a model has no embeddings.

        Returns:
            The tokens of these ids. None, without any change, if one of them is BOS or EOS, or is
            not an added special token (such as an image token).
        """
        added = self._tokenizer.get_added_tokens_decoder()
        beyond = [i for i in self._tokenizer.get_vocab().values() if i >= limit]
        needed = max(self.eos_id, self.bos_id or 0)
        if needed >= limit or not all(i in added and added[i].special for i in beyond):
            return None
        self.limit = limit
        return [added[i].content for i in sorted(beyond)]

    def _within_limit(self, ids: list[int]) -> list[int]:
        if self.limit is not None and ids and max(ids) >= self.limit:
            raise BadDocumentError(
                f"a text has the token {self._tokenizer.id_to_token(max(ids))!r} ({max(ids)}), "
                f"for which the model has no embedding: its vocabulary is {self.limit}"
            )
        return ids

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """Return the ids of consecutive pieces of a text, such as the turns of two speakers.

        Each piece is encoded separately, as when a model reads one piece and writes the next. But
        some tokenizers (Llama 2, Mistral) write a space before a text, which is right only for the
        first piece. They encode the whole text, and each token belongs to the piece in which it
        begins, not counting leading spaces: a word belongs to its own piece even if the space
        before it ends the previous piece.
        """
        if not self._writes_a_space_first:
            return [self.encode(piece) for piece in pieces]
        text = "".join(pieces)
        [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=False)
        ids = self._within_limit(encoding.ids)
        words = [text[start:end].lstrip() for start, end in encoding.offsets]
        starts = [
            end - len(word) if word else start
            for (start, end), word in zip(encoding.offsets, words, strict=True)
        ]
        bounds = itertools.accumulate(map(len, pieces[:-1]))
        cuts = [0, *(bisect.bisect_left(starts, bound) for bound in bounds), len(ids)]
        return [ids[first:last] for first, last in itertools.pairwise(cuts)]

    @cached_property
    def _writes_a_space_first(self) -> bool:
        config = json.loads(self._tokenizer.to_str())
        steps = [config.get("normalizer"), config.get("pre_tokenizer")]
        while steps:
            step = steps.pop() or {}
            steps += step.get("normalizers", []) + step.get("pretokenizers", [])
            kind = step.get("type")
            if kind == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                return True
            if kind == "Prepend" or (kind == "ByteLevel" and step.get("add_prefix_space")):
                return True
        return False

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids as `transformers` gives a text to a model.

        They include the tokens that tokenizer.json adds (BOS for many models).
        """
        return self._within_limit(self._tokenizer.encode(text).ids)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether `transformers` begins a text with BOS, as the model was trained."""
        setting = self._read("tokenizer_config.json").get("add_bos_token")
        if self.bos_id is None or isinstance(setting, bool):
            return self.bos_id is not None and setting is True
        return self.encode_prompt("a")[:1] == [self.bos_id]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode each text, on as many cores as the library may use."""
        # The fast method omits the tokens' offsets in the text and takes half of the time.
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [self._within_limit(encoding.ids) for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def decode_all(self, ids: Sequence[int]) -> str:
        """Return the text like `decode`, with special tokens as written in tokenizer.json."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _special_id(self, kind: str) -> int | None:
        """Return the id of the folder's `{kind}_token`, or its `{kind}_token_id`."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = self._read(name).get(f"{kind}_token")
            if isinstance(token, dict):  # a serialized AddedToken
                token = token.get("content")
            if token is not None:
                token_id = self._tokenizer.token_to_id(str(token))
                if token_id is None:
                    raise DataError(
                        f"{self._folder / name}: {kind}_token = {token!r} is not in the vocabulary "
                        "of tokenizer.json"
                    )
                return token_id
        for name in ("generation_config.json", "config.json"):
            token_id = self._read(name).get(f"{kind}_token_id")
            if isinstance(token_id, list):  # several tokens may end a chat turn
                token_id = token_id[0] if token_id else None
            if token_id is not None:
                if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                    raise DataError(
                        f"{self._folder / name}: {kind}_token_id = {token_id!r} is not an id of "
                        f"tokenizer.json (0 to {self.vocab_size - 1})"
                    )
                return token_id
        return None

    def _read(self, name: str) -> dict[str, Any]:
        return read_json_if_any(self._folder / name, DataError)


def build_tokenizer(job_config: JobConfig) -> Tokenizer:
    """Return the tokenizer of `model.tokenizer_path`.

    Raises:
        ConfigError: there is no such tokenizer.
        DataError: the tokenizer cannot be loaded; `OutageError`: not now.
    """
    path = job_config.model.tokenizer_path
    file = Path(path).expanduser() / "tokenizer.json"
    if path != "bytes" and not is_file(file, DataError):
        fail(
            job_config,
            "model.tokenizer_path",
            "not a folder with a Hugging Face tokenizer.json. Fetch one with `torchtitan download "
            "ORGANISATION/NAME --include tokenizer --include config` (into assets/NAME), or use "
            "'bytes', which needs no file, for a model with few ids",
        )
    return open_tokenizer(path)


def path_of(tokenizer: Any) -> str:
    """Return `bytes` or the folder to reopen a tokenizer from; "" for None and custom ones."""
    ours = type(tokenizer) in (BytesTokenizer, HuggingFaceTokenizer)
    return str(tokenizer.path) if ours else ""


def check_tokenizer(tokenizer: Any, job_config: JobConfig) -> None:
    """Raise `ConfigError` if a tokenizer lacks an attribute that is needed later."""
    if tokenizer is None:
        return
    wanted = ("vocab_size", "bos_id", "eos_id", "encode", "decode")
    missing = [name for name in wanted if not hasattr(tokenizer, name)]
    needed = f". A tokenizer needs {', '.join(wanted)}; see torchtitan.components.Tokenizer"
    maker = f"build_tokenizer_fn of {job_config.model.name}"
    refuse_incomplete(tokenizer, maker, missing, needed)


def open_tokenizer(path: str) -> BytesTokenizer | HuggingFaceTokenizer:
    """Open `bytes` or the tokenizer of a folder. Raises `DataError` if it cannot be loaded."""
    return BytesTokenizer() if path == "bytes" else HuggingFaceTokenizer(Path(path).expanduser())
