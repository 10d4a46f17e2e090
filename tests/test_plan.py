"""The table that chooses a backward kernel: pure, so it is tested without a GPU."""

import ctypes

import abi
import pytest

H200 = abi.Device(90, 132, 60 << 20, 227 << 10, 228 << 10, 16)
NO_CLUSTERS = abi.Device(90, 132, 60 << 20, 227 << 10, 228 << 10, 0)  # as compiled by a CUDA before 12.3
T4 = abi.Device(75, 40, 4 << 20, 64 << 10, 64 << 10)
SIXTEEN_BIT = (abi.FLOAT16, abi.BFLOAT16)


@pytest.fixture(scope="module")
def library():
    return abi.declare_plan(ctypes.CDLL(str(abi.library_path("cpu"))))


@pytest.fixture
def plan(library):
    def make(v, d, n, scalar_type=abi.FLOAT32, deterministic=False, device=H200, num_tables=1, **flags):
        query = abi.PlanQuery(scalar_type, num_tables, v, d, n, v * d, deterministic, device, **flags)
        return abi.make_plan(library, query)

    return make


@pytest.mark.parametrize(
    ("v", "d", "n", "strategy"),
    [
        (1, 4, 1 << 20, abi.PRIVATE),
        (10, 4, 1 << 20, abi.PRIVATE),
        (32, 12, 262144, abi.PRIVATE),
        (100, 16, 65536, abi.TILE),
        (2, 768, 16384, abi.PRIVATE),
        (16, 4096, 4096, abi.PRIVATE),
        (17, 4096, 4096, abi.TILE),
        (10, 4, 4095, abi.TILE),
        (256, 64, 65536, abi.TILE),
        (119, 300, 100000, abi.TILE),
        (50257, 768, 16384, abi.SORT),
        (50257, 64, 16384, abi.TILE),
        (50257, 768, 131072, abi.SORT),
        (65536, 64, 1 << 20, abi.TILE),
        (1000, 64, 128, abi.OWN),
        (10, 4, 1024, abi.OWN),
        (10, 4, 1025, abi.TILE),
        (1000000, 128, 65536, abi.SORT),
        (1000000, 64, 262144, abi.TILE),
        (1000000, 128, 1 << 20, abi.SORT),
    ],
)
def test_float32_strategies(plan, v, d, n, strategy):
    assert abi.STRATEGIES[plan(v, d, n).strategy] == abi.STRATEGIES[strategy]


@pytest.mark.parametrize(
    ("v", "d", "n", "strategy"),
    [
        (1000, 64, 2048, abi.OWN),
        (100, 16, 65536, abi.PRIVATE),
        (2, 768, 16384, abi.PRIVATE),
        (16, 4096, 2049, abi.PRIVATE),
        (256, 64, 65536, abi.SORT),
        (50257, 768, 131072, abi.SORT),
    ],
)
def test_deterministic_strategies(plan, v, d, n, strategy):
    assert abi.STRATEGIES[plan(v, d, n, deterministic=True).strategy] == abi.STRATEGIES[strategy]


@pytest.mark.parametrize("deterministic", [False, True])
def test_few_rows_are_summed_in_registers(plan, deterministic):
    for scalar_type in range(4):
        for v, d, n in ((1, 1, 4096), (10, 4, 1 << 20), (10, 4224, 1 << 20), (16, 255, 1 << 20)):
            if scalar_type == abi.FLOAT64 and d > 64:
                continue
            chosen = plan(v, d, n, scalar_type, deterministic)
            assert (chosen.strategy, chosen.threads, chosen.splits) == (abi.PRIVATE, 0, H200.num_sms)
    assert plan(17, 4, 1 << 20, deterministic=deterministic).threads > 0
    assert plan(16, 4225, 1 << 20, deterministic=deterministic).strategy != abi.PRIVATE  # more slices than blocks fill
    assert plan(10, 4, 1 << 20, abi.FLOAT32, deterministic, T4).threads == 0
    assert plan(10, 4, 1 << 20, abi.FLOAT64, deterministic, T4).threads > 0  # adds it at a thirty-second of the rate
    assert plan(2, 64, 1 << 20, abi.FLOAT64, deterministic).threads == 0
    wide64 = plan(2, 768, 1 << 20, abi.FLOAT64, deterministic)
    assert (wide64.strategy, wide64.threads) != (abi.PRIVATE, 0)
    assert plan(11, 256, 1 << 16, abi.FLOAT32, deterministic).strategy == abi.PRIVATE
    wide16 = plan(11, 256, 1 << 16, abi.BFLOAT16, deterministic)  # more additions than the bytes take
    assert wide16.strategy == (abi.PRIVATE if deterministic else abi.TILE)


