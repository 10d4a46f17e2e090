"""Many tables: ``FastMultiEmbedding`` against one ``nn.Embedding`` a table and ``cat`` (or their sum), the same under
``torch.compile``, and one large ``nn.Embedding`` over indices with an offset a table."""

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fast_embedding import FastMultiEmbedding

from .limits import Traffic, count_distinct, traffic
from .measure import (
    BASELINE,
    COMPILED,
    OFFSETS,
    OURS,
    OURS_COMPILED,
    OURS_REPRODUCIBLE,
    Contender,
    Session,
    exact_gradient,
    measure,
    random_weight,
    reproducibly,
    working_set_bytes,
)
from .shapes import MultiShape

# Sums differ by their order, and the baseline's, one addition after the other, round each time: nine terms of 8 bits.
_SUM_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _combined(mode: str, embeddings: Sequence[nn.Embedding], indices: Tensor) -> Tensor:
    """What people write."""
    rows = [embedding(indices[:, table]) for table, embedding in enumerate(embeddings)]
    return functools.reduce(torch.add, rows) if mode == "sum" else torch.cat(rows, dim=1)


def contenders(
    embeddings: Sequence[nn.Embedding],
    indices: Tensor,
    session: Session,
    mode: str = "concat",
    *,
    compiled: bool = False,
) -> list[Contender]:
    """The lookups of ``indices`` ``[num_rows, num_tables]`` in tables of the same values, the baseline first."""
    weights = tuple(embedding.weight for embedding in embeddings)
    ours = FastMultiEmbedding.from_embeddings(embeddings, mode=mode)
    baseline = functools.partial(_combined, mode, embeddings)

    def lookup() -> Tensor:
        output: Tensor = ours(indices)
        return output

    def per_table(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        (flat,) = gradients
        return ours.layout.tables(flat)

    entries = [
        Contender(BASELINE, lambda: baseline(indices), weights),
        Contender(OURS, lookup, (ours.weight,), per_table),
    ]
    if len(set(ours.embedding_dims)) == 1:
        entries.append(_one_table(ours, indices))
    if session.reproducible:
        entries.append(Contender(OURS_REPRODUCIBLE, lookup, (ours.weight,), per_table, reproducibly))
    if session.compile or compiled:
        torch._dynamo.reset()  # else the shapes before count towards its limit of recompilations
        theirs = torch.compile(baseline, dynamic=False)
        also_ours = torch.compile(ours, dynamic=False)
        entries.append(Contender(COMPILED, lambda: theirs(indices), weights))
        entries.append(Contender(OURS_COMPILED, lambda: also_ours(indices), (ours.weight,), per_table))
    return entries


def _one_table(ours: FastMultiEmbedding, indices: Tensor) -> Contender:
    """One ``nn.Embedding`` with the rows of all tables; its weight is ours where that has no holes."""
    dim = ours.embedding_dims[0]
    starts = [0, *itertools.accumulate(ours.num_embeddings)]
    packed = starts[-1] * dim == ours.layout.numel
    flat = ours.weight.detach()
    weight = (
        flat.view(-1, dim)
        if packed
        else torch.cat([table.flatten() for table in ours.layout.tables(flat)]).view(-1, dim)
    )
    together = nn.Embedding(starts[-1], dim, _weight=weight)
    offsets = torch.tensor(starts[:-1], device=indices.device)

    def lookup() -> Tensor:
        rows: Tensor = together(indices + offsets)
        return rows.sum(1) if ours.mode == "sum" else rows.flatten(1)

    def per_table(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        (gradient,) = gradients
        return gradient.split(list(ours.num_embeddings))

    return Contender(OFFSETS, lookup, (together.weight,), per_table)


def required_bytes(shape: MultiShape, dtype: torch.dtype) -> int:
    """Device memory that ``run`` may need."""
    sizes = zip(shape.num_embeddings, shape.embedding_dims, strict=True)
    return working_set_bytes(
        shape.weight_numel,
        max(rows * dim for rows, dim in sizes),
        shape.num_rows * sum(shape.embedding_dims),
        shape.num_rows * shape.num_tables,
        dtype.itemsize,
    )


def _traffic(shape: MultiShape, distinct: Sequence[int], element_size: int) -> Traffic:
    tables = [
        traffic(
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            num_indices=shape.num_rows,
            distinct=rows_read,
            element_size=element_size,
        )
        for num_embeddings, embedding_dim, rows_read in zip(
            shape.num_embeddings, shape.embedding_dims, distinct, strict=True
        )
    ]
    # Summed tables write one output and read one gradient of it.
    counted_again = shape.num_rows * (sum(shape.embedding_dims) - shape.output_dim) * element_size
    return sum(tables, Traffic()).without(counted_again)


def run(shape: MultiShape, dtype: torch.dtype, session: Session) -> dict[str, object]:
    """Measures one shape. Returns ``measure``'s record with the shape's own numbers in front."""
    indices = shape.draw(session.seed).to(session.device)
    torch.manual_seed(session.seed)
    sizes = list(zip(shape.num_embeddings, shape.embedding_dims, strict=True))
    embeddings = [nn.Embedding(*size, _weight=random_weight(*size, dtype, session)) for size in sizes]
    grad_output = torch.randn(shape.num_rows, shape.output_dim, dtype=dtype, device=session.device)
    slices = (
        [grad_output] * shape.num_tables if shape.mode == "sum" else grad_output.split(list(shape.embedding_dims), 1)
    )
    exact: list[Callable[[], Tensor]] = [
        functools.partial(exact_gradient, rows, indices[:, table], slices[table])
        for table, rows in enumerate(shape.num_embeddings)
    ]
    distinct = [count_distinct(indices[:, table]) for table in range(shape.num_tables)]
    compiled = shape.compiled and session.compile_chosen and dtype == torch.float32
    return {
        "label": shape.label,
        "num_tables": shape.num_tables,
        "num_rows": shape.num_rows,
        "num_embeddings": list(shape.num_embeddings),
        "embedding_dims": list(shape.embedding_dims),
        "distribution": shape.distribution,
        "note": shape.note,
        "mode": shape.mode,
        "fbgemm_us": shape.fbgemm_us if dtype == torch.float32 else None,
        "dtype": str(dtype).removeprefix("torch."),
        "distinct": distinct,
        **measure(
            contenders(embeddings, indices, session, shape.mode, compiled=compiled),
            grad_output,
            exact,
            _traffic(shape, distinct, dtype.itemsize),
            session,
            output_tolerance=_SUM_TOLERANCE[dtype] if shape.mode == "sum" else 0,
        ),
    }
