"""Where each table stands in the flat weight of :class:`fast_embedding.FastMultiEmbedding`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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
