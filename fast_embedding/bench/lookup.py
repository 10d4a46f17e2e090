"""One table: ``FastEmbedding`` against ``nn.Embedding``, ``index_add_`` and, on request, ``torch.compile``."""

import torch
from torch import Tensor, nn

from fast_embedding import FastEmbedding

from .limits import count_distinct, traffic
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
from .shapes import LookupShape


def contenders(weight: Tensor, indices: Tensor, session: Session) -> list[Contender]:
    """The lookups of ``indices`` in one shared ``weight``, the baseline first."""
    num_embeddings, embedding_dim = weight.shape
    baseline = nn.Embedding(num_embeddings, embedding_dim, _weight=weight)
    ours = FastEmbedding(num_embeddings, embedding_dim, _weight=weight)

    def lookup() -> Tensor:
        output: Tensor = ours(indices)
        return output

    entries = [
        Contender(BASELINE, lambda: baseline(indices), (baseline.weight,)),
        Contender(INDEX_ADD, lambda: index_add_lookup(baseline.weight, indices), (baseline.weight,)),
        Contender(OURS, lookup, (ours.weight,)),
    ]
    if session.reproducible:
        entries.append(Contender(OURS_REPRODUCIBLE, lookup, (ours.weight,), under=reproducibly))
    if session.compile:
        torch._dynamo.reset()  # else the shapes before count towards its limit of recompilations
        compiled = torch.compile(plain_lookup, dynamic=False)
        entries.append(Contender(COMPILED, lambda: compiled(baseline.weight, indices), (baseline.weight,)))
    return entries


def required_bytes(shape: LookupShape, dtype: torch.dtype) -> int:
    """Device memory that ``run`` may need."""
    return working_set_bytes(
        shape.num_embeddings * shape.embedding_dim,
        shape.num_embeddings * shape.embedding_dim,
        shape.num_indices * shape.embedding_dim,
        shape.num_indices,
        dtype.itemsize,
    )


def run(shape: LookupShape, dtype: torch.dtype, session: Session) -> dict[str, object]:
    """Measures one shape. Returns ``measure``'s record with the shape's own numbers in front."""
    indices = shape.draw(session.seed).to(session.device)
    torch.manual_seed(session.seed)
    weight = random_weight(shape.num_embeddings, shape.embedding_dim, dtype, session)
    grad_output = torch.randn(shape.num_indices, shape.embedding_dim, dtype=dtype, device=session.device)
    distinct = count_distinct(indices)
    moved = traffic(
        num_embeddings=shape.num_embeddings,
        embedding_dim=shape.embedding_dim,
        num_indices=shape.num_indices,
        distinct=distinct,
        element_size=dtype.itemsize,
    )
    return {
        **shape.as_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "distinct": distinct,
        **measure(
            contenders(weight, indices, session),
            grad_output,
            [lambda: exact_gradient(shape.num_embeddings, indices, grad_output)],
            moved,
            session,
        ),
    }
