"""The grid of the benchmark: which tables, how many indices, how they are distributed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from . import streams

Distribution = Literal["uniform", "zipf", "one", "text"]
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)

# Word frequencies and item popularities fall close to 1/k; the exponent is the one that published DLRM traces use.
ZIPF_EXPONENT = 1.05


def span(sizes: Sequence[int]) -> str:
    """``"7"`` where all sizes are 7, else ``"3-9"``."""
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low}-{high}"


@dataclass(frozen=True)
class LookupShape:
    """One table of ``num_embeddings`` rows and ``embedding_dim`` columns, read at ``num_indices`` places."""

    num_embeddings: int
    embedding_dim: int
    num_indices: int
    distribution: str
    note: str = ""

    @property
    def label(self) -> str:
        return f"{self.num_embeddings} x {self.embedding_dim}, {self.num_indices} {self.distribution}"

    def draw(self, seed: int) -> Tensor:
        """int64 ``[num_indices]`` on the CPU, the same for each device."""
        return draw_indices(self.num_embeddings, self.num_indices, self.distribution, seed)


@dataclass(frozen=True)
class MultiShape:
    """``num_rows`` rows of one index into each of several tables; their embeddings are concatenated."""

    num_rows: int
    num_embeddings: tuple[int, ...]
    embedding_dims: tuple[int, ...]
    distribution: str = "uniform"
    note: str = ""

    @property
    def num_tables(self) -> int:
        return len(self.num_embeddings)

    @property
    def label(self) -> str:
        rows, dims = span(self.num_embeddings), span(self.embedding_dims)
        return f"{self.num_tables} tables of {rows} x {dims}, {self.num_rows} rows {self.distribution}"

    def draw(self, seed: int) -> Tensor:
        """int64 ``[num_rows, num_tables]`` on the CPU, the same for each device."""
        if self.distribution == "tabular":
            return streams.tabular(TABULAR_ROWS).rows(self.num_rows)
        columns = (
            draw_indices(num_embeddings, self.num_rows, self.distribution, seed + table)
            for table, num_embeddings in enumerate(self.num_embeddings)
        )
        return torch.stack(tuple(columns), dim=1)


def draw_indices(num_embeddings: int, num_indices: int, distribution: str, seed: int) -> Tensor:
    """Indices int64 ``[num_indices]`` into a table of ``num_embeddings`` rows, on the CPU.

    ``uniform``; ``zipf``: p(k) ~ 1/k^1.05 over a random permutation of the rows; ``one``: the same row each time;
    ``text``: token ids of the standard library in corpus order (see ``streams``).
    """
    if num_embeddings < 1:
        raise ValueError(f"num_embeddings must be positive, got {num_embeddings}")
    generator = torch.Generator().manual_seed(seed)
    if distribution == "uniform":
        return torch.randint(num_embeddings, (num_indices,), generator=generator)
    if distribution == "zipf":
        cumulative = torch.arange(1, num_embeddings + 1, dtype=torch.float64).pow_(-ZIPF_EXPONENT).cumsum_(0)
        points = torch.rand(num_indices, dtype=torch.float64, generator=generator) * cumulative[-1]
        ranks = torch.searchsorted(cumulative, points).clamp_(max=num_embeddings - 1)
        return torch.randperm(num_embeddings, generator=generator)[ranks]
    if distribution == "one":
        return torch.full((num_indices,), num_embeddings // 2)
    if distribution == "text":
        return streams.text().indices(num_embeddings, num_indices)
    raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")


LOOKUP_SHAPES = (
    LookupShape(50257, 768, 16384, "text", "standard library source"),
    LookupShape(2, 768, 16384, "uniform", "BERT segments"),
    LookupShape(10, 4, 1048576, "uniform", "tabular"),
    LookupShape(32, 12, 262144, "uniform", "T5 relative bias"),
    LookupShape(100, 16, 65536, "uniform"),
    LookupShape(256, 64, 65536, "zipf", "bytes, characters"),
    LookupShape(119, 300, 100000, "zipf", "OGB atoms"),
    LookupShape(33, 1280, 32768, "uniform", "protein LM"),
    LookupShape(1000, 32, 262144, "uniform"),
    LookupShape(10000, 16, 262144, "zipf"),
    LookupShape(50257, 768, 16384, "zipf", "GPT-2"),
    LookupShape(50257, 768, 131072, "zipf", "GPT-2"),
    LookupShape(128256, 4096, 16384, "zipf", "Llama 3"),
    LookupShape(1000000, 128, 65536, "zipf", "DLRM"),
    LookupShape(1000000, 128, 1048576, "zipf"),
    LookupShape(1000000, 128, 1048576, "uniform"),
    LookupShape(65536, 64, 1048576, "zipf"),
    LookupShape(10000000, 32, 262144, "zipf"),
    LookupShape(100000, 64, 2048, "uniform"),
    LookupShape(1000, 64, 128, "uniform"),
    LookupShape(1, 4, 1048576, "one"),
    LookupShape(1000000, 64, 262144, "one"),
)

# Rows of the real table: lexing them takes about a second.
TABULAR_ROWS = 262144
# One dimension a column of streams.tabular(): wide for words and files, narrow for small alphabets.
TABULAR_DIMS = (8, 16, 32, 32, 8, 8, 4, 4, 4, 4)


def multi_shapes() -> tuple[MultiShape, ...]:
    """The grid of many tables. A function, because the real table's sizes come from reading it."""

    def alike(tables: int, rows: int, dim: int, num_embeddings: int) -> MultiShape:
        return MultiShape(rows, (num_embeddings,) * tables, (dim,) * tables)

    cardinalities = streams.tabular(TABULAR_ROWS).cardinalities
    return (
        MultiShape(16384, cardinalities, TABULAR_DIMS, "tabular", "standard library source"),
        MultiShape(262144, cardinalities, TABULAR_DIMS, "tabular", "standard library source"),
        alike(10, 1024, 4, 100),
        alike(10, 65536, 4, 100),
        alike(10, 65536, 8, 1000),
        alike(10, 65536, 32, 1000),
        alike(10, 65536, 32, 100000),
        alike(26, 65536, 128, 40000),
        alike(26, 8192, 16, 1000),
    )
