"""One training script, five ways to spread it over processes; docs/scaling.md says which to choose.

    torchrun --standalone --nproc-per-node=2 examples/train_distributed.py --strategy ddp

It runs on GPUs, one a process, where there are any, else on the CPU. The data are made up: the next token of a noisy
cycle, and a value that depends on five categorical columns.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from fast_embedding import FastEmbedding, FastMultiEmbedding
from fast_embedding.distributed import ShardedMultiEmbedding

VOCABULARY, DIM = 1024, 64
COLUMNS, DIMS = [1000, 7, 24, 365, 50], [32, 4, 8, 16, 8]


class TokenModel(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.tokens = FastEmbedding(VOCABULARY, DIM, sparse=sparse)
        self.head = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, VOCABULARY))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.tokens(x[:, :-1])).flatten(0, 1), x[:, 1:].flatten())


class ColumnModel(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        # On "meta" the whole layer takes no memory; each rank makes its own tables alone.
        whole = FastMultiEmbedding(COLUMNS, DIMS, device="meta")
        self.tables = ShardedMultiEmbedding(whole, device=device)
        head = nn.Sequential(nn.Linear(sum(DIMS), 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
        self.head = DistributedDataParallel(head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        target = (x % 5).float().mean(-1, keepdim=True)
        return F.mse_loss(self.head(self.tables(x)), target)


def make_model(strategy: str, device: torch.device) -> nn.Module:
    if strategy == "tables":
        return ColumnModel(device)
    model: nn.Module = TokenModel(sparse=strategy == "ddp-sparse").to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    if strategy == "fsdp":
        from torch.distributed.fsdp import fully_shard  # from torch 2.6

        fully_shard(model.tokens, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if strategy == "tensor":
        from torch.distributed.tensor import Replicate  # from torch 2.5
        from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

        # Each process has VOCABULARY / processes rows, and every process the whole batch.
        return parallelize_module(model, mesh, {"tokens": RowwiseParallel(input_layouts=Replicate())})
    return DistributedDataParallel(model)


def make_batch(strategy: str, generator: torch.Generator) -> torch.Tensor:
    if strategy == "tables":
        return torch.stack([torch.randint(rows, (512,), generator=generator) for rows in COLUMNS], 1)
    start = torch.randint(VOCABULARY, (32, 1), generator=generator)
    noise = torch.randint(3, (32, 64), generator=generator)
    return (start + 17 * torch.arange(64) + noise) % VOCABULARY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=["ddp", "ddp-sparse", "fsdp", "tensor", "tables"], default="ddp")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()

    # What all processes hold must start the same; the tables of "tables" are each rank's own.
    torch.manual_seed(rank if arguments.strategy == "tables" else 0)
    model = make_model(arguments.strategy, device)
    # Adagrad takes dense and sparse gradients alike, Adam dense ones alone.
    make_optimizer = torch.optim.Adagrad if arguments.strategy == "ddp-sparse" else torch.optim.Adam
    optimizer = make_optimizer(model.parameters(), lr=0.03)
    # Data parallelism: batches of one's own. Tensor parallelism: the same batch everywhere.
    generator = torch.Generator().manual_seed(0 if arguments.strategy == "tensor" else rank)

    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        optimizer.zero_grad()
        loss = model(make_batch(arguments.strategy, generator).to(device))
        loss.backward()
        optimizer.step()
        if rank == 0 and step in (1, arguments.steps):
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    if rank == 0:
        milliseconds = 1000 * (time.perf_counter() - start) / arguments.steps
        print(f"{arguments.strategy} on {dist.get_world_size()} x {device.type}: {milliseconds:.1f} ms a step")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
