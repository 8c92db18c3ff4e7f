"""A run that is killed and resumed on other ranks sees the data of one that is not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.data import DataLoader
from torchtitan.data.encode import Encoder
from torchtitan.data.mixing import Blend, Phase
from torchtitan.data.sources import sample_of
from torchtitan.data.token_shards import Shard, TokenFiles
from torchtitan.errors import BadDocumentError, CheckpointError

ROWS = 8
SEQ_LEN = 12


class Files:
    """A sequential source with shards; some of its documents are empty or malformed."""

    num_shards = 17

    def __iter__(self) -> Iterator[object]:
        return itertools.chain.from_iterable(map(self.shard, range(self.num_shards)))

    def shard(self, index: int) -> Iterator[object]:
        for i in range(index % 4 + 1):
            yield f"file {index} {'x' * (7 * i)}"
            yield ""
            yield BadDocumentError(f"file {index}, row {i}")


def tokens() -> TokenFiles:
    ends = np.cumsum(np.arange(41) * 7 % 30 + 1)
    return TokenFiles([Shard("a", (np.arange(ends[-1]) % 256).astype(np.uint16), ends)])


SOURCES = {
    "texts": [f"text {i} {'y' * (i * 5 % 23)}" for i in range(29)],
    "files": Files(),
    "tokens": tokens(),
}
PHASES = (Phase(1, (0.5, 0.3, 0.2)), Phase(4, (0.0, 1.0, 3.0)), Phase(7, (1.0, 0.0, 0.0)))
BLEND = Blend(SOURCES, PHASES)
KINDS = {**SOURCES, "blend": BLEND}
LAYOUTS = [(ranks, local) for ranks in (1, 2, 4, 8) for local in (1, 2, 4, 8) if ranks * local <= 8]


def pieces(layouts: list[tuple[int, int]]) -> st.SearchStrategy[list]:
    """Pieces of a run: steps, layout, threads, and whether it is killed within a step."""
    piece = st.tuples(st.integers(0, 4), st.sampled_from(layouts), st.integers(1, 3), st.booleans())
    return st.lists(piece, min_size=1, max_size=4)


def open_ranks(kind: str, ranks: int, local: int, workers: int, **options) -> list[DataLoader]:
    options = {"document_mask": True, "workers": workers, "seed": 11} | options
    encoder = partial(Encoder, BytesTokenizer(), on_error=options.pop("on_error", "skip"))
    return [
        DataLoader(KINDS[kind], encoder(), SEQ_LEN, local, ROWS, rank, ranks, **options)
        for rank in range(ranks)
    ]


def step(loaders: list[DataLoader]) -> list[torch.Tensor]:
    """The next global batch: each tensor `[rows, seq]`."""
    batches = [next(one) for one in loaders for _ in range(one.gradient_accumulation_steps)]
    return [torch.cat([batch[name] for batch in batches]) for name in batches[0]]


def close(loaders: list[DataLoader]) -> None:
    for loader in loaders:
        loader.close()


@given(
    kind=st.sampled_from(list(KINDS)),
    packing=st.sampled_from(["contiguous", "best_fit"]),
    runs=pieces(LAYOUTS),
)
@settings(max_examples=60)
def test_a_run_in_pieces_is_the_run_in_one(kind: str, packing: str, runs: list) -> None:
    """Each piece has its own number of ranks, micro-batches and threads, and may be killed within
    a step, whose data come again.
    """
    whole = open_ranks(kind, 1, ROWS, 1, packing=packing)
    expected = [step(whole) for _ in range(sum(steps for steps, *_ in runs) + 2)]
    close(whole)

    got, rows = [], None
    for steps, (ranks, local), workers, within_step in [*runs, (2, (1, 4), 2, False)]:
        loaders = open_ranks(kind, ranks, local, workers, packing=packing)
        if rows is not None:
            for loader, share in zip(loaders, rows.chunk(ranks), strict=True):
                loader.load_state_dict({"rows": share})
        got += [step(loaders) for _ in range(steps)]
        if within_step and loaders[0].gradient_accumulation_steps > 1:
            next(loaders[0])  # of a step that is never finished
        rows = torch.cat([loader.state_dict()["rows"] for loader in loaders])
        close(loaders)
    for number, (actual, wanted) in enumerate(zip(got, expected, strict=True)):
        assert all(map(torch.equal, actual, wanted)), f"step {number}"


def test_a_state_keeps_its_lanes() -> None:
    """Also where a new run would have another number of them."""

    def open_loader(state: dict) -> DataLoader:
        one = DataLoader(
            KINDS["files"], Encoder(BytesTokenizer(), on_error="skip"), SEQ_LEN, 17, 17
        )
        one.load_state_dict(state)
        return one

    def lanes(one: DataLoader) -> int:
        return one.describe()["sources"][0]["lanes"]

    rows = torch.tensor([[row, 0, 0, 0] for row in range(17)])
    described = {"sources": [{"lanes": 1}]}
    new, old = open_loader({"rows": rows}), open_loader({"rows": rows, "described": described})
    assert (lanes(new), lanes(old)) == (2, 1)
    assert not torch.equal(next(new)["tokens"], next(old)["tokens"])
    for before in (new, old):
        for _ in range(3):
            next(before)
        again = open_loader(before.state_dict())
        assert lanes(again) == lanes(before)
        assert all(torch.equal(next(again)["tokens"], next(before)["tokens"]) for _ in range(5))
        close([before, again])


def test_the_state_is_small_and_the_same_on_every_layout() -> None:
    states = []
    for ranks, local, workers in ((1, 8, 1), (4, 1, 2), (2, 2, 3)):
        loaders = open_ranks("blend", ranks, local, workers)
        for _ in range(5):
            step(loaders)
        states.append(torch.cat([loader.state_dict()["rows"] for loader in loaders]))
        close(loaders)
    assert states[0].shape == (ROWS, 2 + 2 * 3 + 4 * 3)
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("kind", "packing"), [("blend", "contiguous"), ("texts", "best_fit"), ("tokens", "best_fit")]
)
def test_a_state_of_another_mixture_or_packing_is_refused(kind: str, packing: str) -> None:
    (one,) = open_ranks("texts", 1, ROWS, 1)
    (other,) = open_ranks(kind, 1, ROWS, 1, packing=packing)
    with pytest.raises(CheckpointError, match=r"data\.sources or data\.packing changed"):
        other.load_state_dict(one.state_dict())


def test_skipped_documents_are_counted_and_not_skipped_unless_asked() -> None:
    (one,) = open_ranks("files", 1, ROWS, 1)
    for _ in range(20):
        next(one)
    assert one.metrics()["data_skipped_documents"] > 10
    one.close()
    (two,) = open_ranks("files", 1, ROWS, 1, on_error="stop")
    with pytest.raises(BadDocumentError, match=r"file \d+, row 0"):
        for _ in range(20):
            next(two)


def test_a_resumed_loader_begins_with_the_shard_of_its_place() -> None:
    class Noting(Files):
        def __init__(self) -> None:
            self.opened: list[int] = []

        def shard(self, index: int) -> Iterator[object]:
            self.opened.append(index)
            return super().shard(index)

    sources = Noting(), Noting()
    before, after = (
        DataLoader(source, Encoder(BytesTokenizer(), on_error="skip"), SEQ_LEN, ROWS, ROWS)
        for source in sources
    )
    for _ in range(20):
        next(before)
    state = before.state_dict()
    after.load_state_dict(state)
    sources[1].opened.clear()  # those in which a first text was looked for
    next(after)
    close([before, after])
    turn = int(state["rows"][: ROWS // 2, 2].min())  # of the rows of the first of two lanes
    assert turn > 1 and sources[1].opened[0] == 2 * turn % Files.num_shards


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_the_mean_over_the_ranks_is_what_one_rank_alone_tells(packing: str) -> None:
    told = []
    for ranks in (1, 4):
        loaders = open_ranks("files", ranks, ROWS // ranks, 1, packing=packing)
        for _ in range(60):
            step(loaders)
        of_ranks = [loader.metrics() for loader in loaders]
        close(loaders)
        told.append({name: np.mean([own[name] for own in of_ranks]) for name in of_ranks[0]})
    skipped = [means.pop("data_skipped_documents") for means in told]
    assert skipped[0] > 50 and skipped[1] == pytest.approx(skipped[0], rel=0.2)
    assert told[1] == pytest.approx(told[0])


def test_a_place_far_in_the_data_is_found_at_once() -> None:
    class Endless:
        def __len__(self) -> int:
            return 10**12

        def __getitem__(self, index: int) -> str:
            return f"document {index}"

    one = DataLoader(Endless(), Encoder(BytesTokenizer()), SEQ_LEN, ROWS, ROWS, workers=2)
    far = torch.tensor([[row + ROWS * 10**9, 3, 0, 0] for row in range(ROWS)])
    one.load_state_dict({"rows": far})
    batch = next(one)
    assert bytes(batch["tokens"][0, :9].tolist()).startswith(b"ument ")
    assert one.metrics()["data_epoch"] == pytest.approx(ROWS * 1e9 / 1e12, rel=1e-6)
    one.close()


@pytest.mark.parametrize("kind", ["texts", "blend"])
def test_a_resumed_run_keeps_the_order_of_its_first_seed(kind: str) -> None:
    """With the permutation of another seed, documents would be left out or come twice."""
    (before,) = open_ranks(kind, 1, 1, 1)
    step([before])
    (again,) = open_ranks(kind, 1, 1, 1, seed=12)
    again.load_state_dict(before.state_dict())
    for _ in range(8):
        assert all(map(torch.equal, step([again]), step([before])))
    (third,) = open_ranks(kind, 1, 1, 1, seed=13)
    third.load_state_dict(again.state_dict())
    assert all(map(torch.equal, step([third]), step([before])))
    close([before, again, third])


def test_a_source_is_known_by_a_sample_of_its_documents() -> None:
    class Malformed(list):
        def __getitem__(self, index: int) -> object:  # type: ignore[override]
            raise BadDocumentError(f"{super().__getitem__(index)}:{index}")

    texts = [f"text {number}" for number in range(30)]
    ids = [np.arange(number) for number in range(30)]
    assert sample_of(texts) == sample_of([*texts])
    assert sample_of(ids) == sample_of([array.astype(np.uint16) for array in ids])
    assert sample_of(Malformed("a" * 9)) == sample_of(Malformed("b" * 9))
    assert len({str(sample_of(kind)) for kind in (texts, texts[::-1], ids)}) == 3
    assert sample_of(iter(texts)) == {}
