"""The layers of :mod:`fast_embedding`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from . import functional
from .layout import LAYOUT_VERSION, Columns, TableLayout

__all__ = ["FastEmbedding", "FastMultiEmbedding"]


class FastEmbedding(nn.Embedding):
    """:class:`torch.nn.Embedding` with a faster forward and backward.

    Constructor, attributes, ``from_pretrained`` and state dict are those of nn.Embedding; only ``forward`` differs, see
    :func:`fast_embedding.functional.embedding`. ``max_norm`` works and is torch's own, unaccelerated.

    >>> layer = FastEmbedding(10, 3, padding_idx=0)
    >>> layer
    FastEmbedding(10, 3, padding_idx=0)
    >>> layer(torch.tensor([[1, 2, 0]])).shape
    torch.Size([1, 3, 3])
    >>> layer(torch.tensor([1, 1, 0])).sum().backward()
    >>> layer.weight.grad[:2]
    tensor([[0., 0., 0.],
            [2., 2., 2.]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Look up ``input``, int32 or int64 of any shape; returns (\\*input.shape, embedding_dim)."""
        return functional.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )

    def __prepare_scriptable__(self) -> nn.Embedding:
        # What torch.jit.script compiles in place of this module; it shares the parameter.
        plain: nn.Embedding = copy.copy(self)
        plain.__class__ = nn.Embedding
        return plain


class FastMultiEmbedding(nn.Module):
    """Several embedding tables, looked up and concatenated (or added) by one operation.

    Table t has ``num_embeddings[t]`` rows of ``embedding_dims[t]`` columns. All tables live in one flat parameter, so
    that a lookup is one launch, and an optimizer step too, whatever their number. Values are initialised as
    nn.Embedding does, table by table: the same random seed gives the same tables.

    Sparse gradients are not offered: the gradient is that of the one flat parameter, whose rows have no common length.
    For the same reason there are no ``max_norm`` and ``scale_grad_by_freq``.

    Args:
        num_embeddings: rows of each table.
        embedding_dims: columns of each table.
        table_of_column: where several columns of the input read one table: the table of each column, ``[0, 1, 1, 2]``
            for a second and a third column with a table in common. By default column t reads table t.
        padding_idx: rows that start as zero and get no gradient: None, one int for every table, or an int or None per
            table; negative values count from the end of the table.
        mode: "concat", or "sum", which needs tables of the same embedding_dim.
        _weight: initial values, used without a copy if they are one flat tensor laid out by
            :class:`fast_embedding.layout.TableLayout`, copied if they are a sequence of one 2-D tensor per table.
        device, dtype: of the parameter, as in nn.Embedding; with ``_weight`` they are those of ``_weight``.

    Attributes:
        weight: the flat parameter.
        layout: where each table stands in it, a :class:`fast_embedding.layout.TableLayout`.
        table_of_column: a tuple of the table that each column reads.
        padding_idx: a tuple of one row in [0, num_embeddings[t]) or None per table.

    Raises:
        TypeError: a size is not an int.
        ValueError: sizes, ``table_of_column``, ``padding_idx``, ``mode`` or ``_weight`` do not fit each other.

    >>> layer = FastMultiEmbedding([100, 20], [4, 2])
    >>> layer
    FastMultiEmbedding([100, 20], [4, 2])
    >>> x = torch.tensor([[99, 0], [5, 19], [5, 3]])
    >>> layer(x).shape
    torch.Size([3, 6])
    >>> first, second = layer.tables()
    >>> bool((layer(x) == torch.cat([first[x[:, 0]], second[x[:, 1]]], 1)).all())
    True
    """

    # Module.state_dict() saves it, so that a later layout can tell how to read an earlier one.
    _version = LAYOUT_VERSION

    def __init__(
        self,
        num_embeddings: Sequence[int],
        embedding_dims: Sequence[int],
        *,
        table_of_column: Sequence[int] | None = None,
        padding_idx: int | Sequence[int | None] | None = None,
        mode: str = "concat",
        _weight: Tensor | Sequence[Tensor] | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layout = TableLayout(num_embeddings, embedding_dims)
        self._columns = Columns(self.layout, table_of_column, padding_idx, mode)
        if _weight is None:
            self.weight = Parameter(torch.empty(self.layout.numel, device=device, dtype=dtype))
            self.reset_parameters()
        elif isinstance(_weight, Tensor):
            if tuple(_weight.shape) != (self.layout.numel,):
                raise ValueError(
                    f"_weight must have shape ({self.layout.numel},) for these tables, got {tuple(_weight.shape)}"
                )
            self.weight = Parameter(_weight)
        else:
            self.weight = Parameter(self._flatten(_weight))

    def _flatten(self, tables: Sequence[Tensor]) -> Tensor:
        if len(tables) != len(self.layout):
            raise ValueError(f"_weight must have one tensor per table, got {len(tables)} for {len(self.layout)} tables")
        weight = torch.zeros(self.layout.numel, dtype=tables[0].dtype, device=tables[0].device)
        for index, (target, source) in enumerate(zip(self.layout.tables(weight), tables, strict=True)):
            if (source.shape, source.dtype, source.device) != (target.shape, target.dtype, target.device):
                raise ValueError(
                    f"table {index} must be {target.dtype} of shape {tuple(target.shape)} on {target.device}, "
                    f"got {source.dtype} of shape {tuple(source.shape)} on {source.device}"
                )
            target.copy_(source.detach())
        return weight

    @property
    def num_embeddings(self) -> tuple[int, ...]:
        """Rows of each table."""
        return self.layout.num_embeddings

    @property
    def embedding_dims(self) -> tuple[int, ...]:
        """Columns of each table."""
        return self.layout.embedding_dims

    @property
    def table_of_column(self) -> tuple[int, ...]:
        """The table that each column of the input reads."""
        return self._columns.tables

    @property
    def padding_idx(self) -> tuple[int | None, ...]:
        """The padding row of each table, None where it has none."""
        return tuple(row if row >= 0 else None for row in self._columns.padding_idx)

    @property
    def mode(self) -> str:
        """What becomes of the rows: "concat" or "sum"."""
        return self._columns.mode

    @property
    def output_dim(self) -> int:
        """Columns of the output."""
        return self._columns.output_dim

    def reset_parameters(self) -> None:
        """Draw every table from N(0, 1) as nn.Embedding does; padding rows and holes become zero."""
        with torch.no_grad():
            self.weight.zero_()
            for table, padding_idx in zip(self.tables(), self._columns.padding_idx, strict=True):
                nn.init.normal_(table)
                if padding_idx >= 0:
                    table[padding_idx].zero_()

    def forward(self, input: Tensor) -> Tensor:
        """Look up ``input``, int32 or int64, (\\*, n) for n columns; returns (\\*, output_dim)."""
        return functional.lookup_columns(input, self.weight, self._columns)

    def tables(self) -> list[Tensor]:
        """Views of ``weight``, one of shape (num_embeddings[t], embedding_dims[t]) per table."""
        return self.layout.tables(self.weight)

    @classmethod
    def from_embeddings(cls, embeddings: Sequence[nn.Embedding], *, mode: str = "concat") -> FastMultiEmbedding:
        """A layer with copies of the tables of ``embeddings``, one entry a column of the input.

        Values, dtype, device, requires_grad, padding_idx and training are kept. Ties are kept too: entries that are one
        module, or that have one parameter, become one table that several columns read.

        Raises:
            TypeError: an entry is not an nn.Embedding, or is a subclass with a forward of its own.
            ValueError: an entry has ``sparse``, ``max_norm`` or ``scale_grad_by_freq``, the entries differ in dtype,
                device, requires_grad or training, or entries with one parameter differ in padding_idx.

        >>> layer = FastMultiEmbedding.from_embeddings([nn.Embedding(7, 3), nn.Embedding(5, 2, padding_idx=0)])
        >>> layer
        FastMultiEmbedding([7, 5], [3, 2], padding_idx=[None, 0])
        """
        for index, embedding in enumerate(embeddings):
            _check_convertible(index, embedding)
        kinds = {(e.weight.requires_grad, e.training) for e in embeddings}
        if len(kinds) > 1:
            raise ValueError(
                "embeddings must agree in requires_grad and training, for they become one parameter of one module"
            )
        tables: list[nn.Embedding] = []
        table_of_column = []
        for index, embedding in enumerate(embeddings):
            table = next((t for t, known in enumerate(tables) if known.weight is embedding.weight), len(tables))
            if table == len(tables):
                tables.append(embedding)
            elif tables[table].padding_idx != embedding.padding_idx:
                raise ValueError(
                    f"embeddings[{index}] has padding_idx={embedding.padding_idx}, an earlier entry with the same "
                    f"weight has {tables[table].padding_idx}: a table has one padding row"
                )
            table_of_column.append(table)
        layer = cls(
            [e.num_embeddings for e in tables],
            [e.embedding_dim for e in tables],
            table_of_column=table_of_column,
            padding_idx=[e.padding_idx for e in tables],
            mode=mode,
            _weight=[e.weight for e in tables],
        )
        for requires_grad, training in kinds:
            layer.weight.requires_grad_(requires_grad)
            layer.train(training)
        return layer

    def to_embeddings(self) -> list[nn.Embedding]:
        """One nn.Embedding per column with a copy of its table; the opposite of :meth:`from_embeddings`.

        Columns that read one table get one module.

        >>> FastMultiEmbedding([7, 5], [3, 2], padding_idx=[None, 0]).to_embeddings()
        [Embedding(7, 3), Embedding(5, 2, padding_idx=0)]
        """
        embeddings = []
        for table, padding_idx in zip(self.tables(), self.padding_idx, strict=True):
            embedding = nn.Embedding(
                table.shape[0],
                table.shape[1],
                padding_idx,
                _weight=table.detach().clone(),
                _freeze=not self.weight.requires_grad,
            )
            embeddings.append(embedding.train(self.training))
        return [embeddings[table] for table in self.table_of_column]

    def extra_repr(self) -> str:
        parts = f"{list(self.num_embeddings)}, {list(self.embedding_dims)}"
        if self.table_of_column != tuple(range(len(self.layout))):
            parts += f", table_of_column={list(self.table_of_column)}"
        if any(row >= 0 for row in self._columns.padding_idx):
            parts += f", padding_idx={list(self.padding_idx)}"
        if self.mode != "concat":
            parts += f", mode={self.mode!r}"
        return parts

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *args: Any
    ) -> None:
        version = local_metadata.get("version", LAYOUT_VERSION)
        if version > LAYOUT_VERSION:
            raise RuntimeError(
                f'"{prefix}weight" was saved with table layout version {version}, this fast-embedding reads up to '
                f"version {LAYOUT_VERSION}: install a newer fast-embedding, or save the model from to_embeddings()"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)


def _check_convertible(index: int, embedding: nn.Module) -> None:
    name = f"embeddings[{index}]"
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"{name} must be an nn.Embedding, got {type(embedding).__name__}")
    if type(embedding).forward not in (nn.Embedding.forward, FastEmbedding.forward):
        raise TypeError(f"{name} is a {type(embedding).__name__}, whose forward is not nn.Embedding's")
    if embedding.sparse:
        raise ValueError(
            f"{name} has sparse=True: tables in one flat parameter have no sparse gradient, as their rows have no "
            "common length"
        )
    if embedding.max_norm is not None or embedding.scale_grad_by_freq:
        raise ValueError(f"{name} has max_norm or scale_grad_by_freq, which FastMultiEmbedding does not offer")
