"""Where each table stands in the flat weight of :class:`fast_embedding.FastMultiEmbedding`, and who reads it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# Saved with every state dict. The rule below may never change under the same number.
LAYOUT_VERSION = 1

# Elements. Eight of the narrowest supported type, 2 bytes, are the 16 bytes of the widest load; counting elements and
# not bytes keeps the layout the same in every dtype, so that `module.half()` moves nothing.
ALIGNMENT = 8


@dataclass(frozen=True, init=False)
class TableLayout:
    """The layout of several tables in one flat tensor, version 1.

    Tables follow each other in order. Each is row-major and packed, and starts at a multiple of 8 elements; the up to
    7 elements of a hole, also the one behind the last table, are zero. So the weights of two layouts, concatenated,
    are the weight of the concatenated tables.

    Args:
        num_embeddings: rows of each table, ints >= 0.
        embedding_dims: columns of each table, ints >= 0.

    Attributes:
        offsets: first element of each table.
        numel: elements of the flat tensor, holes included.

    Raises:
        TypeError: a size is not an int, or an argument not a sequence.
        ValueError: a size is negative, the lengths differ, or there is no table.

    >>> layout = TableLayout([3, 5], [5, 2])
    >>> layout.offsets, layout.numel
    ((0, 16), 32)
    """

    num_embeddings: tuple[int, ...]
    embedding_dims: tuple[int, ...]
    offsets: tuple[int, ...] = field(compare=False)
    numel: int = field(compare=False)

    def __init__(self, num_embeddings: Iterable[int], embedding_dims: Iterable[int]) -> None:
        num_embeddings = _sizes("num_embeddings", num_embeddings)
        embedding_dims = _sizes("embedding_dims", embedding_dims)
        if len(num_embeddings) != len(embedding_dims):
            raise ValueError(
                "num_embeddings and embedding_dims must have one entry per table, "
                f"got {len(num_embeddings)} and {len(embedding_dims)} entries"
            )
        if not num_embeddings:
            raise ValueError("num_embeddings must name at least one table, got none")
        offsets = []
        end = 0
        for rows, columns in zip(num_embeddings, embedding_dims, strict=True):
            offsets.append(end)
            end += -(-rows * columns // ALIGNMENT) * ALIGNMENT
        # How a frozen dataclass sets itself up.
        object.__setattr__(self, "num_embeddings", num_embeddings)
        object.__setattr__(self, "embedding_dims", embedding_dims)
        object.__setattr__(self, "offsets", tuple(offsets))
        object.__setattr__(self, "numel", end)

    def __len__(self) -> int:
        """The number of tables."""
        return len(self.num_embeddings)

    def tables(self, weight: Tensor) -> list[Tensor]:
        """Views of the flat ``weight``, shape (numel,), one of shape (num_embeddings, embedding_dim) per table."""
        return [
            weight[offset : offset + rows * columns].view(rows, columns)
            for offset, rows, columns in zip(self.offsets, self.num_embeddings, self.embedding_dims, strict=True)
        ]

    def padding_indices(self, padding_idx: int | Sequence[int | None] | None) -> tuple[int, ...]:
        """The padding row of each table, in [0, num_embeddings), or -1 where it has none.

        Args:
            padding_idx: None for no padding, an int for the same row in every table, or a sequence of one int or None
                per table. Negative values count from the end of each table.

        Raises:
            ValueError: a row is outside its table, or the sequence has another length than there are tables.

        >>> TableLayout([3, 5], [5, 2]).padding_indices(-1)
        (2, 4)
        >>> TableLayout([3, 5], [5, 2]).padding_indices([None, 0])
        (-1, 0)
        """
        if padding_idx is None:
            return (-1,) * len(self)
        rows_of_tables: Sequence[int | None] = (
            padding_idx if isinstance(padding_idx, Sequence) else (padding_idx,) * len(self)
        )
        if len(rows_of_tables) != len(self):
            raise ValueError(
                f"padding_idx must have one entry per table, got {len(rows_of_tables)} for {len(self)} tables"
            )
        return tuple(
            -1 if row is None else _padding_row(table, row, rows)
            for table, (row, rows) in enumerate(zip(rows_of_tables, self.num_embeddings, strict=True))
        )


@dataclass(frozen=True, init=False)
class Columns:
    """Which table each column of an input reads, and what becomes of the rows.

    Args:
        layout: the tables.
        table_of_column: a table of ``layout`` for each column; None for one column per table, in order. Every table
            must be read by one column at least.
        padding_idx: of each table, as :meth:`TableLayout.padding_indices` takes it.
        mode: "concat", or "sum", which needs tables of the same embedding_dim.

    Attributes:
        padding_idx: a row of each table in [0, num_embeddings), -1 where it has none.
        is_sum: whether the mode is "sum".
        output_dim: columns of the output.
        key: all that the operators need to know of the columns, as a string (see :func:`column_fields`):
            torch.compile guards on every int of a tuple, but once on a string.

    Raises:
        TypeError: an entry of ``table_of_column`` is not an int.
        ValueError: ``table_of_column``, ``padding_idx`` or ``mode`` do not fit the tables.

    >>> columns = Columns(TableLayout([3, 5], [4, 2]), table_of_column=[0, 1, 1])
    >>> columns.output_dim
    8
    """

    layout: TableLayout
    tables: tuple[int, ...]
    padding_idx: tuple[int, ...]
    mode: str
    is_sum: bool = field(compare=False)
    output_dim: int = field(compare=False)
    key: str = field(compare=False)

    def __init__(
        self,
        layout: TableLayout,
        table_of_column: Iterable[int] | None = None,
        padding_idx: int | Sequence[int | None] | None = None,
        mode: str = "concat",
    ) -> None:
        if mode not in ("concat", "sum"):
            raise ValueError(f'mode must be "concat" or "sum", got {mode!r}')
        if mode == "sum" and len(set(layout.embedding_dims)) > 1:
            raise ValueError(f'mode "sum" needs tables of one embedding_dim, got {list(layout.embedding_dims)}')
        tables = tuple(range(len(layout))) if table_of_column is None else _sizes("table_of_column", table_of_column)
        if set(tables) != set(range(len(layout))):
            raise ValueError(
                f"table_of_column must name each of the {len(layout)} tables at least once and nothing else, "
                f"got {list(tables)}"
            )
        padding = layout.padding_indices(padding_idx)
        fields = [
            (layout.num_embeddings[table], layout.embedding_dims[table], layout.offsets[table], padding[table])
            for table in tables
        ]
        dims = [layout.embedding_dims[table] for table in tables]
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "tables", tables)
        object.__setattr__(self, "padding_idx", padding)
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "is_sum", mode == "sum")
        object.__setattr__(self, "output_dim", dims[0] if mode == "sum" else sum(dims))
        object.__setattr__(self, "key", ";".join([",".join([str(number) for number in row]) for row in fields]))

    def __len__(self) -> int:
        """The number of columns."""
        return len(self.tables)

    def __reduce__(self) -> tuple[Any, ...]:
        padding_idx = [row if row >= 0 else None for row in self.padding_idx]
        return Columns, (self.layout, self.tables, padding_idx, self.mode)

    @cached_property
    def description(self) -> Tensor:
        """The columns as ``ops.multi_embedding`` takes them: int64 (n, 5) on the CPU."""
        rows = [(rows, dim, offset, dim, padding) for rows, dim, offset, padding in column_fields(self.key)]
        with torch.inference_mode(False):
            return torch.tensor(rows, dtype=torch.int64, device="cpu")


def column_fields(key: str) -> list[tuple[int, int, int, int]]:
    """num_embeddings, embedding_dim, offset and padding_idx of each column of :attr:`Columns.key`."""
    fields = []
    for row in key.split(";"):
        rows, dim, offset, padding = map(int, row.split(","))
        fields.append((rows, dim, offset, padding))
    return fields


def output_columns(key: str, device: torch.device) -> Tensor:
    """What the compiled forward gathers by: int64 (4, C) for the C columns of the concatenated output.

    For each of them the column of the input, the rows and the columns of the table, and where the table's row 0 has
    this column in the weight.
    """
    places = [
        (column, rows, dim, offset + place)
        for column, (rows, dim, offset, _) in enumerate(column_fields(key))
        for place in range(dim)
    ]
    with torch.inference_mode(False):
        return torch.tensor(places, dtype=torch.int64).view(-1, 4).t().contiguous().to(device)


def _padding_row(table: int, row: int, num_embeddings: int) -> int:
    if not -num_embeddings <= row < num_embeddings:
        raise ValueError(f"padding_idx of table {table} must be within its {num_embeddings} rows, got {row}")
    return row % num_embeddings


def _sizes(name: str, values: Iterable[int]) -> tuple[int, ...]:
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of ints, one per table, got {type(values).__name__}")
    sizes = []
    for table, value in enumerate(values):
        try:
            size = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}[{table}] must be an int, got {type(value).__name__}") from None
        if size < 0:
            raise ValueError(f"{name}[{table}] must be >= 0, got {size}")
        sizes.append(size)
    return tuple(sizes)
