"""Several processes, each a part of the data, of a table or of the tables: equal to one process that has all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_cases import CASES
from torch import nn

from fast_embedding import FastMultiEmbedding
from fast_embedding.distributed import ShardedMultiEmbedding, assign_tables


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(device type, number of ranks) -> per case what every rank said; started once for all cases."""
    known = {}

    def run(device_type, ranks):
        if (device_type, ranks) not in known:
            folder = tmp_path_factory.mktemp(f"{device_type}{ranks}")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command += [str(Path(__file__).with_name("distributed_cases.py")), device_type, str(folder)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert result.returncode == 0, result.stderr[-5000:]
            by_rank = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
            known[device_type, ranks] = {case: [outcome[case] for outcome in by_rank] for case in CASES}
        return known[device_type, ranks]

    return run


@pytest.mark.compat
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_process(outcomes, device, case, ranks):
    if device.type == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    for rank, outcome in enumerate(outcomes(device.type, ranks)[case]):
        assert outcome == "passed", f"rank {rank}:\n{outcome}"


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
    import torch.distributed as dist

    layer = FastMultiEmbedding([50, 20, 9], [8, 3, 4], padding_idx=[None, 0, -1])
    x = torch.randint(9, (300, 3))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
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
        assert isinstance(sharded.local, nn.Module)
    finally:
        dist.destroy_process_group()
