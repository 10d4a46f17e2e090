"""Whole tables on different ranks: a :class:`fast_embedding.FastMultiEmbedding` too large for one device.

Rows of one table over several ranks is what DTensor does, see the documentation's page on scaling. Here each table
stays whole on one rank, so that a lookup costs two exchanges, of indices and of rows, whatever the tables' number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layout import TableLayout
from .modules import FastMultiEmbedding

__all__ = ["ShardedMultiEmbedding", "assign_tables"]


def assign_tables(num_embeddings: Sequence[int], embedding_dims: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Give each rank whole tables, so that the largest share of elements is small.

    Longest processing time first (Graham, 1969): tables from the largest to the smallest, each to the rank that has
    least. No rank then has more than 4/3 of the best possible maximum. Ties go to the rank with fewer tables, then to
    the lower rank, so that every rank computes the same answer.

    Args:
        num_embeddings, embedding_dims: rows and columns of each table.
        num_ranks: >= 1 and at most the number of tables.

    Returns:
        Per rank the indices of its tables, ascending, at least one.

    Raises:
        ValueError: there are fewer tables than ranks, or the sizes make no :class:`fast_embedding.layout.TableLayout`.

    >>> assign_tables([1000, 10, 500, 400], [8, 8, 8, 8], 2)
    [[0], [1, 2, 3]]
    """
    layout = TableLayout(num_embeddings, embedding_dims)
    if not 1 <= num_ranks <= len(layout):
        raise ValueError(
            f"num_ranks must be at least 1 and at most the number of tables, {len(layout)}, got {num_ranks}"
        )
    elements = [rows * columns for rows, columns in zip(layout.num_embeddings, layout.embedding_dims, strict=True)]
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for table in sorted(range(len(layout)), key=lambda table: -elements[table]):
        # Empty tables cost nothing, but no rank may go without one.
        rank = min(range(num_ranks), key=lambda rank: (bool(shares[rank]), totals[rank], len(shares[rank])))
        shares[rank].append(table)
        totals[rank] += elements[table]
    return [sorted(share) for share in shares]


