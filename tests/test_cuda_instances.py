"""Every CUDA kernel and template instance by few and small launches, for compute-sanitizer, under which one takes long.

A launch here is as small as the ways through a kernel allow: two tiles, runs over several lane groups and blocks,
blocks that wait for one another, chunks of columns, padding, both index types. test_cuda_kernels.py has the large ones.
"""

import math
import os
import re
from pathlib import Path

import abi
import pytest
import torch
from cuda_problems import (
    DTYPES,
    Problem,
    assert_close,
    assert_gradient,
    assert_sparse_gradient,
    can_sort_in_clusters,
    device_properties,
    has_room_for_many_threads,
    has_room_for_sums,
    load_library,
    summed,
)
from kernel_names import kernels_in, kernels_of

SOURCES = Path(__file__).resolve().parents[1] / "csrc/cuda"

# Side by side their columns allow accesses of 16 bytes, of 8 and of one element. The first has more than 64 of any; its
# rows are always hot, which of the others a sample shows.
MIXED_WIDTHS = [
    (3 + 37 * t % 1000, dim) for t, dim in enumerate([264, 8, 8, 12, 4, 6, 3, 1, 5, 1, 16, 8, 8, 12, 4, 6, 3, 1, 5, 1])
]
MORE_THAN_A_LAUNCH = [(3 + t % 5, 1 + t % 3) for t in range(70)]  # of 64 tables


@pytest.fixture(scope="module")
def library():
    return load_library()


