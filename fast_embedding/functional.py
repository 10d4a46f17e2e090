"""The lookups of :mod:`fast_embedding` as functions.

:func:`embedding` is :func:`torch.nn.functional.embedding`, accelerated; :func:`multi_embedding` looks up several tables
at once. Both give the result of the plain torch operations, and run them wherever the accelerated ones have nothing
to offer: options that are not accelerated, tensor subclasses, other devices, ``torch.export``, ``torch.jit``.

An index outside its table raises :exc:`IndexError` on the CPU. On a GPU it fails a device assertion, as in torch,
unless ``check_indices=True`` or the environment variable ``FAST_EMBEDDING_CHECK=1`` (read at import) asks for an
:exc:`IndexError` there too, which costs a synchronisation a call. The check is skipped where the indices cannot be
read: under ``torch.compile``, under ``torch.func`` transforms, and while a CUDA graph is captured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from . import ops
from .layout import Columns, TableLayout, column_fields, output_columns

__all__ = ["embedding", "multi_embedding"]

_CHECK_INDICES = os.environ.get("FAST_EMBEDDING_CHECK", "0") not in ("", "0")

# A subclass (DTensor, a quantised tensor, ...) brings its own rules for aten::embedding and has none for our op.
_PLAIN_TENSORS = (Parameter, Tensor)
_ON_CPU = ops.native_platform()
_ON_CUDA = ops.native_platform() and torch.version.hip is None

# Indices. On the CPU an op from a library costs 0.3 us over torch's own, its autograd node 2 us more; measured at
# D = 4 to 64 and V = 10 to 50000, a training step wins them back from 64 indices on.
_CPU_MIN_INDICES = 64

# As it was at import: enable() puts a function in its place that comes back here.
_torch_embedding = F.embedding

_Lists = tuple[list[int], list[int], list[int], list[int]]

_is_compiling = torch.compiler.is_compiling
# The small lookup, 3 us on the CPU, asks what is behind these functions: they cost 0.4 us.
_compiler = torch.compiler
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_tracing = torch._C._is_tracing
_functorch_level = torch._C._functorch.peek_interpreter_stack


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    check_indices: bool | None = None,
) -> Tensor:
    """Look up rows of ``weight``: :func:`torch.nn.functional.embedding` with a faster forward and backward.

    The gradient of ``weight`` accumulates in float32 for 16-bit types and is rounded once. ``max_norm`` is torch's own,
    unaccelerated, and so are ``scale_grad_by_freq`` and ``sparse`` under torch.compile.

    Args:
        input: int32 or int64, any shape.
        weight: (num_embeddings, embedding_dim); accelerated in float32, float64, float16 and bfloat16.
        padding_idx: a row that gets no gradient; negative values count from the end.
        max_norm, norm_type: renormalise the rows looked up, in place, to at most this norm.
        scale_grad_by_freq: divide the gradient of a row by its number of occurrences in ``input``. Derivatives of that
            gradient leave the division out, as torch's do.
        sparse: give ``weight`` a sparse gradient. It is coalesced: ``indices()`` are the rows of ``input``, ascending,
            each once. On a GPU the backward waits for their number, unless there is one lookup or one row. While a
            CUDA graph is captured, and where the gradient is derived from, it is torch's own, not coalesced.
        check_indices: raise :exc:`IndexError` on a GPU too; None means ``FAST_EMBEDDING_CHECK``.

    Returns:
        (\\*input.shape, embedding_dim), the dtype of ``weight``.

    Raises:
        IndexError: an index is outside [0, num_embeddings).
        AssertionError: ``padding_idx`` is outside the table.
        RuntimeError: ``input`` is not int32 or int64, ``weight`` is not 2-D, they are on different devices, or the
            native library cannot be loaded.

    >>> weight = torch.arange(6.0).view(3, 2)
    >>> embedding(torch.tensor([[0, 2]]), weight)
    tensor([[[0., 1.],
             [4., 5.]]])
    """
    if check_indices or (check_indices is None and _CHECK_INDICES):
        _check_indices(input, weight.size(0))
    if (
        max_norm is not None
        or _falls_through(input, weight)
        or ((scale_grad_by_freq or sparse) and (_is_compiling() or (scale_grad_by_freq and sparse)))
    ):
        return _torch_embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if padding_idx is None:
        padding_idx = -1
    else:
        num_embeddings = weight.size(0)
        if not -num_embeddings <= padding_idx < num_embeddings:
            return _torch_embedding(input, weight, padding_idx)  # which knows its own error
        if padding_idx < 0:
            padding_idx += num_embeddings
    if (
        weight.is_cpu
        and not sparse
        and not _is_dynamo_compiling()
        and not _compiler._is_compiling_flag
        and input.numel() < _CPU_MIN_INDICES
    ):
        try:
            return torch.embedding(weight, input, padding_idx, scale_grad_by_freq)
        except IndexError:
            _check_indices(input, weight.size(0))  # torch's own error names neither index nor table
            raise
    if scale_grad_by_freq or sparse:
        return ops.embedding(weight, input, padding_idx, scale_grad_by_freq, sparse)
    return ops.embedding(weight, input, padding_idx)


def multi_embedding(
    input: Tensor,
    weight: Tensor,
    num_embeddings: Sequence[int],
    embedding_dims: Sequence[int],
    *,
    table_of_column: Sequence[int] | None = None,
    padding_idx: int | Sequence[int | None] | None = None,
    mode: str = "concat",
    check_indices: bool | None = None,
) -> Tensor:
    """Look up a row in each of n tables and concatenate or add the rows.

    Equal to ``cat([embedding(input[..., t], tables[t]) for t in range(n)], -1)`` where ``tables`` are the views
    ``TableLayout(num_embeddings, embedding_dims).tables(weight)``, in one operation. Sums accumulate in float32 for
    16-bit types, in the output and in the gradient, and are rounded once.

    Args:
        input: int32 or int64, (\\*, n): column t indexes table t, or table ``table_of_column[t]``.
        weight: (TableLayout(num_embeddings, embedding_dims).numel,).
        num_embeddings, embedding_dims: rows and columns of each table.
        table_of_column: where several columns read one table: the table of each of the n columns, ``[0, 1, 1]`` say.
            The table gets the sum of the gradients, each of them rounded to 16 bits where the weight has 16.
        padding_idx: rows that get no gradient: None, one int for every table, or an int or None per table; negative
            values count from the end of the table.
        mode: "concat", or "sum", which needs tables of the same embedding_dim.
        check_indices: raise :exc:`IndexError` on a GPU too; None means ``FAST_EMBEDDING_CHECK``.

    Returns:
        (\\*, sum of the columns' embedding_dims), or (\\*, embedding_dim) with mode "sum"; the dtype of ``weight``.

    Raises:
        IndexError: an index is outside its table.
        ValueError: shapes, sizes, ``table_of_column``, ``padding_idx`` or ``mode`` do not fit each other.
        RuntimeError: ``input`` is not int32 or int64, it is on another device than ``weight``, or the native library
            cannot be loaded.

    >>> weight = torch.arange(16.0)  # rows of table 0 start at elements 0 and 2, of table 1 at 8, 9 and 10
    >>> multi_embedding(torch.tensor([[0, 2], [1, 0]]), weight, [2, 3], [2, 1])
    tensor([[ 0.,  1., 10.],
            [ 2.,  3.,  8.]])
    """
    columns = Columns(TableLayout(num_embeddings, embedding_dims), table_of_column, padding_idx, mode)
    return lookup_columns(input, weight, columns, check_indices)


def lookup_columns(input: Tensor, weight: Tensor, columns: Columns, check_indices: bool | None = None) -> Tensor:
    """:func:`multi_embedding` with its arguments checked and laid out."""
    if check_indices or (check_indices is None and _CHECK_INDICES):
        _check_columns(input, weight, columns)
        _check_indices(input, [columns.layout.num_embeddings[table] for table in columns.tables])
    if _falls_through(input, weight):
        _check_columns(input, weight, columns)
        return _separate_lookups(input, weight, columns)
    if _is_compiling():
        _check_columns(input, weight, columns)
        fields: _Lists = _traced_fields(columns.key)
        places = None if columns.is_sum else _traced_columns(columns.key, weight.device)
        return ops.traced_multi_embedding(weight, input, *fields, columns.is_sum, places)
    if weight.numel() != columns.layout.numel:
        _check_columns(input, weight, columns)
    if _functorch_level() is not None:  # a transform would wrap the description, too
        return ops.traced_multi_embedding(weight, input, *_lists(columns.key), columns.is_sum, None)
    try:
        return ops.multi_embedding(weight, input, columns.description, columns.is_sum)
    except RuntimeError:
        _check_columns(input, weight, columns)  # whose error says more; looking beforehand costs every call 0.5 us
        raise


def _check_columns(input: Tensor, weight: Tensor, columns: Columns) -> None:
    if input.dim() == 0 or input.shape[-1] != len(columns):
        raise ValueError(
            f"input must have one column per table in its last dimension, {len(columns)}, "
            f"got shape {tuple(input.shape)}"
        )
    numel = columns.layout.numel
    if weight.dim() != 1 or weight.shape[0] != numel:
        raise ValueError(f"weight must have shape ({numel},) for these tables, got {tuple(weight.shape)}")


def _separate_lookups(input: Tensor, weight: Tensor, columns: Columns) -> Tensor:
    tables = columns.layout.tables(weight)
    rows = [
        _torch_embedding(
            input[..., column], tables[table], columns.padding_idx[table] if columns.padding_idx[table] >= 0 else None
        )
        for column, table in enumerate(columns.tables)
    ]
    return torch.stack(rows, -2).sum(-2) if columns.is_sum else torch.cat(rows, -1)


def _lists(key: str) -> _Lists:
    num_embeddings, embedding_dims, offsets, padding_idx = zip(*column_fields(key), strict=True)
    return list(num_embeddings), list(embedding_dims), list(offsets), list(padding_idx)


# Dynamo calls these two while it traces, and their results are constants of the graph.
@ops.constant_while_tracing
def _traced_fields(key: str) -> _Lists:
    return _lists(key)


@ops.constant_while_tracing
def _traced_columns(key: str, device: torch.device) -> Tensor:
    columns = output_columns(key, device)
    torch._dynamo.mark_static(columns)  # or dynamic=True makes a symbol of its size, which torch 2.4 cannot guard
    return columns


def _falls_through(input: Tensor, weight: Tensor) -> bool:
    """Whether a lookup is left to plain torch. What only C++ can see (torch.func, forward-mode AD) is decided there."""
    return (
        type(weight) not in _PLAIN_TENSORS
        or type(input) not in _PLAIN_TENSORS
        or not ((weight.is_cpu and _ON_CPU) or (weight.is_cuda and _ON_CUDA))
        # What torch.compiler.is_exporting() (from torch 2.7) returns, except that Dynamo of torch 2.11 makes that True.
        or getattr(_compiler, "_is_exporting_flag", False)
        or (not _is_dynamo_compiling() and _is_tracing())
    )


def _check_indices(indices: Tensor, num_embeddings: int | Sequence[int]) -> None:
    """Raise IndexError for the first index outside its table, unless the indices cannot be read.

    Args:
        indices: any shape; with several tables (\\*, n).
        num_embeddings: rows of the one table, or of each of the n.
    """
    if (
        _is_compiling()
        or type(indices) is not Tensor
        or indices.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(indices)
        or (indices.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return
    if isinstance(num_embeddings, int):
        out_of_range = (indices < 0) | (indices >= num_embeddings)
    else:
        out_of_range = (indices < 0) | (indices >= torch.tensor(num_embeddings, device=indices.device))
    if not out_of_range.any():
        return
    position = out_of_range.nonzero()[0].tolist()
    found = f"indices{position} = {indices[tuple(position)].item()} is out of range for"
    if isinstance(num_embeddings, int):
        raise IndexError(f"{found} an embedding of {num_embeddings} rows")
    raise IndexError(f"{found} table {position[-1]} of {num_embeddings[position[-1]]} rows")
