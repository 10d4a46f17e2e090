"""What each rank does in test_distributed.py: a training step or three, and the comparison with one process.

Every case is a function of one argument, the `Rank`, and raises where something differs.
"""

import copy
import functools
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fast_embedding import FastEmbedding, FastMultiEmbedding, enable, replace_embeddings
from fast_embedding.distributed import ShardedMultiEmbedding

try:
    from torch.distributed.tensor import DTensor, Replicate
except ImportError:  # before torch 2.5, where they became public
    from torch.distributed._tensor import DTensor, Replicate

try:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
except ImportError:  # before torch 2.6, whose FSDP2 was not public yet and asked for GPUs
    fully_shard = None

V, D, TABLES, LOCAL_BATCH, STEPS = 64, 16, ([50, 7, 300, 64, 20], [8, 3, 16, 5, 4]), 24, 3


@dataclass
class Rank:
    rank: int
    size: int
    device: torch.device
    folder: Path

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        return init_device_mesh(self.device.type, (self.size,))

    def inputs(self, columns: int, high: int) -> list[torch.Tensor]:
        """The batch of all ranks, for each step."""
        generator = torch.Generator().manual_seed(3)
        shape = (self.size * LOCAL_BATCH, columns)
        return [torch.randint(high, shape, generator=generator).to(self.device) for _ in range(STEPS)]

    def part(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.chunk(self.size)[self.rank]


class Model(nn.Module):
    """Tokens and a head; `tokens` is what the cases shard."""

    def __init__(self, kind=FastEmbedding, **options):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = kind(V, D, padding_idx=0, **options)
        self.head = nn.Linear(D, V)

    def forward(self, x):
        return F.cross_entropy(self.head(self.tokens(x)).flatten(0, 1), x.flatten())


class Columns(nn.Module):
    """Many tables and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tables = FastMultiEmbedding(*TABLES, padding_idx=[0, None, -1, None, None])
        self.head = nn.Linear(sum(TABLES[1]), 1)

    def forward(self, x):
        return (self.head(self.tables(x)).squeeze(-1) - x.sum(-1) % 5).square().mean()


def train(model, inputs, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.5)
    for x in inputs:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    return model


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_training(model, reference):
    trained, start = reference.state_dict(), type(reference)().state_dict()
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(full(parameter), trained[name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(trained[name].cpu(), start[name])


def single_process(rank, model, columns, high):
    return train(copy.deepcopy(model).to(rank.device), rank.inputs(columns, high))


def ddp(rank, model, columns=5, high=V):
    model = model.to(rank.device)
    reference = single_process(rank, model, columns, high)
    train(DistributedDataParallel(model), [rank.part(x) for x in rank.inputs(columns, high)])
    assert_same_training(model, reference)


def ddp_dense(rank):
    ddp(rank, Model())


def ddp_sparse(rank):
    model = Model(sparse=True)
    ddp(rank, model)
    assert model.tokens.weight.grad.is_sparse


def ddp_replaced(rank):
    model = Model(nn.Embedding)
    assert replace_embeddings(model) == 1
    ddp(rank, model)


def ddp_under_enable(rank):
    with enable():
        ddp(rank, Model(nn.Embedding))


def ddp_many_tables(rank):
    ddp(rank, Columns(), columns=5, high=7)


def fsdp2(rank, model, parts, columns=5, high=V):
    model = model.to(rank.device)
    reference = single_process(rank, model, columns, high)
    for part in (*parts(model), model):
        fully_shard(part, mesh=rank.mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    train(model, [rank.part(x) for x in rank.inputs(columns, high)])
    assert_same_training(model, reference)


def fsdp2_embedding(rank):
    fsdp2(rank, Model(), lambda model: [model.tokens])


def fsdp2_under_enable(rank):
    with enable():
        fsdp2(rank, Model(nn.Embedding), lambda model: [model.tokens])


def fsdp2_many_tables(rank):
    fsdp2(rank, Columns(), lambda model: [model.tables], high=7)


def fsdp2_mixed_precision(rank):
    """Lookups in bfloat16 weights that FSDP2 has cast; stock layers round their sums more often."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    weights, dtypes = [], []
    for kind in (FastEmbedding, nn.Embedding):
        model = Model(kind).to(rank.device)
        model.tokens.register_forward_hook(lambda _, args, output: dtypes.append(output.dtype))
        for part in (model.tokens, model):
            fully_shard(part, mesh=rank.mesh, mp_policy=policy)
        train(model, [rank.part(x) for x in rank.inputs(5, V)])
        weights.append(full(model.tokens.weight))
    assert set(dtypes) == {torch.bfloat16}
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(weights[0], Model().tokens.weight.to(rank.device), rtol=1e-2, atol=1e-3)


def tensor_parallel(rank, model, style):
    """Every rank has the whole batch and a part of the table."""
    model = model.to(rank.device)
    reference = single_process(rank, model, 5, V)
    parallelize_module(model, rank.mesh, {"tokens": style})
    assert isinstance(model.tokens.weight, DTensor)
    assert model.tokens.weight.to_local().numel() == V * D // rank.size
    train(model, rank.inputs(5, V))
    assert_same_training(model, reference)


def vocabulary_parallel(rank):
    tensor_parallel(rank, Model(), RowwiseParallel(input_layouts=Replicate()))


def vocabulary_parallel_under_enable(rank):
    with enable():
        tensor_parallel(rank, Model(nn.Embedding), RowwiseParallel(input_layouts=Replicate()))


def dimension_parallel(rank):
    tensor_parallel(rank, Model(), ColwiseParallel(output_layouts=Replicate()))


def dimension_parallel_under_enable(rank):
    with enable():
        tensor_parallel(rank, Model(nn.Embedding), ColwiseParallel(output_layouts=Replicate()))


def vocabulary_parallel_and_fsdp2(rank):
    """A mesh of two dimensions: pairs of ranks share a table, and the pairs share the batch."""
    mesh = init_device_mesh(rank.device.type, (rank.size // 2, 2), mesh_dim_names=("data", "tensor"))
    model = Model().to(rank.device)
    reference = single_process(rank, model, 5, V)
    parallelize_module(model, mesh["tensor"], {"tokens": RowwiseParallel(input_layouts=Replicate())})
    fully_shard(model, mesh=mesh["data"])
    assert model.tokens.weight.to_local().numel() == V * D // rank.size
    part = mesh["data"].get_local_rank()
    train(model, [x.chunk(rank.size // 2)[part] for x in rank.inputs(5, V)])
    assert_same_training(model, reference)


def checkpoint(rank):
    """Saved sharded, read whole, by torch's own layer too, and sharded again; training goes on the same."""
    for kind, make, columns, high in (("one", Model, 5, V), ("many", Columns, 5, 7)):
        inputs = rank.inputs(columns, high)
        reference = train(make().to(rank.device), inputs)
        sharded = make().to(rank.device)
        fully_shard(sharded, mesh=rank.mesh)
        train(sharded, [rank.part(x) for x in inputs])
        folder = str(rank.folder / f"checkpoint-{kind}")
        dcp.save(sharded.state_dict(), checkpoint_id=folder)
        whole = [make(), Model(nn.Embedding)] if kind == "one" else [make()]
        for target in whole:
            target.to(rank.device)
            state = target.state_dict()
            dcp.load(state, checkpoint_id=folder)
            target.load_state_dict(state)
            assert_same_training(target, reference)
        again = make().to(rank.device)
        fully_shard(again, mesh=rank.mesh)
        state = again.state_dict()
        dcp.load(state, checkpoint_id=folder)
        again.load_state_dict(state)
        train(again, [rank.part(x) for x in inputs])
        assert_same_training(again, train(reference, inputs))


class ShardedColumns(nn.Module):
    """Columns with its tables on different ranks and the rest data-parallel."""

    def __init__(self, model):
        super().__init__()
        self.tables = ShardedMultiEmbedding(model.tables)
        self.head = DistributedDataParallel(model.head)

    forward = Columns.forward


def whole_tables(rank):
    model = Columns().to(rank.device)
    reference = single_process(rank, model, 5, 7)
    start = copy.deepcopy(model.tables)
    sharded = ShardedColumns(model)
    assert sharded.tables.local.weight.numel() < start.weight.numel()
    x = rank.part(rank.inputs(5, 7)[0])
    assert torch.equal(sharded.tables(x), start(x))
    assert torch.equal(sharded.tables(x.int().view(2, -1, 5)), start(x).view(2, -1, sum(TABLES[1])))
    assert torch.equal(sharded.tables.to_multi_embedding().weight, start.weight)
    train(sharded, [rank.part(x) for x in rank.inputs(5, 7)])
    merged = sharded.tables.to_multi_embedding()
    assert merged.padding_idx == start.padding_idx
    torch.testing.assert_close(merged.weight, reference.tables.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.head.weight, reference.head.weight, rtol=1e-4, atol=1e-5)

    # A checkpoint holds the tables of every rank.
    folder = str(rank.folder / "checkpoint-tables")
    dcp.save(sharded.tables.state_dict(), checkpoint_id=folder)
    on_meta = FastMultiEmbedding(*TABLES, padding_idx=[0, None, -1, None, None], device="meta")
    again = ShardedMultiEmbedding(on_meta, device=rank.device)
    state = again.state_dict()
    assert list(state) == [f"rank{rank.rank}.weight"]
    dcp.load(state, checkpoint_id=folder)
    again.load_state_dict(state)
    assert torch.equal(again.to_multi_embedding().weight, merged.weight)


def whole_tables_and_fsdp2(rank):
    """The rest of the model sharded, the tables whole on their ranks."""
    model = Columns().to(rank.device)
    reference = single_process(rank, model, 5, 7)
    model.tables = ShardedMultiEmbedding(model.tables)
    fully_shard(model.head, mesh=rank.mesh)
    train(model, [rank.part(x) for x in rank.inputs(5, 7)])
    merged = model.tables.to_multi_embedding()
    torch.testing.assert_close(merged.weight, reference.tables.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(full(model.head.weight), reference.head.weight, rtol=1e-4, atol=1e-5)


CASES = {
    case.__name__: case
    for case in (
        ddp_dense,
        ddp_sparse,
        ddp_replaced,
        ddp_under_enable,
        ddp_many_tables,
        fsdp2_embedding,
        fsdp2_under_enable,
        fsdp2_many_tables,
        fsdp2_mixed_precision,
        vocabulary_parallel,
        vocabulary_parallel_under_enable,
        dimension_parallel,
        dimension_parallel_under_enable,
        vocabulary_parallel_and_fsdp2,
        checkpoint,
        whole_tables,
        whole_tables_and_fsdp2,
    )
}


def main(device_type, folder):
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    here = Rank(rank, dist.get_world_size(), torch.device(device_type), Path(folder))
    outcome = {}
    for name, case in CASES.items():
        try:
            case(here)
            outcome[name] = "passed"
        except Exception:
            outcome[name] = traceback.format_exc()
        dist.barrier()
    (here.folder / f"rank{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
