"""Every CUDA kernel and template instance by its plan, through the C ABI, against float64."""

import subprocess
import sys
from ctypes import byref, c_size_t
from pathlib import Path

import abi
import pytest
import torch
from cuda_problems import (
    DTYPES,
    FEW_ROWS_PLANS,
    Problem,
    assert_gradient,
    assert_sparse_gradient,
    device_properties,
    load_library,
    plans_for,
    sort_plans,
    stream,
    summed,
)

pytestmark = pytest.mark.usefixtures("cuda")


@pytest.fixture(scope="module")
def library():
    return load_library()


ONE_TABLE = [
    (1, 4),
    (2, 768),
    (10, 4),
    (7, 1),
    (33, 5),
    (119, 300),
    (150, 31),
    (90, 6),
    (1000, 64),
    (5000, 100),
    (70000, 3),
]
MANY_TABLES = [
    [(100, 4)] * 10,
    [(3, 3), (1116, 81), (8, 5), (40000, 16), (1, 1)],
    [(50, 8), (20, 16), (9, 128)],
    [(10 + t, 1 + t % 9) for t in range(130)],
    [(3, 700), (2, 800), (9, 5)],  # more columns than a block has threads
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [[size] for size in ONE_TABLE] + MANY_TABLES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 77, 5000])
def test_forward_is_exact(library, sizes, num_rows, dtype):
    for index_dtype, offset in ((torch.int64, 0), (torch.int32, 1)):
        problem = Problem(sizes, num_rows, dtype, index_dtype, offset=offset)
        assert torch.equal(problem.forward(library), problem.reference_output())


# Output rows that several blocks share, at numbers of rows that give a thread one of them, a few and twice as many.
WIDE_OUTPUTS = [
    [(40, 81), (9, 300), (700, 7), (5, 1), (1000, 130)],
    [(100, 64), (30, 128), (7, 1200)],
    [(3 + t, 1 + 2 * t) for t in range(60)],
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", WIDE_OUTPUTS, ids=lambda sizes: f"{len(sizes)} tables")
@pytest.mark.parametrize("num_rows", [1, 77, 1700, 9001])
def test_forward_into_columns_of_a_wider_output(library, sizes, num_rows, dtype):
    for index_dtype, left, right in ((torch.int64, 8, 8), (torch.int32, 3, 2)):  # 16 bytes apart, and not
        problem = Problem(sizes, num_rows, dtype, index_dtype)
        problem.indices = problem.indices.t().contiguous().t()
        wide = torch.full((num_rows, left + problem.total_dim + right), 7, dtype=dtype, device="cuda")
        problem.output = wide[:, left : left + problem.total_dim]
        assert torch.equal(problem.forward(library), problem.reference_output())
        problem.output.fill_(7)
        assert (wide == 7).all(), "the kernel wrote beside its columns"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ONE_TABLE, ids=str)
@pytest.mark.parametrize("num_rows", [1, 300, 2048, 9001])
def test_backward_by_every_plan(library, size, num_rows, dtype):
    cases = (("uniform", torch.int64, False, 0), ("zipf", torch.int32, True, 0), ("one row", torch.int64, False, 1),
             ("half on one row", torch.int64, True, 0))  # fmt: skip
    for distribution, index_dtype, padding, offset in cases:
        problem = Problem([size], num_rows, dtype, index_dtype, distribution, padding, offset)
        for plan in plans_for(problem):
            assert_gradient(problem, problem.backward(library, plan))
        assert_gradient(problem, problem.backward(library))


CASES = (("uniform", torch.int64, False, 0), ("zipf", torch.int32, True, 0), ("one row", torch.int64, False, 1),
         ("half on one row", torch.int64, True, 0), ("sorted", torch.int32, False, 1))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ONE_TABLE, ids=str)
@pytest.mark.parametrize("num_rows", [1, 300, 2048, 9001])
def test_scaled_backward_by_every_plan(library, size, num_rows, dtype):
    for distribution, index_dtype, padding, offset in CASES:
        problem = Problem([size], num_rows, dtype, index_dtype, distribution, padding, offset)
        for plan in [*sort_plans(num_rows), *([abi.Plan(abi.OWN)] if num_rows <= 2048 else []), None]:
            assert_gradient(problem, problem.backward(library, plan, scaled=True), scaled=True)


