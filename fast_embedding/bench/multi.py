"""Many tables: ``FastMultiEmbedding`` against one ``nn.Embedding`` a table and ``cat``."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fast_embedding import FastMultiEmbedding

from .limits import Traffic, count_distinct, traffic
from .measure import (
    BASELINE,
    COMPILED,
    INDEX_ADD,
    OURS,
    OURS_REPRODUCIBLE,
    Contender,
    Session,
    exact_gradient,
    index_add_lookup,
    measure,
    plain_lookup,
    random_weight,
    reproducibly,
    working_set_bytes,
)
from .shapes import MultiShape


def _concatenated(lookup: Callable[[Tensor, Tensor], Tensor], weights: Sequence[Tensor], indices: Tensor) -> Tensor:
    return torch.cat([lookup(weight, indices[:, table]) for table, weight in enumerate(weights)], dim=1)


def contenders(embeddings: Sequence[nn.Embedding], indices: Tensor, session: Session) -> list[Contender]:
    """The lookups of ``indices`` ``[num_rows, num_tables]`` in tables of the same values, the baseline first."""
    weights = tuple(embedding.weight for embedding in embeddings)
    ours = FastMultiEmbedding.from_embeddings(embeddings)

    def baseline() -> Tensor:
        return torch.cat([embedding(indices[:, table]) for table, embedding in enumerate(embeddings)], dim=1)

    def lookup() -> Tensor:
        output: Tensor = ours(indices)
        return output

    def per_table(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        (flat,) = gradients
        return ours.layout.tables(flat)

    entries = [
        Contender(BASELINE, baseline, weights),
        Contender(INDEX_ADD, lambda: _concatenated(index_add_lookup, weights, indices), weights),
        Contender(OURS, lookup, (ours.weight,), per_table),
    ]
    if session.reproducible:
        entries.append(Contender(OURS_REPRODUCIBLE, lookup, (ours.weight,), per_table, reproducibly))
    if session.compile:
        torch._dynamo.reset()  # else the shapes before count towards its limit of recompilations
        compiled = torch.compile(functools.partial(_concatenated, plain_lookup), dynamic=False)
        entries.append(Contender(COMPILED, lambda: compiled(weights, indices), weights))
    return entries


def required_bytes(shape: MultiShape, dtype: torch.dtype) -> int:
    """Device memory that ``run`` may need."""
    return working_set_bytes(
        sum(rows * dim for rows, dim in zip(shape.num_embeddings, shape.embedding_dims, strict=True)),
        shape.num_rows * sum(shape.embedding_dims),
        shape.num_rows * shape.num_tables,
        dtype.itemsize,
    )


def run(shape: MultiShape, dtype: torch.dtype, session: Session) -> dict[str, object]:
    """Measures one shape. Returns ``measure``'s record with the shape's own numbers in front."""
    indices = shape.draw(session.seed).to(session.device)
    torch.manual_seed(session.seed)
    sizes = list(zip(shape.num_embeddings, shape.embedding_dims, strict=True))
    embeddings = [nn.Embedding(*size, _weight=random_weight(*size, dtype, session)) for size in sizes]
    grad_output = torch.randn(shape.num_rows, sum(shape.embedding_dims), dtype=dtype, device=session.device)
    distinct = [count_distinct(indices[:, table]) for table in range(shape.num_tables)]
    moved = sum(
        (
            traffic(
                num_embeddings=num_embeddings,
                embedding_dim=embedding_dim,
                num_indices=shape.num_rows,
                distinct=rows_read,
                element_size=dtype.itemsize,
            )
            for (num_embeddings, embedding_dim), rows_read in zip(sizes, distinct, strict=True)
        ),
        Traffic(),
    )
    return {
        "label": shape.label,
        "num_tables": shape.num_tables,
        "num_rows": shape.num_rows,
        "num_embeddings": list(shape.num_embeddings),
        "embedding_dims": list(shape.embedding_dims),
        "distribution": shape.distribution,
        "note": shape.note,
        "dtype": str(dtype).removeprefix("torch."),
        "distinct": distinct,
        **measure(
            contenders(embeddings, indices, session),
            grad_output,
            lambda: [
                exact_gradient(num_embeddings, indices[:, table], columns)
                for table, (num_embeddings, columns) in enumerate(
                    zip(shape.num_embeddings, grad_output.split(list(shape.embedding_dims), 1), strict=True)
                )
            ],
            moved,
            session,
        ),
    }
