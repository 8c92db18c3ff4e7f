"""Token files of other programs: Megatron-LM's, nanoGPT's and llm.c's."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.data.sources import open_dataset
from torchtitan.errors import BadDocumentError, ConfigError, DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_megatron(path: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> None:
    """As Megatron-LM's `IndexedDatasetBuilder` does; a document is a list of sequences."""
    code = {"uint16": 8, "int32": 4}[dtype]
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    bounds = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    np.concatenate([np.array(s, dtype) for s in sequences]).tofile(path)
    with path.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([code]))
        file.write(len(lengths).to_bytes(8, "little") + len(bounds).to_bytes(8, "little"))
        file.write(lengths.tobytes() + (pointers * np.dtype(dtype).itemsize).tobytes())
        file.write(bounds.tobytes())


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_files_are_read(tmp_path: Path, dtype: str) -> None:
    write_megatron(tmp_path / "a.bin", [[[1, 2], [3]], [[4, 257]]], dtype)
    write_megatron(tmp_path / "b.bin", [[[5]]], dtype)
    source = open_dataset("tokens", str(tmp_path))
    source.use_tokenizer(BytesTokenizer())
    documents = [source[i].tolist() for i in range(len(source))]
    assert documents == [[1, 2, 3, 257], [4, 257], [5, 257]]  # which lacked the end