@pytest.mark.parametrize(
    ("v", "d", "n", "blocks"),
    [
        (1000000, 128, 65536, 16),  # the zeros of 512 MB take longer than any sort
        (1000000, 128, 262144, 16),
        (1000000, 128, 262145, 0),  # more than 16 blocks hold
        (300000, 300, 1, 16),
        (1000000, 16, 200000, 0),  # the sort would be waited for
    ],
)
def test_a_cluster_sorts_behind_the_zeros(plan, v, d, n, blocks):
    for deterministic in (False, True):
        chosen = plan(v, d, n, deterministic=deterministic)
        assert chosen.cluster == blocks
        if blocks:
            assert chosen.strategy == abi.SORT
        without = plan(v, d, n, deterministic=deterministic, device=NO_CLUSTERS)
        assert without.cluster == 0
        assert deterministic or n > 262144 or without.strategy != abi.SORT


def test_clusters_of_all_tables_leave_blocks_for_the_zeros(plan):
    def cluster(v, n, num_tables):
        return plan(v, 64, n, num_tables=num_tables, deterministic=True).cluster

    assert cluster(4000000, 16384, 2) == 16
    assert cluster(4000000, 16384, 5) == 8
    # Small ones find a place on most SMs, but the fewer they take, the faster are the zeros.
    assert cluster(4000000, 16384, 16) == 4
    assert cluster(4000000, 16384, 26) == 2
    assert cluster(4000000, 65536, 16) == 4
    assert cluster(4000000, 65536, 28) == 4
    assert cluster(4000000, 65536, 29) == 0
    assert cluster(500000, 65536, 10) == 0  # the indices would be waited for
    assert plan(4000000, 64, 16384, num_tables=16).strategy == abi.TILE


def test_a_sparse_gradient_of_few_lookups_is_sorted_by_a_cluster(plan):
    assert plan(1000000, 64, 4096, sparse=1).cluster > 0
    assert plan(1000000, 64, 200000, sparse=1).cluster == 0


@pytest.mark.parametrize("scalar_type", SIXTEEN_BIT)
def test_sixteen_bits_sort_where_the_float32_copy_is_too_large(plan, scalar_type):
    assert plan(50257, 768, 16384, scalar_type).strategy == abi.SORT
    assert plan(10000, 256, 16384, scalar_type).strategy == abi.SORT
    small = plan(1000, 32, 262144, scalar_type)
    assert (small.strategy, small.float32_scratch) == (abi.TILE, 1)


@pytest.mark.parametrize("scalar_type", SIXTEEN_BIT)
def test_sixteen_bits_sort_where_atomics_cost_more(plan, scalar_type):
    assert plan(300, 300, 200000, scalar_type).strategy == abi.SORT
    assert plan(3000, 768, 16384, scalar_type).strategy == abi.SORT
    assert plan(33, 1280, 32768, scalar_type).strategy == abi.TILE  # few rows: few atomics
    for v, d, n in ((119, 300, 100000), (250, 128, 1 << 19), (1000, 300, 100000), (2000, 512, 20000)):
        assert plan(v, d, n, scalar_type).strategy == abi.TILE
    assert plan(256, 64, 65536, scalar_type).strategy == abi.TILE


def test_one_wide_table_among_narrow_ones_makes_no_sort_pay(plan):
    """A sort costs by the lookup: it is the mean row that must be long. Sizes: 1116 x 81 and 23 of 3 to 15 columns."""
    for scalar_type in range(4):
        assert plan(1409, 217, 65536, scalar_type, num_tables=24).strategy == abi.TILE
    assert plan(24 * 1116, 24 * 81, 65536, abi.BFLOAT16, num_tables=24).strategy == abi.SORT


