"""The CPU path among threads and processes: on torch's own pool, from several Python threads, in DataLoader workers."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fast_embedding import FastEmbedding, FastMultiEmbedding

if sys.platform != "linux":
    pytest.skip("no native library on this platform", allow_module_level=True)

_COUNT_THREADS = """
import os, sys, torch
from fast_embedding import FastEmbedding, ops

def threads():
    return len(os.listdir("/proc/self/task"))

ops.load()
torch.set_num_threads(int(sys.argv[1]))
torch.ones(1 << 22).add_(1)  # starts torch's pool
torch.ones(1, requires_grad=True).backward()  # and what autograd starts
before = threads()
for num_embeddings in (10, 100_000):  # the private sums, the sorted ones
    layer = FastEmbedding(num_embeddings, 32)
    layer(torch.randint(num_embeddings, (50_000,))).sum().backward()
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in os.path.basename(line.split()[-1])}
print(before, threads(), len(libraries))
"""


@pytest.mark.parametrize("num_threads", [1, 2])
def test_runs_on_the_pool_of_torch_and_starts_no_thread(num_threads: int) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _COUNT_THREADS, str(num_threads)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # autograd starts a thread for each GPU that it sees
        capture_output=True,
        text=True,
        check=True,
    )
    before, after, openmp_libraries = map(int, run.stdout.split())
    assert after == before
    assert openmp_libraries == 1


def _step(num_embeddings: int, indices: Tensor) -> tuple[Tensor, Tensor]:
    layer = FastEmbedding.from_pretrained(torch.arange(num_embeddings * 24.0).view(-1, 24), freeze=False)
    output = layer(indices)
    output.square().sum().backward()
    return output.detach(), layer.weight.grad


def test_python_threads_do_not_disturb_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    jobs = [(size, torch.randint(size, (30_000,), generator=generator)) for size in (10, 3_000, 90_000)] * 4
    torch.use_deterministic_algorithms(True)
    try:
        expected = [_step(*job) for job in jobs]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda job: _step(*job), jobs))
    finally:
        torch.use_deterministic_algorithms(False)
    for result, reference in zip(results, expected, strict=True):
        assert all(map(torch.equal, result, reference))


class _Lookups(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        tables = FastMultiEmbedding([100, 70_000], [16, 8])
        with torch.no_grad():
            tables.weight.copy_(torch.arange(tables.weight.numel()))
        indices = torch.arange(40_000).view(-1, 1) % torch.tensor([100, 70_000])
        output = tables(indices)
        output.sum().backward()
        return output.detach(), tables.weight.grad


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch refuses a backward in a fork once autograd has seen a GPU")
def test_forked_workers_of_a_data_loader_look_up_and_differentiate() -> None:
    expected = _Lookups()[0]  # also has the pool running before the fork
    loader = DataLoader(_Lookups(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for output, grad in loader:
        assert torch.equal(output, expected[0])
        torch.testing.assert_close(grad, expected[1])
