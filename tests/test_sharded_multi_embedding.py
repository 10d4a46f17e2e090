"""Whole tables on ranks: who gets which, and the case of one rank. Several ranks: test_distributed.py."""

import pytest
import torch

from fast_embedding import FastMultiEmbedding
from fast_embedding.distributed import ShardedMultiEmbedding, assign_tables


def test_tables_are_balanced():
    sizes, dims = [1000, 10, 500, 400, 90, 0], [8] * 6
    for ranks in range(1, 7):
        shares = assign_tables(sizes, dims, ranks)
        assert sorted(table for share in shares for table in share) == list(range(6))
        assert all(share == sorted(share) and share for share in shares)
        largest = max(sum(sizes[table] for table in share) for share in shares)
        assert largest == {1: 2000}.get(ranks, 1000)
    # Graham's bound, where nothing divides evenly: ten tables of 7..16 rows, three ranks.
    shares = assign_tables(list(range(7, 17)), [4] * 10, 3)
    assert max(sum(7 + table for table in share) for share in shares) <= 4 / 3 * sum(range(7, 17)) / 3


@pytest.mark.parametrize("ranks", [0, 3, -1])
def test_ranks_without_tables_are_refused(ranks):
    with pytest.raises(
        ValueError, match=f"num_ranks must be at least 1 and at most the number of tables, 2, got {ranks}"
    ):
        assign_tables([5, 6], [1, 1], ranks)


def test_one_rank_is_the_layer_itself():
    layer = FastMultiEmbedding([50, 20, 9], [8, 3, 4], padding_idx=[None, 0, -1])
    x = torch.randint(9, (300, 3))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = ShardedMultiEmbedding(layer)
        assert repr(sharded).startswith("ShardedMultiEmbedding(\n  [50, 20, 9], [8, 3, 4], ranks=1\n  (rank0): ")
        gradients = []
        for candidate in (layer, sharded):
            output = candidate(x)
            (output * (torch.arange(output.numel()).view_as(output) % 7)).sum().backward()
            gradients.append(next(candidate.parameters()).grad)
        assert torch.equal(*gradients)
        with pytest.raises(ValueError, match=r"one column per table in its last dimension, 3, got shape \(5, 2\)"):
            sharded(x[:5, :2])
        with pytest.raises(ValueError, match="must have mode \"concat\", got 'sum'"):
            ShardedMultiEmbedding(FastMultiEmbedding([5, 4], [2, 2], mode="sum"))
        assert isinstance(sharded.local, FastMultiEmbedding)
    finally:
        torch.distributed.destroy_process_group()