def test_an_id_that_the_model_has_no_embedding_for(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a.bin", [[[1, 9]], [[2, 300, 9]]])
    source = open_dataset("tokens", str(tmp_path))
    source.use_tokenizer(SimpleNamespace(eos_id=9, vocab_size=301, limit=300))
    assert source[0].tolist() == [1, 9]
    with pytest.raises(
        BadDocumentError, match=r"document 1 .*: token 300 has no embedding: .* 300"
    ):
        source[1]


@pytest.mark.parametrize("empty", [[], [[]]], ids=["no sequence", "an empty sequence"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_empty_document_of_megatron_is_empty(tmp_path: Path, place: int, empty: list) -> None:
    full = [[[1, 2], [3]], [[4, 5]]]
    write_megatron(tmp_path / "a.bin", [*full[:place], empty, *full[place:]])
    source = open_dataset("tokens", str(tmp_path))
    documents = [source[i].tolist() for i in range(len(source))]
    expected = [[1, 2, 3], [4, 5]]
    assert documents == [*expected[:place], [], *expected[place:]]


@pytest.mark.parametrize("bounds", [[1, 0, 2], [0, 3, 2], [-1, 1, 2], [0, 1], [0, 1, 3]])
def test_megatron_documents_follow_one_another(tmp_path: Path, bounds: list[int]) -> None:
    write_megatron(tmp_path / "a.bin", [[[1, 2], [3]]])  # two sequences
    index = tmp_path / "a.idx"
    content = bytearray(index.read_bytes())[:-16]
    content[26:34] = len(bounds).to_bytes(8, "little")
    index.write_bytes(content + np.array(bounds, np.int64).tobytes())
    with pytest.raises(DataError, match=r"a\.idx is damaged: .* do not partition its 2 sequences"):
        source = open_dataset("tokens", str(tmp_path))
        for number in range(len(source)):
            source[number]


def test_a_damaged_megatron_file_is_named(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a.bin", [[[1, 2]], [[300]]])
    source = open_dataset("tokens", str(tmp_path))
    source.use_tokenizer(BytesTokenizer())
    with pytest.raises(DataError, match=r"a\.bin, document 1 .*token 300 is outside"):
        source[1]
    index = tmp_path / "a.idx"
    content = index.read_bytes()
    (tmp_path / "a.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=r"a\.bin is damaged: it is too short"):
        open_dataset("tokens", str(tmp_path))
    for damaged in (content[:-9], b"MMIDIDX\x00\x00" + bytes(30), b"short"):
        index.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.idx is"):
            open_dataset("tokens", str(tmp_path))
    (tmp_path / "b.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=r"b\.bin has no \.idx"):
        open_dataset("tokens", str(tmp_path))


def header(*words: int) -> bytes:
    return np.array([*words, *[0] * (256 - len(words))], np.int32).tobytes()


@pytest.mark.parametrize(
    ("head", "dtype"),
    [(b"", "<u2"), (header(20240520, 1, 6), "<u2"), (header(20240801, 7, 6), "<u4")],
    ids=["nanogpt", "modded-nanogpt", "llm.c for Llama 3"],
)
def test_nanogpt_files_are_read(tmp_path: Path, head: bytes, dtype: str) -> None:
    ids = np.array([1, 2, 257, 3, 257, 4], dtype)
    (tmp_path / "a.bin").write_bytes(head + ids.tobytes())
    for _ in range(2):  # the second time from the cache
        source = open_dataset("tokens", str(tmp_path / "a.bin"))
        source.use_tokenizer(BytesTokenizer())
        documents = [source[i].tolist() for i in range(len(source))]
        assert documents == [[1, 2, 257], [3, 257], [4]]
    with (tmp_path / "a.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match=r"a\.bin is damaged"):
        open_dataset("tokens", str(tmp_path / "a.bin"))


def test_large_ids_of_llm_c_end_documents(tmp_path: Path) -> None:
    ids = np.array([128_000, 5, 128_001, 100_000, 128_001], "<u4")
    (tmp_path / "a.bin").write_bytes(header(20240801, 7, len(ids)) + ids.tobytes())
    source = open_dataset("tokens", str(tmp_path / "a.bin"))
    source.use_tokenizer(SimpleNamespace(bos_id=None, eos_id=128_001, vocab_size=128_256))
    assert [source[i].tolist() for i in range(len(source))] == [ids[:3].tolist(), ids[3:].tolist()]


def test_without_ends_bos_begins_documents(tmp_path: Path) -> None:
    """As llm.c writes for Llama 3."""
    ids = np.array([128_000, 5, 6, 128_000, 100_000, 128_000], "<u4")
    (tmp_path / "a.bin").write_bytes(header(20240801, 7, len(ids)) + ids.tobytes())
    source = open_dataset("tokens", str(tmp_path / "a.bin"))
    source.use_tokenizer(SimpleNamespace(eos_id=128_001, bos_id=128_000, vocab_size=128_256))
    documents = [source[i].tolist() for i in range(len(source))]
    assert documents == [[128_000, 5, 6], [128_000, 100_000], [128_000]]
    source.require_bos(128_000)


def test_an_eos_alone_says_nothing_of_bos(tmp_path: Path) -> None:
    """GPT-2 has one token for both, and its files may begin with it."""
    (tmp_path / "a.bin").write_bytes(np.array([257, 1, 2, 257, 3, 257], "<u2").tobytes())
    source = open_dataset("tokens", str(tmp_path / "a.bin"))
    source.use_tokenizer(BytesTokenizer())
    with pytest.raises(DataError, match=r"do not begin with bos \(257\)"):
        source.require_bos(257)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (header(20240801, 1, 3), r"a\.bin is damaged: .*3 tokens, version 1"),
        (header(20240801, 7, 2), r"a\.bin is damaged: .*2 tokens, version 7"),
        (header(20240520, 7, 6), r"a\.bin is damaged: .*6 tokens, version 7"),
        (header(20251231, 1, 3), r"a\.bin begins with a header of an unknown kind \(20251231\)"),
        (header(20240522), r"a\.bin begins with a header of an unknown kind \(20240522\)"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, head: bytes, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(head + np.array([1, 2, 3], "<u4").tobytes())
    with pytest.raises(DataError, match=message):
        open_dataset("tokens", str(tmp_path / "a.bin"))


@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
def test_ids_of_four_or_eight_bytes_are_not_read_as_two(tmp_path: Path, dtype: str) -> None:
    """As in a copy of a `.bin` of Megatron-LM without its `.idx`."""
    (np.arange(1000) * 100).astype(dtype).tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin holds ids of 4 or 8 bytes.* \.idx"):
        open_dataset("tokens", str(tmp_path / "a.bin"))


def test_an_index_alone_is_no_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX")
    with pytest.raises(DataError, match=r"a\.idx holds no tokens: token files end in \.bin"):
        open_dataset("tokens", str(tmp_path / "a.idx"))


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a.bin").write_bytes(b"1234")
    monkeypatch.setattr(np, "fromfile", refuse)  # root may read all files
    with pytest.raises(DataError, match=r"a\.bin cannot be read: Permission denied"):
        open_dataset("tokens", str(tmp_path / "a.bin"))


@pytest.mark.parametrize("tokens", [1, 65536, 65537, 3 * 65536, 200_000])
def test_nanogpt_files_without_ends_are_cut_into_blocks(tmp_path: Path, tokens: int) -> None:
    ids = (np.arange(tokens) % 256).astype(np.uint16)
    ids.tofile(tmp_path / "a.bin")
    source = open_dataset("tokens", str(tmp_path / "a.bin"))
    source.use_tokenizer(BytesTokenizer())
    documents = [source[i] for i in range(len(source))]
    assert len(documents) == max(1, tokens // 65536)
    assert np.array_equal(np.concatenate(documents), ids)


def test_a_small_vocabulary_is_one_of_uint16(tmp_path: Path) -> None:
    np.tile(np.array([1, 3, 2], "<u2"), 1000).tofile(tmp_path / "a.bin")  # such as A, C, G and T
    assert open_dataset("tokens", str(tmp_path)).num_tokens == 3000


def test_a_file_of_another_tokenizer_has_no_ends(tmp_path: Path, caplog) -> None:
    np.full(70_000, 5, "<u2").tofile(tmp_path / "a.bin")
    source = open_dataset("tokens", str(tmp_path))
    source.use_tokenizer(BytesTokenizer())
    assert "a.bin has neither the tokenizer's eos (257) nor bos (256)" in caplog.text


def test_a_negative_id_is_told(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a.bin", [[[1, -2, 3]]], "int32")
    source = open_dataset("tokens", str(tmp_path))
    source.use_tokenizer(BytesTokenizer())
    with pytest.raises(DataError, match="token -2 is outside"):
        source[0]


def test_text_is_no_tokens(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "a line of text"}\n')
    with pytest.raises(DataError, match=r"lines\.jsonl holds no tokens: .*end in \.bin.* prepare"):
        open_dataset("tokens", str(path))


def test_tokens_are_local_files() -> None:
    with pytest.raises(ConfigError, match="must be local"):
        open_dataset("tokens", "memory://tokens")
