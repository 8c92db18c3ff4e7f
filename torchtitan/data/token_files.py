"""Opens documents that are token ids already, in memory-mapped files: the dataset `tokens`.

Three formats are read; docs/data.md describes the first.

* The folder that `torchtitan data prepare` writes: `index.json` and shards.
* Megatron-LM's indexed dataset: `NAME.bin` beside `NAME.idx`.
* nanoGPT's `.bin`: uint16 ids, bare or with the header of llm.c and modded-nanogpt; under llm.c's
  header for Llama 3 the ids are uint32.

Neither tokens nor an index are loaded: a document costs only the pages that it lies on.
"""

from __future__ import annotations

from pathlib import Path

from torchtitan.errors import ConfigError, DataError
from torchtitan.tools.foreign_files import is_file
from torchtitan.tools.text import is_url

from .files import find_files
from .foreign_tokens import MegatronTokens, NanoGPTTokens, megatron_index
from .prepared_tokens import INDEX, PreparedTokens
from .token_shards import TokenFiles


def open_token_files(path: str | None) -> TokenFiles:
    """Open tokens in any of the three formats, at a folder, a file or a glob.

    Raises:
        ConfigError: no path is given, or it is a URL.
        DataError: there is no such file, or it is damaged.
    """
    if path and is_url(path):
        raise ConfigError(
            f"dataset_path = {path!r}: tokens are memory-mapped, so they must be local files. "
            "Copy them"
        )
    folder = Path(path or "").expanduser()
    if path and is_file(folder / INDEX, DataError):
        return PreparedTokens(folder)
    if path and is_file(folder / "prepare.json", DataError):
        raise DataError(
            f"{folder} is unfinished: run the same `torchtitan data prepare` again to finish it"
        )
    files = [f for f in find_files(path, (".bin",)) if not f.endswith(".idx") or f == path]
    for file in files:
        if not file.endswith(".bin"):
            raise DataError(
                f"{file} holds no tokens: token files end in .bin. Read text with another dataset "
                "(jsonl, text, parquet), or tokenize it first: torchtitan data prepare"
            )
    with_index = [file for file in files if is_file(megatron_index(file), DataError)]
    if with_index and len(with_index) < len(files):
        lacking = next(file for file in files if file not in with_index)
        raise DataError(f"{lacking} has no .idx beside it, unlike {with_index[0]}")
    return MegatronTokens(files) if with_index else NanoGPTTokens(files)