# By the sums that a thread has (4, 10, 16) and the columns of an access; lanes that divide a block, and not; several
# slices of columns.
FEW_ROWS = [
    (1, 1),
    (3, 128),
    (4, 8),
    (4, 12),
    (5, 20),
    (9, 6),
    (10, 4),
    (16, 300),
    (13, 31),
    (16, 3),
    (2, 5000),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", FEW_ROWS, ids=str)
@pytest.mark.parametrize("num_rows", [1, 77, 5000, 100_000])
def test_few_rows(library, size, num_rows, dtype):
    num_rows = min(num_rows, 20_000_000 // size[1])
    for distribution, index_dtype, padding, offset in CASES:
        problem = Problem([size], num_rows, dtype, index_dtype, distribution, padding, offset)
        for plan in [*FEW_ROWS_PLANS, None]:
            first = problem.backward(library, plan, deterministic=True).clone()
            assert_gradient(problem, first)
            assert torch.equal(problem.backward(library, plan, deterministic=True), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [4, 10, 16])
def test_few_rows_of_strided_arguments(library, rows, dtype):
    problem = Problem([(rows, 16)], 50_000, dtype, padding=True)
    problem.indices = torch.randint(0, rows, (50_000, 3), device="cuda")[:, 1:2]  # 24 bytes apart
    wide = torch.randn(50_000, 40, device="cuda").to(dtype)
    for grad_output in (wide[:, 8:24], wide[:, 4:20], wide[:, 3:19], wide[:1, :16].expand(50_000, 16)):
        problem.grad_output = grad_output
        for plan in FEW_ROWS_PLANS:
            assert_gradient(problem, problem.backward(library, plan))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [4, 10, 16])
@pytest.mark.parametrize("dim", [12, 13])
def test_few_rows_keep_inf_and_nan_in_their_rows(library, rows, dim, dtype):
    problem = Problem([(rows, dim)], 9001, dtype)
    problem.padding = [2]
    problem.tables[0].padding_idx = 2
    first, second, padded = ((problem.indices[:, 0] == row).nonzero()[0] for row in (1, 3, 2))
    problem.grad_output[first, 5] = torch.inf
    problem.grad_output[second, 6] = torch.nan
    problem.grad_output[padded] = torch.nan
    for plan in [*FEW_ROWS_PLANS, None]:
        actual = problem.backward(library, plan).view(rows, dim)
        assert actual[1, 5] == torch.inf
        assert actual[3, 6].isnan()
        assert (actual[2] == 0).all()
        assert torch.isfinite(actual).sum() == actual.numel() - 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_around_few_rows_is_zeroed(library, dtype):
    problem = Problem([(10, 12)], 30_000, dtype)
    problem.offsets = [1001]
    problem.tables[0].weight_offset = 1001
    for behind in (0, 70_000):
        problem.numel = 1001 + 120 + behind
        problem.grad_weight = problem.buffer(problem.numel, 0)
        for plan in [*FEW_ROWS_PLANS, None]:
            assert_gradient(problem, problem.backward(library, plan))


@pytest.mark.parametrize(
    ("index", "dtype"), [(12345, torch.int64), (-1, torch.int32), (-1, torch.int64), (2**32 + 1, torch.int64)], ids=str
)
def test_few_rows_check_their_indices(index, dtype):
    """In a process of its own: an assertion ends the CUDA context. The last index's low word names a row."""
    program = f"""
import abi, torch
from cuda_problems import Problem
problem = Problem([(10, 4)], 50_000, torch.float32, {dtype})
problem.indices[43_210] = {index}
problem.backward(abi.load_cuda(abi.library_path("cuda")), abi.Plan(abi.PRIVATE, splits=132))
torch.cuda.synchronize()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300
    )
    text = result.stdout + result.stderr
    assert result.returncode != 0, text
    assert f"index {index} is out of range for an embedding of 10 rows" in text


def test_scaled_backward_of_many_tables(library):
    for sizes in MANY_TABLES:
        problem = Problem(sizes, 5000, torch.float32, torch.int64, "zipf", True)
        for plan in (*sort_plans(problem.num_rows), None):
            assert_gradient(problem, problem.backward(library, plan, scaled=True), scaled=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ONE_TABLE, ids=str)
@pytest.mark.parametrize("num_rows", [1, 300, 2048, 9001])
def test_sparse_backward_by_every_plan(library, size, num_rows, dtype):
    for distribution, index_dtype, padding, offset in CASES:
        problem = Problem([size], num_rows, dtype, index_dtype, distribution, padding, offset)
        for plan in (*sort_plans(problem.num_rows), None):
            rows, values = problem.sparse_backward(library, plan)
            assert_sparse_gradient(problem, rows, values)
            assert torch.equal(problem.sparse_backward(library, plan)[1], values), "other bits in another run"


@pytest.mark.parametrize("distribution", ["uniform", "zipf", "one row", "sorted"])
def test_sparse_backward_of_chunks_of_several_tiles(library, distribution):
    problem = Problem([(1 << 20, 4)], (1 << 22) + 77, torch.float32, torch.int64, distribution, True)
    rows, values = problem.sparse_backward(library)
    assert torch.equal(rows, problem.indices[problem.indices != problem.padding[0]].unique())
    expected = problem.reference_gradient()[0].view(-1, 4)[rows]
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=0.01)


@pytest.mark.parametrize("dim, num_rows", [(4, 0), (0, 9)])
def test_sparse_backward_of_nothing(library, dim, num_rows):
    problem = Problem([(5, dim)], num_rows, torch.float32)
    rows, values = problem.sparse_backward(library)
    assert torch.equal(rows, problem.indices.unique())
    assert values.numel() == 0


def test_all_lookups_are_padding(library):
    problem = Problem([(50000, 8)], 5000, torch.float32, distribution="one row")
    problem.padding = [25000]
    problem.tables[0].padding_idx = 25000
    rows, values = problem.sparse_backward(library)
    assert rows.numel() == values.numel() == 0


def test_no_sparse_backward_while_a_graph_is_captured(library):
    problem = Problem([(500, 8)], 1000, torch.float32)
    args = abi.BackwardArgs(*problem.lookup(), problem.grad_output.data_ptr(), 8, None, 0, 0)
    size = c_size_t()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        problem.weight.clone()  # an empty graph is a warning
        status = library.fe_cuda_embedding_sparse_count(None, byref(args), None, None, byref(size), stream())
    assert status == abi.UNSUPPORTED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", MANY_TABLES, ids=lambda sizes: f"{len(sizes)} tables")
@pytest.mark.parametrize("num_rows", [1, 300, 5000])
def test_backward_of_many_tables(library, sizes, num_rows, dtype):
    for distribution, index_dtype, padding in (("uniform", torch.int64, True), ("one row", torch.int32, False)):
        problem = Problem(sizes, num_rows, dtype, index_dtype, distribution, padding)
        for plan in plans_for(problem):
            assert_gradient(problem, problem.backward(library, plan))
        assert_gradient(problem, problem.backward(library))


# Enough lookups, or wide enough, that TILE gives an SM to one block: of one round and of several.
MANY_LOOKUPS = [
    ([(1000, 32)], 150001),
    ([(119, 300)], 40000),
    ([(700, 3)], 500003),
    ([(400, 8)] * 26, 8192),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes, num_rows", MANY_LOOKUPS, ids=lambda value: str(value)[:20])
def test_backward_by_one_block_an_sm(library, sizes, num_rows, dtype):
    plan = abi.Plan(abi.TILE, float32_scratch=dtype.itemsize == 2)
    for distribution, index_dtype, padding, offset in CASES:
        problem = Problem(sizes, num_rows, dtype, index_dtype, distribution, padding, offset)
        assert_gradient(problem, problem.backward(library, plan))


# Tables whose columns allow accesses of 16 bytes beside such that allow 8, or one element; rows of several chunks among
# short ones; a launch of one width before one of several.
MIXED_WIDTHS = [
    [(100 * 2**t, dim) for t, dim in enumerate((1, 2, 3, 4, 6, 8, 12, 16, 24, 32))],
    [(40, 1), (5, 3), (300, 4), (9000, 2), (70, 6), (20, 320), (2000, 260), (30, 8)],
    [(11, 90), (12, 2), (13, 520), (14, 4), (15, 8)],
    [*[(9, 8)] * 64, (5, 1), (700, 2), (3, 5), (40, 4), (40, 12)],
    [(300, 8), (60, 37), (9, 3)],  # narrow accesses to the longest rows, of no whole number of wide ones
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", MIXED_WIDTHS, ids=lambda sizes: f"{len(sizes)} tables")
@pytest.mark.parametrize("num_rows", [1, 32, 700, 9001])
def test_backward_of_tables_of_several_widths(library, sizes, num_rows, dtype):
    for distribution, index_dtype, padding, offset in CASES:
        problem = Problem(sizes, num_rows, dtype, index_dtype, distribution, padding, offset)
        for plan in [*plans_for(problem), None]:
            assert_gradient(problem, problem.backward(library, plan))
        first = problem.backward(library, deterministic=True).clone()
        assert_gradient(problem, first)
        assert torch.equal(problem.backward(library, deterministic=True), first)
        for plan in (*sort_plans(num_rows), None):
            assert_gradient(problem, problem.backward(library, plan, scaled=True), scaled=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_gradients_of_several_widths(library, dtype):
    problem = Problem(MIXED_WIDTHS[1], 4096, dtype)
    problem.indices = problem.indices.t().contiguous().t()
    dim = problem.total_dim
    wide = torch.randn(4096, dim + 20, device="cuda").to(dtype)
    for grad_output in (wide[:, 8 : 8 + dim], wide[:, 3 : 3 + dim], wide[:1, :dim].expand(4096, dim)):
        problem.grad_output = grad_output
        for plan in plans_for(problem):
            assert_gradient(problem, problem.backward(library, plan))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inf_and_nan_stay_in_their_rows_of_several_widths(library, dtype):
    problem = Problem([(20, 8), (30, 1), (9, 3), (40, 4)], 3000, dtype)
    expected = torch.zeros(problem.numel, dtype=torch.bool, device="cuda")
    column = 0
    for t, (_, dim) in enumerate(problem.sizes):
        problem.grad_output[7, column + dim - 1] = torch.inf if t % 2 == 0 else torch.nan
        expected[problem.offsets[t] + problem.indices[7, t] * dim + dim - 1] = True
        column += dim
    for plan in [*plans_for(problem), None]:
        assert torch.equal(~torch.isfinite(problem.backward(library, plan)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_small_tables_among_large_ones(library, dtype, deterministic):
    """The small ones in a launch of their own, which leaves alone what the other has written."""
    for sizes in (
        [(1116, 81), *[(4, 3), (53, 15), (32, 11), (9, 5)] * 5],
        [*[(8, 5), (100, 4)] * 4, (40_000, 16), *[(3, 3), (20, 10)] * 4, (900, 33)],
        [(7, 3)] * 150 + [(3000, 8)],
        [(7, 3)] * 150,
    ):
        num_rows = 70_000 if len(sizes) < 100 else 20_000
        chosen = private_tables(library, sizes, num_rows, dtype, deterministic)
        assert [rows <= (53 if dtype == torch.float64 else 100) for rows, _ in sizes] == chosen
        for distribution, index_dtype, padding, offset in CASES:
            problem = Problem(sizes, num_rows, dtype, index_dtype, distribution, padding, offset)
            first = problem.backward(library, deterministic=deterministic).clone()
            assert_gradient(problem, first)
            if deterministic:
                assert torch.equal(problem.backward(library, deterministic=True), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_holes_between_small_tables_are_zeroed(library, dtype):
    problem = Problem([(8, 5), (4, 3), (13, 7)], 100_000, dtype)
    numel = problem.numel + 5000
    for offsets in ([0, 4000, 3000], [1000, 1040, 2000]):  # not ascending; a hole in front
        problem.numel = numel
        problem.offsets = offsets
        for table, at in zip(problem.tables, offsets, strict=True):
            table.weight_offset = at
        problem.grad_weight = problem.buffer(numel, 0)
        assert_gradient(problem, problem.backward(library, abi.Plan(abi.PRIVATE, threads=1024, splits=132)))
        assert_gradient(problem, problem.backward(library))


def private_tables(library, sizes, num_rows, dtype, deterministic, combination=abi.CONCAT):
    tables = (abi.Table * len(sizes))(*[abi.Table(rows, dim, 0, dim, -1) for rows, dim in sizes])
    args = abi.BackwardArgs(DTYPES[dtype], abi.INT64, len(sizes), tables, num_rows)
    args.deterministic, args.combination = deterministic, combination
    return abi.private_tables(library, args, device_properties())[0]


SUMS = [
    summed([119, 5, 12, 12, 10, 6, 6, 2, 2], 300),
    summed([3000, 70], 1),
    summed([60, 40, 7], 3),
    summed([50, 8, 900, 2, 4], 5),
    summed([70_000, 3, 30], 16),
    summed([9] * 64, 2),
    summed([9] * 131, 4),  # three launches
    summed([20] * 12, 2100),  # rows that several blocks share
    summed([20, 30, 40], 1025),
    summed([30, 7, 3], 302),  # in float32 rows of 8-byte words
    summed([3, 1, 40], 65),  # three tables whose rows are taken together
    summed([10 + t for t in range(14)], 40),  # no two of these
    summed([2, 2], 256),  # four places: each run reaches over many lane groups' shares
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SUMS, ids=lambda sizes: f"{len(sizes)} x {sizes[0][1]}")
@pytest.mark.parametrize("num_rows", [0, 1, 77, 5000, 100_000])
def test_sums_are_exact(library, sizes, num_rows, dtype):
    """In the order of the tables, rounded once: bit by bit what torch adds one after the other."""
    num_rows = min(num_rows, 40_000_000 // sizes[0][1])  # 12 wide tables would take 10 GB to compare
    for index_dtype, offset in ((torch.int64, 0), (torch.int32, 1)):
        problem = Problem(sizes, num_rows, dtype, index_dtype, offset=offset, combination=abi.SUM)
        assert torch.equal(problem.forward(library), problem.reference_output())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SUMS, ids=lambda sizes: f"{len(sizes)} x {sizes[0][1]}")
@pytest.mark.parametrize("num_rows", [0, 1, 300, 5000])
def test_backward_of_sums(library, sizes, num_rows, dtype):
    for distribution, index_dtype, padding, offset in (
        ("uniform", torch.int64, True, 0),
        ("one row", torch.int32, False, 1),
    ):
        problem = Problem(sizes, num_rows, dtype, index_dtype, distribution, padding, offset, abi.SUM)
        for plan in plans_for(problem):
            assert_gradient(problem, problem.backward(library, plan))
        first = problem.backward(library, deterministic=True).clone()
        assert_gradient(problem, first)
        assert torch.equal(problem.backward(library, deterministic=True), first)
        assert_gradient(problem, problem.backward(library))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_arguments_of_sums(library, dtype):
    problem = Problem(summed([100, 30, 7], 16), 4096, dtype, combination=abi.SUM)
    problem.indices = problem.indices.t().contiguous().t()
    wide = torch.full((4096, 40), 7, dtype=dtype, device="cuda")
    for columns in (slice(8, 24), slice(3, 19)):  # 16 bytes apart, and not
        problem.output = wide[:, columns]
        assert torch.equal(problem.forward(library), problem.reference_output())
        problem.output.fill_(7)
        assert (wide == 7).all(), "the kernel wrote beside its columns"
    wide.normal_()
    for grad_output in (wide[:, 8:24], wide[:, 3:19], wide[:1, :16].expand(4096, 16)):
        problem.grad_output = grad_output
        for plan in plans_for(problem):
            assert_gradient(problem, problem.backward(library, plan))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_read_a_shared_table(library, dtype):
    for reader, owner in ((2, 0), (0, 2)):  # the first table begins where they all do, and not
        problem = Problem(summed([50, 8, 50], 12), 3000, dtype, combination=abi.SUM)
        problem.offsets[reader] = problem.tables[reader].weight_offset = problem.offsets[owner]
        assert torch.equal(problem.forward(library), problem.reference_output())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_tables_of_a_sum_read_the_gradient_once(library, dtype):
    """Nine in one launch of private copies; beside a large table, which has its own."""
    few = summed([119, 5, 12, 12, 10, 6, 6, 2, 2], 300)
    for sizes in (few, [few[0], (5000, 300), *few[1:]]):
        chosen = private_tables(library, sizes, 30_000, dtype, False, abi.SUM)
        assert [rows <= 119 for rows, _ in sizes] == chosen
        for distribution, index_dtype, padding, offset in CASES:
            problem = Problem(sizes, 30_000, dtype, index_dtype, distribution, padding, offset, abi.SUM)
            assert_gradient(problem, problem.backward(library))
            first = problem.backward(library, deterministic=True).clone()
            assert_gradient(problem, first)
            assert torch.equal(problem.backward(library, deterministic=True), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_beside_a_large_table_of_a_sum(library, dtype):
    """A launch behind another, which has written the other table."""
    sizes = summed([8, 5000], 300)
    assert private_tables(library, sizes, 100_000, dtype, False, abi.SUM) == [True, False]
    for distribution, index_dtype, padding, offset in CASES:
        problem = Problem(sizes, 100_000, dtype, index_dtype, distribution, padding, offset, abi.SUM)
        assert_gradient(problem, problem.backward(library))


def test_sums_keep_inf_and_nan_in_their_rows(library):
    problem = Problem(summed([5, 2, 2], 70), 4000, torch.float32, combination=abi.SUM, padding=True)
    first, padded = (
        (problem.indices == torch.tensor(row, device="cuda")).all(1).nonzero()[0] for row in ([3, 1, 1], [1, 0, 0])
    )
    problem.grad_output[first, 5] = torch.inf
    problem.grad_output[padded] = torch.nan  # of padding in all three tables
    for plan in [*plans_for(problem), None]:
        actual = problem.backward(library, plan)
        rows = [actual[at : at + v * 70].view(v, 70) for at, (v, _) in zip(problem.offsets, problem.sizes, strict=True)]
        for table, row in zip(rows, (3, 1, 1), strict=True):
            assert table[row, 5] == torch.inf
            assert torch.isfinite(table).sum() == table.numel() - 1


def test_sums_of_unlike_tables_are_refused(library):
    problem = Problem([(50, 8), (20, 8)], 100, torch.float32, combination=abi.SUM)
    problem.tables[1].embedding_dim = problem.tables[1].weight_stride = 7
    for run in (problem.forward, problem.backward):
        with pytest.raises(AssertionError, match="status 1"):
            run(library)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_arguments(library, dtype):
    problem = Problem([(100, 16)], 4096, dtype)
    wide = torch.randn(4096, 40, device="cuda").to(dtype)
    for grad_output in (wide[:, 8:24], wide[:, 3:19], wide[:1, :16].expand(4096, 16)):
        problem.grad_output = grad_output
        for plan in plans_for(problem):
            assert_gradient(problem, problem.backward(library, plan))
    problem = Problem([(100, 16), (30, 8)], 4096, dtype)
    problem.indices = problem.indices.t().contiguous().t()
    assert torch.equal(problem.forward(library), problem.reference_output())
    for plan in plans_for(problem):
        assert_gradient(problem, problem.backward(library, plan))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [False, True])
def test_inf_and_nan_stay_in_their_rows(library, dtype, padding):
    problem = Problem([(20, 12)], 9001, dtype, padding=padding)
    first, second, padded = ((problem.indices[:, 0] == row).nonzero()[0] for row in (3, 17, problem.padding[0] % 20))
    problem.grad_output[first, 5] = torch.inf
    problem.grad_output[second, 6] = torch.nan
    if padding:
        problem.grad_output[padded] = torch.nan
    expected, _ = problem.reference_gradient()
    for plan in [*plans_for(problem), None]:
        actual = problem.backward(library, plan).view(20, 12).clone()
        assert actual[3, 5] == torch.inf
        assert actual[17, 6].isnan()
        actual[3, 5] = actual[17, 6] = 0
        finite = expected.view(20, 12).clone()
        finite[3, 5] = finite[17, 6] = 0
        torch.testing.assert_close(actual, finite.to(dtype), rtol=1e-2, atol=1e-2 * finite.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_plans_give_the_same_bits(library, dtype):
    for size, distribution in (((20, 16), "uniform"), ((50000, 32), "zipf"), ((3000, 5), "one row")):
        problem = Problem([size], 100000, dtype, distribution=distribution)
        first = problem.backward(library, deterministic=True).clone()
        for _ in range(3):
            assert torch.equal(problem.backward(library, deterministic=True), first)


@pytest.mark.parametrize("num_rows", [40_001, 200_001])
def test_a_sort_of_more_chunks_than_blocks(library, num_rows):
    """A block has several chunks of several tables, one after the other."""
    problem = Problem([(50 + 30 * t, 2) for t in range(26)], num_rows, torch.float32, distribution="zipf")
    for plan in sort_plans(num_rows)[:3]:
        assert_gradient(problem, problem.backward(library, plan))


def test_a_row_with_a_million_indices(library):
    for size in ((1, 4), (100000, 8)):
        problem = Problem([size], 1 << 20, torch.float32, distribution="one row")
        for plan in plans_for(problem):
            # A chain of 2^20 / (lane groups) additions: the bound of assert_gradient holds for the sums over runs only.
            error = (problem.backward(library, plan).double() - problem.reference_gradient()[0]).abs().max()
            reference = torch.zeros(size, device="cuda").index_add_(0, problem.indices[:, 0], problem.grad_output)
            aten = (reference.flatten().double() - problem.reference_gradient()[0]).abs().max()
            assert error <= max(aten.item(), 0.01)


def test_workspace_that_is_too_small_is_refused(library):
    problem = Problem([(50000, 8)], 1000, torch.float32)
    plan = abi.Plan(abi.SORT, tile=256, digit_bits=10, sort_tile=8192)
    args = abi.BackwardArgs(
        *problem.lookup(), problem.grad_output.data_ptr(), 8, problem.grad_weight.data_ptr(), problem.numel, 0
    )
    workspace = torch.empty(64, dtype=torch.uint8, device="cuda")
    status = library.fe_cuda_embedding_backward_by(
        byref(plan), byref(args), workspace.data_ptr(), byref(c_size_t(64)), stream()
    )
    assert status == abi.WORKSPACE_TOO_SMALL


def test_plans_that_do_not_fit_are_refused(library):
    problem = Problem([(300, 8)], 1000, torch.float32)
    for plan in (
        abi.Plan(abi.PRIVATE, threads=1024, splits=132),  # more shared memory than there is
        abi.Plan(abi.PRIVATE, threads=0, splits=132),  # more rows than fit registers
        abi.Plan(abi.TILE, tile=100),
        abi.Plan(abi.TILE, tile=2048),
        abi.Plan(abi.TILE, threads=512),
        abi.Plan(abi.TILE, threads=768, tile=4096),
        abi.Plan(abi.SORT, tile=0, digit_bits=10, sort_tile=8192),
        abi.Plan(abi.SORT, tile=256, digit_bits=0, sort_tile=8192),
        abi.Plan(abi.SORT, tile=256, digit_bits=10, sort_tile=16384),
        abi.Plan(9),
    ):
        with pytest.raises(AssertionError, match="status 1"):
            problem.backward(library, plan)
    for plan in plans_for(problem):
        if plan.strategy in (abi.TILE, abi.PRIVATE):  # they do not know how long a run is
            with pytest.raises(AssertionError, match="status 1"):
                problem.backward(library, plan, scaled=True)
        if plan.strategy != abi.SORT:
            with pytest.raises(AssertionError, match="status 1"):
                problem.sparse_backward(library, plan)