RETAIL = list(
    zip(
        (1116, 8, 4, 13, 32, 3, 3, 26, 24, 22, 9, 27, 4, 7, 7, 9, 9, 13, 3, 4, 4, 5, 53, 4),
        (81, 5, 3, 7, 11, 3, 3, 10, 9, 9, 5, 10, 3, 5, 5, 5, 5, 7, 3, 3, 3, 4, 15, 3),
        strict=True,
    )
)


@pytest.fixture
def private_tables(library):
    def choose(sizes, n, scalar_type=abi.FLOAT32, device=H200, **flags):
        tables = (abi.Table * len(sizes))(*[abi.Table(v, d, 0, d, -1) for v, d in sizes])
        args = abi.BackwardArgs(scalar_type, abi.INT64, len(sizes), tables, n, **flags)
        return abi.private_tables(library, args, device)

    return choose


@pytest.mark.parametrize("scalar_type", range(4))
def test_small_tables_share_a_launch_where_it_pays(private_tables, scalar_type):
    chosen, plan = private_tables(RETAIL, 65536, scalar_type)
    assert chosen == [False] + [True] * 23
    accumulator = 8 if scalar_type == abi.FLOAT64 else 4
    assert plan.threads in range(512, 1025, 32)
    assert plan.threads * (53 * accumulator + 1) <= H200.shared_bytes_per_block
    assert plan.splits == H200.num_sms
    assert not any(private_tables(RETAIL, 512, scalar_type)[0])  # a launch more costs more than it saves
    assert not any(private_tables([(1000, 8)] * 10, 65536, scalar_type)[0])  # no copies of these in shared memory
    assert not any(private_tables([(30, 64)] * 26, 65536, scalar_type)[0])  # TILE costs by the lookup
    assert not any(private_tables(RETAIL, 65536, scalar_type, scale_grad_by_freq=1)[0])
    assert not any(private_tables([(20, 4)], 65536, scalar_type)[0])  # one table has a plan of its own


def test_reproducible_small_tables_need_no_sort(private_tables):
    assert all(private_tables([(100, 4)] * 10, 1024, deterministic=1)[0])
    assert not any(private_tables([(100, 4)] * 10, 1024)[0])


@pytest.mark.parametrize("scalar_type", range(4))
def test_small_tables_of_a_sum_are_taken_together(private_tables, scalar_type):
    atoms = [119, 5, 12, 12, 10, 6, 6, 2, 2]
    chosen, plan = private_tables([(v, 300) for v in [*atoms, 5000]], 65536, scalar_type, combination=abi.SUM)
    assert chosen == [v <= 119 for v in [*atoms, 5000]]
    assert plan.splits == H200.num_sms
    assert not any(private_tables([(v, 300) for v in atoms], 4096, scalar_type, combination=abi.SUM)[0])
    # A block of each SM leaves its sums in scratch.
    assert not all(private_tables([(80, 64)] * 9, 16384, scalar_type, combination=abi.SUM)[0])
    chosen, _ = private_tables([(2, 16)] * 20, 1 << 20, scalar_type, combination=abi.SUM)
    assert chosen == [True] * 16 + [False] * 4


@pytest.mark.parametrize(("scalar_type", "most_rows"), [(abi.FLOAT32, 668), (abi.FLOAT64, 238), (abi.BFLOAT16, 732)])
def test_sums_fit_shared_memory(private_tables, scalar_type, most_rows):
    """64 columns of all rows and of two tiles of 64 lookups, four accumulators a thread, and the lists."""
    for rows, fits in ((most_rows, True), (most_rows + 1, False)):
        chosen, _ = private_tables([(rows - 1, 64), (1, 64)], 1 << 22, scalar_type, combination=abi.SUM)
        assert all(chosen) == fits


