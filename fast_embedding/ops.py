"""The native operators, loaded at first use.

These are the operators as they stand, without the cases that PyTorch's own take over: :mod:`fast_embedding.functional`
is what programs call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._loader import constant_while_tracing, load, load_while_tracing, native_platform, require

__all__ = [
    "constant_while_tracing",
    "embedding",
    "load",
    "multi_embedding",
    "native_platform",
    "require",
    "traced_multi_embedding",
]

# By Dynamo, which alone must not see what is behind a torch.ops object; is_compiling() costs 0.1 us more.
_is_compiling = torch.compiler.is_dynamo_compiling

# What torch.ops' objects call themselves: looking one of those up costs 0.2 us, and its own Python frame as much again.
# Dynamo knows the objects alone.
_direct: dict[str, Callable[..., Tensor]] = {}


def embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """Rows of one table.

    Args:
        weight: (V, D), any floating type; kernels exist for float32, float64, float16 and bfloat16.
        indices: int32 or int64, any shape and strides, on the weight's device.
        padding_idx: a row that gets no gradient, in [0, V), or -1 for none.
        scale_grad_by_freq: divide the gradient of a row by the number of indices that name it.
        sparse: make the weight's gradient a sparse tensor, coalesced.

    Returns:
        (\\*indices.shape, D) in the weight's dtype, contiguous.

    Raises:
        RuntimeError: wrong dtype, shape or device; no native library (see :func:`load` and :func:`require`).
        IndexError: on the CPU, an index outside [0, V). On CUDA that is a device-side assert.
    """
    if _is_compiling():
        load_while_tracing()
        if scale_grad_by_freq or sparse:
            return torch.ops.fast_embedding.embedding.options(weight, indices, padding_idx, scale_grad_by_freq, sparse)
        return torch.ops.fast_embedding.embedding.default(weight, indices, padding_idx)
    if scale_grad_by_freq or sparse:
        call = _direct.get("embedding.options") or _load_direct("embedding.options")
        return call(weight, indices, padding_idx, scale_grad_by_freq, sparse)
    return (_direct.get("embedding") or _load_direct("embedding"))(weight, indices, padding_idx)


def multi_embedding(weight: Tensor, indices: Tensor, tables: Tensor, sum: bool = False) -> Tensor:
    """Rows of n tables, side by side or added. Not for what is traced, see :func:`traced_multi_embedding`.

    Args:
        weight: (numel,), all tables.
        indices: (..., n), int32 or int64, any strides, on the weight's device; column t reads the table of row t of
            ``tables``.
        tables: int64 (n, 5) on the CPU: rows V_t, columns D_t, where the table begins in the weight, D_t once more, and
            a row that gets no gradient, or -1 for none. Tables are packed and do not overlap, unless they are the same.
        sum: add the rows, all of one D, in column order, instead of concatenating them.

    Returns:
        (..., D_0 + ... + D_{n-1}), or (..., D), in the weight's dtype, contiguous.

    Raises:
        RuntimeError, IndexError: as :func:`embedding`, or tables that do not fit the weight.
    """
    call = _direct.get("multi_embedding.described") or _load_direct("multi_embedding.described")
    return call(weight, indices, tables, sum)


def traced_multi_embedding(
    weight: Tensor,
    indices: Tensor,
    num_embeddings: Sequence[int],
    embedding_dims: Sequence[int],
    weight_offsets: Sequence[int],
    padding_idx: Sequence[int],
    sum: bool,
    columns: Tensor | None,
) -> Tensor:
    """:func:`multi_embedding` for torch.compile, which keeps ints in its graphs and knows no values of tensors.

    Args:
        weight, indices, sum: as in :func:`multi_embedding`.
        num_embeddings, embedding_dims, weight_offsets, padding_idx: what ``tables`` holds there.
        columns: :func:`fast_embedding.layout.output_columns`, on the weight's device, by which a concatenation becomes
            one ``aten.take``; a sum needs none.
    """
    load_while_tracing()
    return torch.ops.fast_embedding.multi_embedding.default(
        weight, indices, num_embeddings, embedding_dims, weight_offsets, padding_idx, sum, columns
    )


def _load_direct(name: str) -> Callable[..., Tensor]:
    load()
    operator, _, overload_name = name.partition(".")
    overload = getattr(getattr(torch.ops.fast_embedding, operator), overload_name or "default")
    return _direct.setdefault(name, getattr(overload, "_op", overload))
