"""The grid of the benchmark: which tables, how many indices, how they are distributed."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from . import streams

# Of a run, and of its record.
SECTIONS = ("lookup", "multi", "sparse", "training")

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

    def as_dict(self) -> dict[str, object]:
        """For JSON, with the label."""
        return {"label": self.label, **asdict(self)}

    def draw(self, seed: int) -> Tensor:
        """int64 ``[num_indices]`` on the CPU, the same for each device."""
        return draw_indices(self.num_embeddings, self.num_indices, self.distribution, seed)


@dataclass(frozen=True)
class MultiShape:
    """``num_rows`` rows of one index into each of several tables; their embeddings are concatenated or added.

    ``compiled`` shapes are measured under ``torch.compile`` too, in float32 and not only on request: compiling takes as
    long as measuring ten shapes. ``fbgemm_us`` is what FBGEMM took, see ``FBGEMM``.
    """

    num_rows: int
    num_embeddings: tuple[int, ...]
    embedding_dims: tuple[int, ...]
    distribution: str = "uniform"
    note: str = ""
    mode: str = "concat"
    compiled: bool = False
    fbgemm_us: float | None = None

    @property
    def num_tables(self) -> int:
        return len(self.num_embeddings)

    @property
    def label(self) -> str:
        rows, dims = span(self.num_embeddings), span(self.embedding_dims)
        added = " summed" if self.mode == "sum" else ""
        return f"{self.num_tables} tables of {rows} x {dims}{added}, {self.num_rows} rows {self.distribution}"

    @property
    def weight_numel(self) -> int:
        return sum(rows * dim for rows, dim in zip(self.num_embeddings, self.embedding_dims, strict=True))

    @property
    def output_dim(self) -> int:
        return self.embedding_dims[0] if self.mode == "sum" else sum(self.embedding_dims)

    def draw(self, seed: int) -> Tensor:
        """int64 ``[num_rows, num_tables]`` on the CPU, the same for each device."""
        if self.distribution == "tabular":
            return streams.tabular(TABULAR_ROWS).rows(self.num_rows)
        return _draw_columns(self.num_embeddings, self.num_rows, self.distribution, seed)


# A draw from tables of millions of rows takes a second; dtypes and dims of the same tables follow each other closely.
@functools.lru_cache(maxsize=4)
def _draw_columns(num_embeddings: tuple[int, ...], num_rows: int, distribution: str, seed: int) -> Tensor:
    columns = (draw_indices(rows, num_rows, distribution, seed + table) for table, rows in enumerate(num_embeddings))
    return torch.stack(tuple(columns), dim=1)


def draw_indices(
    num_embeddings: int, num_indices: int, distribution: str, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Indices int64 ``[num_indices]`` into a table of ``num_embeddings`` rows. Each device has numbers of its own.

    ``uniform``; ``zipf``: p(k) ~ 1/k^1.05 over a random permutation of the rows; ``one``: the same row each time;
    ``text``: token ids of the standard library in corpus order (see ``streams``).
    """
    if num_embeddings < 1:
        raise ValueError(f"num_embeddings must be positive, got {num_embeddings}")
    generator = torch.Generator(device).manual_seed(seed)
    if distribution == "uniform":
        return torch.randint(num_embeddings, (num_indices,), generator=generator, device=device)
    if distribution == "zipf":
        ranks = torch.arange(1, num_embeddings + 1, dtype=torch.float64, device=device)
        cumulative = ranks.pow_(-ZIPF_EXPONENT).cumsum_(0)
        points = torch.rand(num_indices, dtype=torch.float64, generator=generator, device=device) * cumulative[-1]
        ranks = torch.searchsorted(cumulative, points).clamp_(max=num_embeddings - 1)
        return torch.randperm(num_embeddings, generator=generator, device=device)[ranks]
    if distribution == "one":
        return torch.full((num_indices,), num_embeddings // 2, device=device)
    if distribution == "text":
        return streams.text().indices(num_embeddings, num_indices).to(device)
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

# Of sparse gradients: few rows of a large table.
SPARSE_SHAPES = (
    LookupShape(100000, 32, 16384, "zipf"),
    LookupShape(1000000, 32, 65536, "zipf"),
    LookupShape(10000000, 32, 65536, "uniform"),
    LookupShape(10000000, 32, 65536, "zipf"),
)

# Rows of the real table: lexing them takes about a second.
TABULAR_ROWS = 262144
# One dimension a column of streams.tabular(): wide for words and files, narrow for small alphabets.
TABULAR_DIMS = (8, 16, 32, 32, 8, 8, 4, 4, 4, 4)


# FBGEMM does not run beside us: its figures come from a run of its own, forward and backward of fbgemm_gpu 1.6.0's
# dense table-batched embedding (sum pooling, bags of one) on an H200, float32, events around the call.
FBGEMM = "FBGEMM dense"

# The setting of the library that this one continues: ten tables, 1 to 32 columns, 100 to 100000 rows.
TEN_TABLES = ((100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32))

# Store, day of the week, date and 21 more columns of a retail chain's sales, embedded as its winning models did.
RETAIL = (
    (1116, 8, 4, 13, 32, 3, 3, 26, 24, 22, 9, 27, 4, 7, 7, 9, 9, 13, 3, 4, 4, 5, 53, 4),
    (81, 5, 3, 7, 11, 3, 3, 10, 9, 9, 5, 10, 3, 5, 5, 5, 5, 7, 3, 3, 3, 4, 15, 3),
)

# The categorical columns of a public log of clicks on advertisements, the largest capped at 4 million.
_LARGEST = 4_000_000
CLICK_LOG = (
    *(_LARGEST, 36746, 17245, 7413, 20243, 3, 7114, 1441, 62, _LARGEST, 1572176, 345138, 10),
    *(2209, 11267, 128, 4, 974, 14, _LARGEST, _LARGEST, _LARGEST, 452104, 12606, 104, 35),
)

# What the molecule encoders of graph networks know of an atom; they add the embeddings.
ATOM_FEATURES = (119, 5, 12, 12, 10, 6, 6, 2, 2)


def multi_shapes() -> tuple[MultiShape, ...]:
    """The grid of many tables. A function, because the real table's sizes come from reading it."""

    def alike(
        tables: int, rows: int, dim: int, num_embeddings: int, fbgemm_us: float, compiled: bool = False
    ) -> MultiShape:
        sizes = (num_embeddings,) * tables, (dim,) * tables
        return MultiShape(rows, *sizes, compiled=compiled, fbgemm_us=fbgemm_us)

    cardinalities = streams.tabular(TABULAR_ROWS).cardinalities
    return (
        MultiShape(16384, cardinalities, TABULAR_DIMS, "tabular", "standard library source"),
        MultiShape(262144, cardinalities, TABULAR_DIMS, "tabular", "standard library source"),
        alike(10, 1024, 4, 100, fbgemm_us=489, compiled=True),
        alike(10, 65536, 4, 100, fbgemm_us=645),
        alike(10, 65536, 8, 1000, fbgemm_us=461),
        alike(10, 65536, 32, 1000, fbgemm_us=882, compiled=True),
        alike(10, 65536, 32, 100000, fbgemm_us=753),
        alike(26, 65536, 128, 40000, fbgemm_us=1523),
        alike(26, 8192, 16, 1000, fbgemm_us=672),
        *(MultiShape(rows, *TEN_TABLES, note="the original setting") for rows in (32, 1024, 8192, 65536)),
        *(MultiShape(rows, *RETAIL, note="retail") for rows in (512, 4096, 65536)),
        *(
            MultiShape(rows, CLICK_LOG, (dim,) * len(CLICK_LOG), "zipf", "click log")
            for dim in (16, 128)
            for rows in (2048, 16384, 65536)
        ),
        *(
            MultiShape(rows, ATOM_FEATURES, (300,) * len(ATOM_FEATURES), note="atom features", mode="sum")
            for rows in (3000, 65536)
        ),
    )
