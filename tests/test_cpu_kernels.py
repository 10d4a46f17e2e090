"""The CPU kernel library through its C ABI alone, without torch, against float64 sums by numpy."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
from abi import (
    INDEX_OUT_OF_RANGE,
    INVALID_ARGUMENT,
    OK,
    WORKSPACE_TOO_SMALL,
    BackwardArgs,
    ForwardArgs,
    Table,
    library_path,
)

if sys.platform in ("darwin", "win32"):
    pytest.skip("no native library on this platform", allow_module_level=True)

SCALAR_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
INDEX_TYPES = {"int32": 0, "int64": 1}
# Half a unit in the last place of a value near 1, and of a denormal.
ROUNDING = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}
DENORMAL_ROUNDING = {"float32": 2.0**-150, "float64": 0.0, "float16": 2.0**-25, "bfloat16": 2.0**-134}
DISTRIBUTIONS = ("uniform", "zipf", "one row", "distinct", "ascending")


class IndexReport(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("index", "row", "table", "num_embeddings")]


TASK = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
PARALLEL_FOR = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, TASK, ctypes.c_void_p)


class Context(ctypes.Structure):
    _fields_ = [
        ("parallel_for", PARALLEL_FOR),
        ("num_threads", ctypes.c_int32),
        ("index_error", ctypes.POINTER(IndexReport)),
    ]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library_path("cpu")))
    size = ctypes.POINTER(ctypes.c_size_t)
    sparse_count, sparse_backward = [ctypes.c_void_p], [ctypes.c_int64, ctypes.c_void_p]
    for name, args, more in (
        ("forward", ForwardArgs, []),
        ("backward", BackwardArgs, []),
        ("sparse_count", BackwardArgs, sparse_count),
        ("sparse_backward", BackwardArgs, sparse_backward),
    ):
        function = getattr(lib, f"fe_cpu_embedding_{name}")
        function.argtypes = [ctypes.POINTER(args), *more, ctypes.c_void_p, size, ctypes.POINTER(Context)]
        function.restype = ctypes.c_int
    return lib


def threads(count: int) -> tuple[PARALLEL_FOR, int]:
    """A parallel_for on `count` threads that hands out the ranges last first."""

    def parallel_for(begin: int, end: int, grain: int, task, closure) -> None:
        step = max(-(-(end - begin) // count), grain, 1)
        ranges = [(first, min(first + step, end)) for first in range(begin, end, step)]
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda bounds: task(*bounds, closure), reversed(ranges)))

    return PARALLEL_FOR(parallel_for), count


def widen(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def narrow(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round to nearest even. bfloat16 is held as uint16 bits."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


def storage(dtype: str) -> np.dtype:
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def pointer(array: np.ndarray) -> int:
    return array.ctypes.data


@dataclass
class Lookup:
    """Tables packed with a hole of three elements in front of each, and indices (num_rows, num_tables)."""

    num_embeddings: list[int]
    embedding_dims: list[int]
    indices: np.ndarray
    dtype: str = "float32"
    padding_idx: list[int] | None = None
    tables: ctypes.Array = field(init=False)
    numel: int = field(init=False)

    HOLE = 3

    def __post_init__(self) -> None:
        offset = 0
        padding = self.padding_idx or [-1] * len(self.num_embeddings)
        self.tables = (Table * len(self.num_embeddings))()
        for t, (rows, dim) in enumerate(zip(self.num_embeddings, self.embedding_dims, strict=True)):
            offset += self.HOLE
            self.tables[t] = Table(rows, dim, offset, dim, padding[t])
            offset += rows * dim
        self.numel = offset + self.HOLE

    @property
    def columns(self) -> int:
        return sum(self.embedding_dims)

    def common(self) -> tuple:
        row_stride, table_stride = (stride // self.indices.itemsize for stride in self.indices.strides)
        return (
            SCALAR_TYPES[self.dtype],
            INDEX_TYPES[self.indices.dtype.name],
            len(self.tables),
            self.tables,
            len(self.indices),
            pointer(self.indices),
            row_stride,
            table_stride,
        )

    def slices(self):
        column = 0
        for t, table in enumerate(self.tables):
            yield t, table, slice(column, column + table.embedding_dim)
            column += table.embedding_dim


def call(function, args, num_threads: int = 1, *, short_by: int = 0) -> tuple[int, IndexReport]:
    error = IndexReport()
    context = Context(*threads(num_threads), ctypes.pointer(error))
    size = ctypes.c_size_t()
    status = function(ctypes.byref(args), None, ctypes.byref(size), None)
    if status != OK:
        return status, error
    workspace = np.full(size.value + 256, 0xFF, np.uint8)  # NaN as a float, -1 as an integer
    aligned = pointer(workspace) + -pointer(workspace) % 256
    guard = workspace[aligned - pointer(workspace) + size.value :]
    size.value -= short_by
    status = function(ctypes.byref(args), aligned, ctypes.byref(size), ctypes.byref(context))
    assert (guard == 0xFF).all(), "wrote behind the workspace"
    return status, error


def forward(library, lookup: Lookup, weight: np.ndarray, num_threads: int = 1):
    output = np.full((len(lookup.indices), lookup.columns + 5), 0x3C, storage(lookup.dtype))
    args = ForwardArgs(*lookup.common(), pointer(weight), pointer(output), output.shape[1])
    status, error = call(library.fe_cpu_embedding_forward, args, num_threads)
    assert (output[:, lookup.columns :] == 0x3C).all(), "wrote outside the output's columns"
    return status, error, output[:, : lookup.columns]


def backward(
    library,
    lookup: Lookup,
    grad: np.ndarray,
    num_threads: int = 1,
    *,
    deterministic=1,
    scaled=0,
    stride=None,
    short_by: int = 0,
):
    # One element off, so that nothing but the element's own alignment holds.
    buffer = np.full(lookup.numel + 2, 0x3C, storage(lookup.dtype))
    target = buffer[1:-1]
    stride = grad.strides[0] // grad.itemsize if stride is None else stride
    args = BackwardArgs(*lookup.common(), pointer(grad), stride, pointer(target), lookup.numel, deterministic, scaled)
    status, error = call(library.fe_cpu_embedding_backward, args, num_threads, short_by=short_by)
    assert buffer[0] == buffer[-1] == 0x3C, "wrote outside grad_weight"
    return status, error, target


def sparse_backward(library, lookup: Lookup, grad: np.ndarray, num_threads: int = 1, *, short_by: int = 0):
    """(status, error, rows, values) of the only table, by both calls; rows and values None unless all is well."""
    dim = lookup.columns
    stride = grad.strides[0] // grad.itemsize
    args = BackwardArgs(*lookup.common(), pointer(grad), stride, None, 0, 0)
    error = IndexReport()
    context = Context(*threads(num_threads), ctypes.pointer(error))
    size = ctypes.c_size_t()
    status = library.fe_cpu_embedding_sparse_count(
        ctypes.byref(args), None, None, ctypes.byref(size), ctypes.byref(context)
    )
    if status != OK:
        return status, error, None, None
    assert size.value <= 16 * len(lookup.indices) + grad.nbytes // 10 + (8 << 20)
    workspace = np.full(size.value + 256, 0xFF, np.uint8)
    aligned = pointer(workspace) + -pointer(workspace) % 256
    guard = workspace[aligned - pointer(workspace) + size.value :]
    size.value -= short_by
    count = ctypes.c_int64(-1)
    status = library.fe_cpu_embedding_sparse_count(
        ctypes.byref(args), ctypes.byref(count), aligned, ctypes.byref(size), ctypes.byref(context)
    )
    if status != OK:
        return status, error, None, None
    rows = np.full(count.value + 2, -1)
    values = np.full(count.value * dim + 2, 0x3C, storage(lookup.dtype))
    args.grad_weight, args.grad_weight_numel = pointer(values[1:]), count.value * dim
    status = library.fe_cpu_embedding_sparse_backward(
        ctypes.byref(args), count.value, pointer(rows[1:]), aligned, ctypes.byref(size), ctypes.byref(context)
    )
    assert (guard == 0xFF).all(), "wrote behind the workspace"
    assert rows[0] == rows[-1] == -1, "wrote outside the rows"
    assert values[0] == values[-1] == 0x3C, "wrote outside the values"
    return status, error, rows[1:-1], values[1:-1].reshape(count.value, dim)


def reference(lookup: Lookup, grad: np.ndarray, scaled: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The sums in float64, or the means, and what their absolute error may be at most."""
    wide = widen(grad, lookup.dtype)
    total, magnitude, count = (np.zeros(lookup.numel) for _ in range(3))
    for t, table, columns in lookup.slices():
        kept = lookup.indices[:, t] != table.padding_idx
        rows = lookup.indices[kept, t].astype(np.int64)
        size = table.num_embeddings * table.embedding_dim
        place = slice(table.weight_offset, table.weight_offset + size)
        for target, values in ((total, wide), (magnitude, np.abs(wide)), (count, np.ones_like(wide))):
            view = target[place].reshape(table.num_embeddings, table.embedding_dim)
            np.add.at(view, rows, values[kept, columns])
    if scaled:
        frequency = np.maximum(count, 1)
        total, magnitude, count = total / frequency, magnitude / frequency, count + 1
    unit = ROUNDING["float64" if lookup.dtype == "float64" else "float32"]
    rounding = ROUNDING[lookup.dtype] * np.abs(total) + DENORMAL_ROUNDING[lookup.dtype]
    return total, 1.001 * (rounding + count * unit * magnitude)


