from types import SimpleNamespace

import pytest
import torch

from torchtitan.distributed.sequence_shards import SequenceShards


def ranks(size: int, balanced: bool) -> list[SequenceShards]:
    return [
        SequenceShards(
            SimpleNamespace(get_local_rank=lambda rank=rank: rank, size=lambda: size), balanced
        )
        for rank in range(size)
    ]


def test_chunks_of_a_rank():
    assert [shards.chunks for shards in ranks(3, balanced=True)] == [(0, 5), (1, 4), (2, 3)]
    assert [shards.chunks for shards in ranks(3, balanced=False)] == [(0, 1), (2, 3), (4, 5)]


@pytest.mark.parametrize("balanced", [True, False])
def test_every_place_has_one_rank(balanced):
    sequence = torch.arange(24).expand(2, -1)
    parts = [shards.shard(sequence, 1) for shards in ranks(4, balanced)]
    assert all(part.shape == (2, 6) for part in parts)
    assert torch.equal(torch.cat(parts, dim=1).sort(dim=1).values, sequence)
    if not balanced:
        assert torch.equal(torch.cat(parts, dim=1), sequence)


def test_balanced_ranks_have_as_many_pairs_of_query_and_earlier_key():
    pairs = [int((shards.shard(torch.arange(32), 0) + 1).sum()) for shards in ranks(4, True)]
    assert len(set(pairs)) == 1
    pairs = [int((shards.shard(torch.arange(32), 0) + 1).sum()) for shards in ranks(4, False)]
    assert len(set(pairs)) == 4