class ShardedMultiEmbedding(nn.Module):
    """The tables of a :class:`fast_embedding.FastMultiEmbedding`, each whole on one rank of a process group.

    Used like FastMultiEmbedding with ``mode="concat"``: every rank passes its own part of the batch, of the same shape
    on every rank, and gets the concatenated rows of all tables. Gradients are averaged over the ranks as
    DistributedDataParallel averages those of the rest of the model, so that training is that of one process with the
    whole batch. Parameters differ between ranks: keep the module outside of DistributedDataParallel, ``fully_shard``.

    Every rank has the module of its tables under a name of its own, ``rank0``, ``rank1`` and so on, so that a
    distributed checkpoint holds all of them; :meth:`to_multi_embedding` is what does not depend on the number of ranks.

    Args:
        layer: the whole layer, the same on every rank, of which each rank copies its own tables; on the device "meta"
            it costs no memory, and each rank draws its tables as FastMultiEmbedding does: seed the ranks differently.
        process_group: the ranks; None for all.
        device: where the rank's tables go if ``layer`` is on "meta"; None for torch's default.

    Raises:
        ValueError: ``layer`` has mode "sum", columns that share a table, or fewer tables than there are ranks.
    """

    def __init__(
        self,
        layer: FastMultiEmbedding,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        if layer.mode != "concat":
            raise ValueError(f'layer must have mode "concat", got {layer.mode!r}')
        if layer.table_of_column != tuple(range(len(layer.layout))):
            raise ValueError(f"layer must have a table for each column, got table_of_column={layer.table_of_column}")
        self.layout = layer.layout
        self.padding_idx = layer.padding_idx
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.assignment = assign_tables(layer.num_embeddings, layer.embedding_dims, dist.get_world_size(process_group))
        weight = None if layer.weight.is_meta else [layer.tables()[table] for table in self.assignment[self.rank]]
        self.add_module(f"rank{self.rank}", self._part(self.rank, weight, device=device, dtype=layer.weight.dtype))
        self.local.weight.requires_grad_(layer.weight.requires_grad)

    def _part(self, rank: int, weight: list[Tensor] | None = None, **options: Any) -> FastMultiEmbedding:
        share = self.assignment[rank]
        return FastMultiEmbedding(
            [self.layout.num_embeddings[table] for table in share],
            [self.layout.embedding_dims[table] for table in share],
            padding_idx=[self.padding_idx[table] for table in share],
            _weight=weight,
            **options,
        )

    @property
    def local(self) -> FastMultiEmbedding:
        """The tables of this rank."""
        module = self.get_submodule(f"rank{self.rank}")
        assert isinstance(module, FastMultiEmbedding)
        return module

    def forward(self, input: Tensor) -> Tensor:
        """Look up ``input``, (\\*, n) for n tables, of one shape on all ranks; returns (\\*, sum of embedding_dims)."""
        if input.dim() == 0 or input.shape[-1] != len(self.layout):
            raise ValueError(
                f"input must have one column per table in its last dimension, {len(self.layout)}, "
                f"got shape {tuple(input.shape)}"
            )
        rows = input.reshape(-1, len(self.layout))
        num_rows, num_ranks = rows.shape[0], len(self.assignment)
        own = len(self.assignment[self.rank])
        outgoing = torch.cat([rows[:, share].reshape(-1) for share in self.assignment])
        indices = outgoing.new_empty(num_ranks * num_rows * own)
        sent = [num_rows * len(share) for share in self.assignment]
        dist.all_to_all_single(indices, outgoing, [num_rows * own] * num_ranks, sent, group=self.process_group)
        looked_up = self.local(indices.view(num_ranks * num_rows, own))
        widths = [sum(self.layout.embedding_dims[table] for table in share) for share in self.assignment]
        received = [num_rows * width for width in widths]
        returned = _Exchange.apply(looked_up.reshape(-1), received, num_rows * widths[self.rank], self.process_group)
        columns: dict[int, Tensor] = {}
        for share, width, part in zip(self.assignment, widths, returned.split(received), strict=True):
            dims = [self.layout.embedding_dims[table] for table in share]
            columns.update(zip(share, part.view(num_rows, width).split(dims, 1), strict=True))
        output = torch.cat([columns[table] for table in range(len(self.layout))], 1)
        return output.view(*input.shape[:-1], output.shape[1])

    @torch.no_grad()
    def to_multi_embedding(self) -> FastMultiEmbedding:
        """The whole layer, a copy, on every rank. All ranks must call it."""
        tables: dict[int, Tensor] = {}
        for rank, share in enumerate(self.assignment):
            part = self.local.weight.detach().clone()
            if rank != self.rank:
                numel = self._part(rank, device="meta").layout.numel
                part = self.local.weight.new_empty(numel)
            source = rank if self.process_group is None else dist.get_global_rank(self.process_group, rank)
            dist.broadcast(part, source, group=self.process_group)
            tables.update(zip(share, self._part(rank, device="meta").layout.tables(part), strict=True))
        return FastMultiEmbedding(
            self.layout.num_embeddings,
            self.layout.embedding_dims,
            padding_idx=self.padding_idx,
            _weight=[tables[table] for table in range(len(self.layout))],
        )

    def extra_repr(self) -> str:
        return f"{list(self.layout.num_embeddings)}, {list(self.layout.embedding_dims)}, ranks={len(self.assignment)}"


class _Exchange(torch.autograd.Function):
    """Rows back to the ranks that asked; in the backward, their gradients to the ranks with the tables, averaged."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, [sent] * len(received), group
        output = rows.new_empty(sum(received))
        dist.all_to_all_single(output, rows.contiguous(), received, ctx.sent, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].contiguous() / len(ctx.received)
        output = grad.new_empty(sum(ctx.sent))
        dist.all_to_all_single(output, grad, ctx.sent, ctx.received, group=ctx.group)
        return output, None, None, None