@pytest.mark.parametrize("device", [H200, T4], ids=["H200", "T4"])
def test_private_tables_fit_shared_memory(private_tables, device):
    for v in (0, 1, 27, 53, 100, 113, 114, 1000):
        for d in (0, 1, 4, 16):
            for scalar_type, accumulator in ((abi.FLOAT32, 4), (abi.FLOAT64, 8), (abi.BFLOAT16, 4)):
                chosen, plan = private_tables([(v, d)] * 9, 1 << 20, scalar_type, device)
                assert chosen in ([True] * 9, [False] * 9)
                if any(chosen):
                    assert v * d > 0
                    assert plan.threads * (v * accumulator + 1) <= device.shared_bytes_per_block


@pytest.mark.parametrize("scalar_type", range(4))
def test_frequencies_are_known_to_two_strategies(plan, scalar_type):
    for v, d, n in ((1, 4, 1 << 20), (100, 16, 65536), (1000, 64, 128), (10, 4, 2048), (50257, 768, 16384)):
        chosen = plan(v, d, n, scalar_type, scale_grad_by_freq=1)
        assert chosen.strategy == (abi.OWN if n <= 2048 else abi.SORT)


@pytest.mark.parametrize("scalar_type", range(4))
def test_a_sparse_gradient_is_sorted(plan, scalar_type):
    for v, d, n in ((1, 4, 1 << 20), (1000, 64, 128), (10_000_000, 32, 65536)):
        chosen = plan(v, d, n, scalar_type, sparse=1)
        assert (chosen.strategy, chosen.sort_tile) == (abi.SORT, 8192)


def sort_shared_bytes(plan):
    """Entries put in order, two counters of 32 bits a digit, one of 16 bits for each of 16 warps and for all."""
    return 8 * plan.sort_tile + (1 << plan.digit_bits) * (2 * 4 + 17 * 2)


@pytest.mark.parametrize("device", [H200, T4], ids=["H200", "T4"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("scalar_type", range(4))
def test_every_plan_is_one_that_its_kernel_takes(plan, scalar_type, deterministic, device):
    accumulator = 8 if scalar_type == abi.FLOAT64 else 4
    for v in (1, 2, 10, 100, 227, 1000, 50257, 10_000_000):
        for d in (1, 3, 4, 64, 768, 4096):
            for n in (1, 100, 16384, 1 << 20, 1 << 24):
                for num_tables in (1, 26):
                    chosen = plan(v, d, n, scalar_type, deterministic, device, num_tables)
                    if chosen.strategy == abi.OWN:
                        assert num_tables == 1
                        assert n <= 2048
                    elif chosen.strategy == abi.PRIVATE:
                        assert num_tables == 1
                        if chosen.threads == 0:
                            assert v <= 16
                            assert d <= 64 * device.num_sms
                        else:
                            assert chosen.threads in range(32, 1025, 32)
                            assert chosen.threads * v * accumulator <= device.shared_bytes_per_block
                        assert 1 <= chosen.splits <= device.num_sms
                    elif chosen.strategy == abi.TILE:
                        assert not deterministic
                        assert chosen.tile == 0  # the launch knows how many column chunks there are
                        assert chosen.float32_scratch == (scalar_type in SIXTEEN_BIT)
                        bound = (8 << 20) + n * (16 * num_tables + d * 2 / 10)
                        assert not chosen.float32_scratch or v * d * 4 <= bound
                    else:
                        assert chosen.strategy == abi.SORT
                        assert chosen.tile in range(64, 1025, 32)
                        assert sort_shared_bytes(chosen) <= device.shared_bytes_per_block - 1024


def test_sizes_that_32_bits_do_not_hold_are_unsupported(plan):
    for v, n, num_tables in ((10, 1 << 31, 1), (1 << 31, 10, 1), (10, 1 << 27, 26)):
        with pytest.raises(ValueError, match=f"returned {abi.UNSUPPORTED}"):
            plan(v, 1, n, num_tables=num_tables)


def test_nonsense_is_refused(library):
    query = abi.PlanQuery(abi.FLOAT32, 1, -1, 4, 10, 40, 0, H200)
    status = library.fe_plan_embedding_backward(ctypes.byref(query), ctypes.byref(abi.Plan()))
    assert status == abi.INVALID_ARGUMENT