def make_indices(rng, distribution: str, rows: int, num_embeddings: int) -> np.ndarray:
    if distribution == "uniform":
        return rng.integers(0, num_embeddings, rows)
    if distribution == "zipf":
        return rng.permutation(num_embeddings)[np.minimum(rng.zipf(1.2, rows) - 1, num_embeddings - 1)]
    if distribution == "one row":
        return np.full(rows, num_embeddings // 2)
    distinct = np.resize(rng.permutation(num_embeddings), rows)
    return np.sort(distinct) if distribution == "ascending" else distinct


def make_grad(rng, rows: int, columns: int, dtype: str) -> np.ndarray:
    return narrow(rng.standard_normal((rows, columns)), dtype)


# Sizes that reach the sums in place, the private ones with one block and with many, and the sorted ones with one pass
# and two, one segment and many.
SHAPES = {
    "tiny": ([7], [3], 40),
    "one column": ([5], [1], 70_000),
    "private": ([10], [4], 70_000),
    "private, odd": ([119], [37], 5_000),
    "private, wide": ([3], [700], 3_000),
    "few indices": ([40_000], [5], 50),
    "sorted, one segment": ([600], [500], 70),
    "sorted": ([20_000], [33], 3_000),
    "sorted, registers": ([9_000], [32], 40_000),
    "sorted, wide": ([1_500], [401], 2_000),
    "tables": ([10, 1, 30_000, 100, 5], [4, 1, 17, 16, 0], 5_000),
}


@pytest.mark.parametrize("dtype", SCALAR_TYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_sums(library, shape: str, distribution: str, dtype: str) -> None:
    num_embeddings, dims, rows = SHAPES[shape]
    rng = np.random.default_rng(0)
    columns = [make_indices(rng, distribution, rows, v) for v in num_embeddings]
    padding_idx = [
        -1 if distribution in ("one row", "ascending") and t == 0 else int(c[0]) for t, c in enumerate(columns)
    ]
    lookup = Lookup(num_embeddings, dims, np.stack(columns, 1), dtype, padding_idx)
    grad = make_grad(rng, rows, lookup.columns, dtype)
    expected, bound = reference(lookup, grad)
    for num_threads, deterministic in ((3, 1), (1, 0)):
        status, _, grad_weight = backward(library, lookup, grad, num_threads, deterministic=deterministic)
        assert status == OK
        error = np.abs(widen(grad_weight, dtype) - expected)
        assert (error <= bound).all(), f"{(error - bound).max()} above the bound"
    expected, bound = reference(lookup, grad, scaled=True)
    for num_threads in (3, 1):
        status, _, grad_weight = backward(library, lookup, grad, num_threads, scaled=1)
        assert status == OK
        error = np.abs(widen(grad_weight, dtype) - expected)
        assert (error <= bound).all(), f"{(error - bound).max()} above the bound, scaled"


@pytest.mark.parametrize("dtype", SCALAR_TYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "tables"])
def test_sparse_backward(library, shape: str, distribution: str, dtype: str) -> None:
    (num_embeddings,), (dim,), rows = SHAPES[shape]
    rng = np.random.default_rng(0)
    indices = make_indices(rng, distribution, rows, num_embeddings)[:, None]
    for padding_idx in (-1, int(indices[0, 0])):
        lookup = Lookup([num_embeddings], [dim], indices, dtype, [padding_idx])
        grad = make_grad(rng, rows, dim, dtype)
        expected, bound = (x[Lookup.HOLE : -Lookup.HOLE].reshape(num_embeddings, dim) for x in reference(lookup, grad))
        first = None
        for num_threads in (1, 3):
            status, _, found, values = sparse_backward(library, lookup, grad, num_threads)
            assert status == OK
            assert (found == np.unique(indices[indices != padding_idx])).all()
            error = np.abs(widen(values, dtype) - expected[found])
            assert (error <= bound[found]).all(), f"{(error - bound[found]).max()} above the bound"
            first = values.tobytes() if first is None else first
            assert values.tobytes() == first, "other bits at another thread count"


@pytest.mark.parametrize("sizes", [(5, 3, 0), (0, 3, 0), (5, 0, 4)], ids=str)
def test_sparse_backward_of_nothing(library, sizes) -> None:
    num_embeddings, dim, rows = sizes
    lookup = Lookup([num_embeddings], [dim], np.zeros((rows, 1), np.int64))
    status, _, found, values = sparse_backward(library, lookup, np.ones((rows, dim), np.float32))
    assert status == OK
    assert found.tolist() == ([0] if rows else [])
    assert values.size == 0


def test_sparse_backward_refuses(library) -> None:
    lookup = Lookup([50_000], [8], np.full((100_000, 1), 50_000))
    grad = np.zeros((100_000, 8), np.float32)
    status, error, *_ = sparse_backward(library, lookup, grad, 2)
    assert (status, error.index, error.row, error.num_embeddings) == (INDEX_OUT_OF_RANGE, 50_000, 0, 50_000)
    lookup.indices[:] = 0
    assert sparse_backward(library, lookup, grad, short_by=1)[0] == WORKSPACE_TOO_SMALL
    lookup.tables[0].num_embeddings = -1
    assert sparse_backward(library, lookup, grad)[0] == INVALID_ARGUMENT
    assert sparse_backward(library, Lookup([5, 5], [4, 4], np.zeros((9, 2), np.int64)), grad)[0] == INVALID_ARGUMENT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backward_has_the_same_bits_at_every_thread_count(library, shape: str, dtype: str) -> None:
    num_embeddings, dims, rows = SHAPES[shape]
    rng = np.random.default_rng(1)
    indices = np.stack([make_indices(rng, "zipf", rows, v) for v in num_embeddings], 1)
    lookup = Lookup(num_embeddings, dims, indices, dtype)
    grad = make_grad(rng, rows, lookup.columns, dtype)
    for scaled in (0, 1):
        first = backward(library, lookup, grad, 1, scaled=scaled)[2]
        for num_threads in (2, 3, 7):
            assert backward(library, lookup, grad, num_threads, scaled=scaled)[2].tobytes() == first.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_workspace_stays_within_its_budget(library, shape: str) -> None:
    num_embeddings, dims, rows = SHAPES[shape]
    for dtype in SCALAR_TYPES:
        lookup = Lookup(num_embeddings, dims, np.zeros((rows, len(dims)), np.int64), dtype)
        for scaled in (0, 1):
            args = BackwardArgs(*lookup.common(), None, lookup.columns, None, lookup.numel, 1, scaled)
            size = ctypes.c_size_t()
            assert library.fe_cpu_embedding_backward(ctypes.byref(args), None, ctypes.byref(size), None) == OK
            grad_bytes = rows * lookup.columns * storage(dtype).itemsize
            assert size.value <= 16 * rows * len(dims) + grad_bytes // 10 + (8 << 20)


@pytest.mark.parametrize("num_embeddings", [4, 50_000], ids=["private", "sorted"])
@pytest.mark.parametrize("kind", ["int32", "row stride", "row stride 0", "expanded gradient", "strided gradient"])
def test_backward_takes_any_strides(library, kind: str, num_embeddings: int) -> None:
    rng = np.random.default_rng(2)
    rows, dim = 3_000, 24
    indices = rng.integers(0, num_embeddings, (rows, 1))
    grad = make_grad(rng, rows, dim, "float32")
    if kind == "int32":
        indices = indices.astype(np.int32)
    elif kind == "row stride":
        indices = np.repeat(indices, 3, 1)[:, 1:2]
    elif kind == "row stride 0":
        indices = np.broadcast_to(indices[:1], (rows, 1))
    elif kind == "expanded gradient":
        grad = np.broadcast_to(grad[:1], grad.shape)
    else:
        grad = np.concatenate([grad, grad], 1)[:, 5 : 5 + dim]
    lookup = Lookup([num_embeddings], [dim], indices)
    status, _, grad_weight = backward(library, lookup, grad, 2)
    assert status == OK
    expected, bound = reference(lookup, grad)
    assert (np.abs(grad_weight - expected) <= bound).all()


@pytest.mark.parametrize("num_embeddings", [1, 65_536], ids=["private", "sorted"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_backward_rounds_once_to_nearest_even(library, dtype: str, num_embeddings: int) -> None:
    """All 65536 values, denormals, infinities and NaNs among them, each plus another; every conversion is exact."""
    first = np.arange(65_536, dtype=np.uint16)
    second = np.random.default_rng(3).permutation(first)
    grad = np.stack([first, second]).view(storage(dtype))
    if num_embeddings == 1:
        indices = np.zeros((2, 1), np.int64)  # one row of 65536 columns
    else:
        indices, grad = np.tile(np.arange(65_536), 2)[:, None], grad.reshape(-1, 1)
    lookup = Lookup([num_embeddings], [65_536 // num_embeddings], indices, dtype)
    status, _, grad_weight = backward(library, lookup, grad, 2)
    assert status == OK
    with np.errstate(all="ignore"):
        wide = (widen(x.view(storage(dtype)), dtype).astype(np.float32) for x in (first, second))
        expected = narrow(next(wide) + next(wide), dtype)
        is_nan = np.isnan(widen(expected, dtype))
        actual = grad_weight[Lookup.HOLE : -Lookup.HOLE]
        assert np.isnan(widen(actual, dtype)[is_nan]).all()
    assert (actual[~is_nan].view(np.uint16) == expected[~is_nan].view(np.uint16)).all()


def test_backward_drops_padding_before_reading_its_gradient(library) -> None:
    indices = np.array([[1], [0], [1]])
    for num_embeddings in (3, 200_000):
        lookup = Lookup([num_embeddings], [4], indices, padding_idx=[1])
        grad = np.ones((3, 4), np.float32)
        grad[[0, 2]] = np.nan
        table = backward(library, lookup, grad)[2][Lookup.HOLE : -Lookup.HOLE].reshape(-1, 4)
        assert (table[0] == 1).all()
        assert (table[1:] == 0).all()


@pytest.mark.parametrize("dtype", SCALAR_TYPES)
@pytest.mark.parametrize("dims", [[1], [3], [16], [40], [300], [4, 1, 17, 0, 100]])
def test_forward_copies_rows(library, dims: list[int], dtype: str) -> None:
    rng = np.random.default_rng(4)
    num_embeddings = [1 + 3_000 // (t + 1) for t in range(len(dims))]
    for index_type in INDEX_TYPES:
        indices = np.stack([rng.integers(0, v, 5_000) for v in num_embeddings], 1).astype(index_type)
        for layout in ("C", "F"):
            lookup = Lookup(num_embeddings, dims, np.asarray(indices, order=layout), dtype)
            weight = make_grad(rng, 1, lookup.numel, dtype)[0]
            status, _, output = forward(library, lookup, weight, 3)
            assert status == OK
            for t, table, columns in lookup.slices():
                rows = weight[table.weight_offset :][: table.num_embeddings * table.embedding_dim]
                rows = rows.reshape(table.num_embeddings, table.embedding_dim)
                assert output[:, columns].tobytes() == rows[indices[:, t]].tobytes()


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1, -(2**31)])
def test_out_of_range_names_the_first_and_writes_nothing(library, bad: int, num_threads: int) -> None:
    rng = np.random.default_rng(5)
    for dtype in INDEX_TYPES:
        indices = rng.integers(0, 10, (60_000, 2)).astype(dtype)
        indices[31_234, 1] = indices[31_235, 0] = indices[59_999, 0] = bad
        lookup = Lookup([20, 10] if bad == 10 else [10, 10], [2, 3], indices)
        weight = np.zeros(lookup.numel, np.float32)
        grad = np.zeros((60_000, 5), np.float32)
        for status, error, written in (
            forward(library, lookup, weight, num_threads),
            backward(library, lookup, grad, num_threads),
        ):
            assert status == INDEX_OUT_OF_RANGE
            assert (error.index, error.row, error.table, error.num_embeddings) == (bad, 31_234, 1, 10)
            assert (written == 0x3C).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("num_embeddings", "dims", "rows"), [([5], [3], 0), ([0], [3], 0), ([5], [0], 4), ([], [], 0), ([], [], 3)]
)
def test_empty_sizes(library, num_embeddings: list[int], dims: list[int], rows: int, dtype: str) -> None:
    lookup = Lookup(num_embeddings, dims, np.zeros((rows, len(dims)), np.int64), dtype)
    grad = np.ones((rows, lookup.columns), storage(dtype))
    status, _, grad_weight = backward(library, lookup, grad, stride=lookup.columns)
    assert status == OK
    assert (grad_weight == 0).all()
    assert forward(library, lookup, np.zeros(lookup.numel, storage(dtype)))[0] == OK


def test_an_empty_table_refuses_every_index(library) -> None:
    lookup = Lookup([0], [3], np.zeros((2, 1), np.int64))
    status, error, _ = backward(library, lookup, np.ones((2, 3), np.float32))
    assert (status, error.index, error.row, error.num_embeddings) == (INDEX_OUT_OF_RANGE, 0, 0, 0)


def test_invalid_arguments_are_refused(library) -> None:
    lookup = Lookup([50_000], [8], np.zeros((100_000, 1), np.int64))
    grad = np.zeros((100_000, 8), np.float32)
    assert backward(library, lookup, grad, short_by=1)[0] == WORKSPACE_TOO_SMALL
    lookup.tables[0].weight_stride = 9
    assert backward(library, lookup, grad)[0] == INVALID_ARGUMENT
    lookup.tables[0].num_embeddings = -1
    assert backward(library, lookup, grad)[0] == INVALID_ARGUMENT
    lookup.tables[0].num_embeddings = 60_000
    assert backward(library, lookup, grad)[0] == INVALID_ARGUMENT


def test_callers_do_not_disturb_each_other(library) -> None:
    rng = np.random.default_rng(6)
    lookups = [Lookup([v], [d], rng.integers(0, v, (20_000, 1))) for v, d in ((10, 4), (30_000, 20))]
    grads = [make_grad(rng, 20_000, lookup.columns, "float32") for lookup in lookups]
    expected = [backward(library, *pair)[2].tobytes() for pair in zip(lookups, grads, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(backward, library, lookups[i % 2], grads[i % 2], 2) for i in range(40)]
    for i, job in enumerate(jobs):
        assert job.result()[2].tobytes() == expected[i % 2]


@pytest.mark.parametrize("shape", ["private, odd", "sorted, registers", "tables"])
def test_a_pool_may_run_its_threads_one_after_another(library, shape: str) -> None:
    """No thread waits for one that has not begun: torch's pool runs all in a row where it is called from within."""
    num_embeddings, dims, rows = SHAPES[shape]
    rng = np.random.default_rng(7)
    rows *= 10  # enough for several threads
    indices = np.stack([make_indices(rng, "zipf", rows, v) for v in num_embeddings], 1)
    lookup = Lookup(num_embeddings, dims, indices)
    grad = make_grad(rng, rows, lookup.columns, "float32")
    expected = backward(library, lookup, grad, 1)[2].tobytes()
    calls = []

    def one_after_another(begin: int, end: int, grain: int, task, closure) -> None:
        calls.append(end - begin)
        for i in reversed(range(begin, end)):
            task(i, i + 1, closure)

    error = IndexReport()
    context = Context(PARALLEL_FOR(one_after_another), 4, ctypes.pointer(error))
    output = np.empty(lookup.numel, np.float32)
    args = BackwardArgs(*lookup.common(), pointer(grad), lookup.columns, pointer(output), lookup.numel, 1)
    size = ctypes.c_size_t()
    assert library.fe_cpu_embedding_backward(ctypes.byref(args), None, ctypes.byref(size), None) == OK
    workspace = np.empty(size.value + 256, np.uint8)
    aligned = pointer(workspace) + -pointer(workspace) % 256
    status = library.fe_cpu_embedding_backward(ctypes.byref(args), aligned, ctypes.byref(size), ctypes.byref(context))
    assert status == OK
    assert output.tobytes() == expected
    assert calls == [4], "one parallel region"


CAPABILITY = "FAST_EMBEDDING_CPU_CAPABILITY"


@pytest.mark.skipif(CAPABILITY in os.environ, reason="this is the run with fewer instructions")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_with_fewer_instructions(capability: str) -> None:
    """The choice is made once a process, so another process repeats this file."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, CAPABILITY: capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