def accesses(dtype):
    """Columns in an access of 16 bytes, of 8 and of one element. A row of an odd number of them allows no wider one."""
    return sorted({16 // dtype.itemsize, 8 // dtype.itemsize, 1})


def narrow_accesses(dtype):
    """The same where a thread has at most 16 bytes of sums, which are float32 for 16-bit types."""
    return [columns for columns in accesses(dtype) if columns <= 4]


def surround(problem, before, behind):
    """Puts the only table between elements that are no table's."""
    problem.offsets = [before]
    problem.tables[0].weight_offset = before
    problem.numel += before + behind
    problem.grad_weight = problem.buffer(problem.numel, problem.offset)
    return problem


def run(library, problem, *plans, scaled=False):
    reference = problem.reference_gradient(scaled)
    for plan in plans:
        assert_close(problem, problem.backward(library, plan, scaled=scaled), *reference)


def run_forward(library, *args, **kwargs):
    problem = Problem(*args, **kwargs)
    assert torch.equal(problem.forward(library), problem.reference_output())


def fill_threads(words_of_row, words_of_thread):
    """Rows of the output with which each thread of a device full of them writes so many words."""
    return words_of_thread * 2048 * device_properties().num_sms // words_of_row + 1


# ---- The families: each a function of the library and a dtype that reaches all of its kernels' instances ------------


def gather(library, dtype):
    for dim, index_dtype in ((24, torch.int64), (12, torch.int32), (6, torch.int64), (3, torch.int32)):
        row_bytes = dim * dtype.itemsize
        words = row_bytes // math.gcd(row_bytes, 16)
        # The second with several words a thread, which it reads at once.
        for num_rows in (77, 4 * 128 * device_properties().num_sms // words + 1):
            run_forward(library, [(40, dim)], num_rows, dtype, index_dtype)
        for each in (torch.int64, torch.int32):
            for num_rows in (77, fill_threads(2 * words, 2)):
                run_forward(library, [(40, dim), (9, dim)], num_rows, dtype, each)
    run_forward(library, [(5, 400), (7, 113)], 70, dtype, offset=1)  # more words than a block has threads
    run_forward(library, MORE_THAN_A_LAUNCH, 70, dtype)


def sums(library, dtype):
    for num_tables, dim in ((5, 24), (4, 12), (3, 6), (2, 3)):
        index_dtype = torch.int64 if num_tables % 2 else torch.int32
        run_forward(library, summed([9, 40, 2, 7, 30][:num_tables], dim), 77, dtype, index_dtype, combination=abi.SUM)
    # Rows that several blocks share, sums carried from launch to launch, and several rows a thread.
    run_forward(library, summed([20, 3, 5], 1601), 70, dtype, combination=abi.SUM)
    run_forward(library, summed([9] * 131, 3), 77, dtype, offset=1, combination=abi.SUM)
    run_forward(library, summed([9, 30], 3), fill_threads(3, 2), dtype, torch.int32, combination=abi.SUM)


def own(library, dtype):
    plan = abi.Plan(abi.OWN)
    for columns in narrow_accesses(dtype):
        for scaled in (False, True):
            # Some ten rows a block or more: one has half of the lookups and sorts them by digits, others in a warp.
            problem = Problem([(10_000, columns)], 300, dtype, torch.int64, "half on one row", padding=True)
            run(library, problem, plan, scaled=scaled)
            problem = Problem([(10, 5 * columns)], 700, dtype, torch.int32, "one row")  # chunks of columns
            run(library, problem, plan, scaled=scaled)
    run(library, surround(Problem([(40, 3)], 70, dtype, offset=1), 9, 30), plan)


def tile_plans(dtype, tile):
    threads = (256, 768) if has_room_for_many_threads() else (256,)
    return [abi.Plan(abi.TILE, threads=each, tile=tile, float32_scratch=dtype.itemsize == 2) for each in threads]


def tile(library, dtype):
    for columns in narrow_accesses(dtype):
        offset = int(columns == 1)
        # No hot row in a sample, so that lookups are added one by one; one that is hot in a sample, as its run over all
        # lane groups shows; rows that are always hot, in chunks of columns; lookups so few that no row is.
        for rows, packs, num_rows, length, distribution, index_dtype, padding in (
            (5000, 3, 700, 416, "uniform", torch.int64, True),
            (300, 3, 1100, 1024, "one row", torch.int32, False),
            (3, 65, 300, 96, "uniform", torch.int64, True),
            (50, 3, 60, 32, "one row", torch.int32, False),
        ):
            problem = Problem([(rows, packs * columns)], num_rows, dtype, index_dtype, distribution, padding, offset)
            run(library, problem, *tile_plans(dtype, length))
    problem = Problem(MORE_THAN_A_LAUNCH, 70, dtype, torch.int64, "uniform", True)
    run(library, problem, *tile_plans(dtype, 32))


def tile_mixed(library, dtype):
    """More work items than an H100 has room for blocks: of lookups that are all grouped, or some of them."""
    for distribution, index_dtype, padding in (("half on one row", torch.int64, True), ("uniform", torch.int32, False)):
        problem = Problem(MIXED_WIDTHS, 700, dtype, index_dtype, distribution, padding)
        run(library, problem, *tile_plans(dtype, 32))


def few_rows(library, dtype):
    for columns in accesses(dtype):
        for rows in (3, 10, 16):
            problem = Problem([(rows, columns)], 700, dtype, torch.int64, "uniform", True)  # 512 sums of an element
            run(library, problem, abi.Plan(abi.PRIVATE, splits=1))
            problem = Problem([(rows, 33 * columns)], 700, dtype, torch.int32, "half on one row")
            run(library, problem, abi.Plan(abi.PRIVATE, splits=7))
    problem = surround(Problem([(16, 131)], 300, dtype, offset=1), 9, 30)  # slices of columns
    run(library, problem, abi.Plan(abi.PRIVATE, splits=7))


def private(library, dtype):
    for sizes, splits in (
        ([(20, 5)], 7),
        ([(3, 5)], 7),  # several threads sum the copies of an element
        ([(70, 100)], 1),  # slices of columns
        ([(100, 4), (3, 3), (20, 5), (1, 1), (50, 7)], 7),
        ([(100, 4), (3, 3), (20, 5), (1, 1), (50, 7)], 1),
        (MORE_THAN_A_LAUNCH, 7),
    ):
        index_dtype, distribution = (torch.int32, "one row") if splits == 1 else (torch.int64, "uniform")
        problem = Problem(sizes, 700, dtype, index_dtype, distribution, splits > 1, int(splits == 1))
        run(library, problem, abi.Plan(abi.PRIVATE, threads=64, splits=splits))
    problem = surround(Problem([(20, 5)], 300, dtype), 9, 30)
    run(library, problem, abi.Plan(abi.PRIVATE, threads=64, splits=7))


def private_behind_others(library, dtype):
    """A launch that begins before the one for the large table has ended, by the plan of the library's own."""
    problem = Problem([(7, 3)] * 130 + [(3000, 8)], 2000, dtype)
    for deterministic in (False, True):
        assert_gradient(problem, problem.backward(library, deterministic=deterministic))


def private_sums(library, dtype):
    # Columns of two blocks, which share the sorting; one block's that are whole lines; a tile alone in 8 bytes, and in
    # single elements. The places of the tables' rows, two tables' together among them.
    for sizes, num_rows, splits, distribution, index_dtype, padding, offset in (
        (summed([20, 2, 2, 9], 68), 700, 1, "half on one row", torch.int64, True, 0),
        (summed([60, 40, 7], 64), 700, 1, "uniform", torch.int32, False, 0),
        (summed([5, 3], 6), 300, 7, "uniform", torch.int64, True, 0),
        (summed([30, 7, 3], 5), 150, 7, "one row", torch.int32, False, 1),
    ):
        problem = Problem(sizes, num_rows, dtype, index_dtype, distribution, padding, offset, abi.SUM)
        if sizes[0][1] < 64 or has_room_for_sums(problem):
            run(library, problem, abi.Plan(abi.PRIVATE, splits=splits))


def sort_by_all(part=32, digit_bits=4, sort_tile=512):
    return abi.Plan(abi.SORT, tile=part, digit_bits=digit_bits, sort_tile=sort_tile)


def sorts(digit_bits, blocks):
    """By all blocks, and by a cluster of so many."""
    plans = [sort_by_all()]
    if can_sort_in_clusters():
        plans.append(abi.Plan(abi.SORT, tile=32, digit_bits=digit_bits, sort_tile=8192, cluster=blocks))
    return plans


def sort(library, dtype):
    for columns in accesses(dtype):
        for scaled in (False, True):
            # A run over 11 parts of 22, two blocks or three that sort; beside it the zeros are a launch of their own.
            problem = Problem([(1500, 3 * columns)], 700, dtype, torch.int64, "half on one row", padding=True)
            run(library, problem, *sorts(4, 3), scaled=scaled)
            # One over 35, further than a look back at once, in chunks of columns.
            problem = Problem([(7, 65 * columns)], 1100, dtype, torch.int32, "one row")
            run(library, problem, *sorts(7, 1), scaled=scaled)
    problem = Problem([(1, 3)], 70, dtype, torch.int64, "one row", padding=True)  # parts of nothing but padding
    run(library, problem, *sorts(4, 3))


def sort_mixed(library, dtype):
    for scaled in (False, True):
        problem = Problem(MIXED_WIDTHS, 300, dtype, torch.int64, "half on one row", True)
        run(library, problem, *sorts(4, 1), scaled=scaled)


def sort_chunks(library, dtype):
    """Chunks of two tiles; and one chunk more for each table than blocks have room for, so that a block has two."""
    run(library, Problem([(9, 1)] * 64, 1100, dtype), sort_by_all())
    chunks = device_properties().num_sms // 64 + 1
    problem = Problem([(9, 1)] * 64, (chunks - 1) * 32768 + 1, dtype, torch.int32)
    run(library, problem, sort_by_all(1024, 10, 8192))


def sparse(library, dtype):
    for columns in accesses(dtype):
        # The longer one in more than one block that numbers runs.
        num_rows, distribution, padding = (4200, "zipf", False) if columns == 1 else (700, "half on one row", True)
        problem = Problem([(3000, 3 * columns)], num_rows, dtype, torch.int64, distribution, padding)
        for plan in sorts(4, 3):
            assert_sparse_gradient(problem, *problem.sparse_backward(library, plan))


def zeros(library, dtype):
    """So many that they are a launch of their own."""
    problem = Problem([((1 << 20) + 1, 16)], 70, dtype, torch.int64, padding=True)
    run(library, problem, *tile_plans(dtype, 32)[-1:])
    run(library, Problem([(1000, 8000)], 70, dtype), sort_by_all(digit_bits=10))  # all but those written at a barrier


ALL = list(DTYPES)
CASES = [
    (family, dtype)
    for family, dtypes in (
        (gather, [torch.float16]),  # whatever is in the words
        (sums, ALL),
        (own, ALL),
        (tile, ALL),
        (tile_mixed, ALL),
        (few_rows, ALL),
        (private, ALL),
        (private_behind_others, [torch.float32]),
        (private_sums, ALL),
        (sort, ALL),
        (sort_mixed, ALL),
        (sort_chunks, [torch.float16]),
        (sparse, ALL),
        (zeros, [torch.float32]),
    )
    for dtype in dtypes
]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family, dtype", CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_instances(library, family, dtype):
    family(library, dtype)


@pytest.mark.usefixtures("cuda")
@pytest.mark.skipif("FAST_EMBEDDING_SANITIZER" in os.environ, reason="compute-sanitizer leaves no room for a profiler")
def test_every_kernel_is_reached(library):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for family, dtype in CASES:
            family(library, dtype)
        torch.cuda.synchronize()
    missed = kernels_of(abi.library_path("cuda")) - kernels_in(profile)
    assert not sorted(filter(runs_here, missed))


def runs_here(kernel):
    if "::sort_in_cluster(" in kernel:
        return can_sort_in_clusters()
    return ", 768>" not in kernel or has_room_for_many_threads()


def test_the_kernels_of_the_library_are_found():
    path = abi.library_path("cuda")
    if not path.exists():
        pytest.skip("this build has no CUDA library")
    kernels = kernels_of(path)
    assert all("fast_embedding::" in kernel for kernel in kernels)
    found = {re.search(r"(\w+)(?:<[^()]*>)?\(", kernel.replace("(anonymous namespace)::", ""))[1] for kernel in kernels}
    assert {"tile_backward", "sum_sorted", "gather_rows", "count_runs"} <= found
    if SOURCES.is_dir():
        launched = re.compile(r"__global__ void(?:\s+__launch_bounds__\([^{;]*?\))?\s+(\w+)\(const __grid_constant__")
        assert found == {name for file in SOURCES.glob("*.cu") for name in launched.findall(file.read_text())}
