"""Lookups for the CUDA kernels through the C ABI, by a given plan, and what float64 makes of them."""

import functools
from ctypes import byref, c_size_t, c_void_p

import abi
import pytest
import torch

DTYPES = {
    torch.float32: abi.FLOAT32,
    torch.float64: abi.FLOAT64,
    torch.float16: abi.FLOAT16,
    torch.bfloat16: abi.BFLOAT16,
}
INDEX_TYPES = {torch.int32: abi.INT32, torch.int64: abi.INT64}


@functools.cache
def load_library():
    path = abi.library_path("cuda")
    if not path.exists():
        pytest.fail(f"{path} is missing: this build has no CUDA library")
    return abi.load_cuda(path)


def device_properties() -> abi.Device:
    properties = torch.cuda.get_device_properties(0)
    return abi.Device(
        properties.major * 10 + properties.minor,
        properties.multi_processor_count,
        properties.L2_cache_size,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
    )


def draw_indices(distribution: str, num_embeddings: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    uniform = torch.randint(0, num_embeddings, shape, device="cuda")
    match distribution:
        case "uniform":
            indices = uniform
        case "one row":
            indices = torch.full(shape, num_embeddings // 2, device="cuda")
        case "half on one row":
            indices = torch.where(torch.rand(shape, device="cuda") < 0.5, num_embeddings - 1, uniform)
        case "sorted":
            indices = uniform.sort(dim=0).values
        case "zipf":
            indices = (num_embeddings * torch.rand(shape, device="cuda") ** 6).long()
        case _:
            raise ValueError(distribution)
    return indices.to(dtype)


class Problem:
    """Tables of sizes (V, D), B rows of indices, an incoming gradient; `offset` moves each buffer off its alignment."""

    def __init__(
        self,
        sizes,
        num_rows,
        dtype,
        index_dtype=torch.int64,
        distribution="uniform",
        padding=False,
        offset=0,
        combination=abi.CONCAT,
    ):
        torch.manual_seed(len(sizes) + num_rows)
        self.sizes, self.num_rows, self.dtype, self.offset = sizes, num_rows, dtype, offset
        self.combination = combination
        self.total_dim = sizes[0][1] if combination == abi.SUM else sum(dim for _, dim in sizes)
        self.offsets, numel = [], 0
        for rows, dim in sizes:
            self.offsets.append(numel)
            numel += (rows * dim + 7) // 8 * 8 if len(sizes) > 1 else rows * dim
        self.numel = numel
        self.padding = [rows // 3 if padding else -1 for rows, _ in sizes]
        self.indices = torch.stack(
            [draw_indices(distribution, rows, (num_rows,), index_dtype) for rows, _ in sizes], dim=1
        )
        self.grad_output = self.buffer(num_rows * self.total_dim, offset).normal_().view(num_rows, self.total_dim)
        self.weight = self.buffer(numel, offset).normal_()
        self.grad_weight = self.buffer(numel, offset)
        self.output = self.buffer(num_rows * self.total_dim, offset).view(num_rows, self.total_dim)
        self.tables = (abi.Table * len(sizes))(
            *[
                abi.Table(rows, dim, at, dim, pad)
                for (rows, dim), at, pad in zip(sizes, self.offsets, self.padding, strict=True)
            ]
        )

    def buffer(self, numel, offset):
        return torch.full((numel + offset,), torch.nan, dtype=self.dtype, device="cuda")[offset:]

    def lookup(self):
        rows, tables = self.indices.stride()
        return (
            DTYPES[self.dtype], INDEX_TYPES[self.indices.dtype], len(self.sizes), self.tables, self.num_rows,
            self.indices.data_ptr(), rows, tables,
        )  # fmt: skip

    def forward(self, library):
        args = abi.ForwardArgs(
            *self.lookup(), self.weight.data_ptr(), self.output.data_ptr(), self.output.stride(0),
            combination=self.combination,
        )  # fmt: skip
        self.output.fill_(torch.nan)
        call_with_workspace(
            library, lambda *workspace: library.fe_cuda_embedding_forward(byref(args), *workspace, stream())
        )
        return self.output

    def backward(self, library, plan=None, deterministic=False, scaled=False):
        args = abi.BackwardArgs(
            *self.lookup(), self.grad_output.data_ptr(), self.grad_output.stride(0),
            self.grad_weight.data_ptr(), self.numel, deterministic, scaled, self.combination,
        )  # fmt: skip

        def call(*workspace):
            if plan is None:
                return library.fe_cuda_embedding_backward(byref(args), *workspace, stream())
            return library.fe_cuda_embedding_backward_by(byref(plan), byref(args), *workspace, stream())

        self.grad_weight.fill_(torch.nan)
        call_with_workspace(library, call)
        return self.grad_weight

    def sparse_backward(self, library, plan=None):
        """The only table's rows and their sums."""
        (_, dim), padding = self.sizes[0], self.padding[0]
        args = abi.BackwardArgs(*self.lookup(), self.grad_output.data_ptr(), self.grad_output.stride(0), None, 0, 0)
        plan = None if plan is None else byref(plan)
        size = c_size_t()
        check(library, library.fe_cuda_embedding_sparse_count(plan, byref(args), None, None, byref(size), stream()))
        assert size.value <= 16 * self.num_rows + self.grad_output.nbytes // 10 + (8 << 20)
        guard = 256
        workspace = torch.full((size.value + guard,), 0xFF, dtype=torch.uint8, device="cuda")
        counted = torch.full((2,), -1, device="cuda")
        memory = workspace.data_ptr()
        check(
            library,
            library.fe_cuda_embedding_sparse_count(
                plan, byref(args), counted.data_ptr(), memory, byref(size), stream()
            ),
        )
        count, behind = counted.tolist()
        assert behind == -1
        assert count == self.indices[self.indices != padding].unique().numel()
        rows = torch.full((count + 1,), -1, device="cuda")
        values = self.buffer(count * dim + self.offset, 0)[self.offset :]
        args.grad_weight, args.grad_weight_numel = values.data_ptr(), count * dim
        check(
            library,
            library.fe_cuda_embedding_sparse_backward(
                plan, byref(args), count, rows.data_ptr(), memory, byref(size), stream()
            ),
        )
        assert (workspace[size.value :] == 0xFF).all(), "the kernel wrote beyond its workspace"
        assert rows[count] == -1, "the kernel wrote beyond the rows"
        return rows[:count], values.view(count, dim)

    def reference_output(self):
        columns = []
        for t, (rows, dim) in enumerate(self.sizes):
            table = self.weight[self.offsets[t] : self.offsets[t] + rows * dim].view(rows, dim)
            columns.append(table[self.indices[:, t].long()])
        if self.combination == abi.CONCAT:
            return torch.cat(columns, 1)
        total = torch.zeros_like(columns[0], dtype=accumulator(self.dtype))
        for rows in columns:  # in this order
            total += rows
        return total.to(self.dtype)

    def reference_gradient(self, scaled=False):
        """float64, and the sum of magnitudes, which bounds what rounding can do to an element."""
        gradient = torch.zeros(self.numel, dtype=torch.float64, device="cuda")
        magnitude = torch.zeros_like(gradient)
        column = 0
        for t, (rows, dim) in enumerate(self.sizes):
            incoming = self.grad_output[:, column : column + dim].double()
            incoming = incoming.masked_fill((self.indices[:, t] == self.padding[t]).unsqueeze(1), 0)
            where = slice(self.offsets[t], self.offsets[t] + rows * dim)
            gradient[where].view(rows, dim).index_add_(0, self.indices[:, t].long(), incoming)
            magnitude[where].view(rows, dim).index_add_(0, self.indices[:, t].long(), incoming.abs())
            if scaled:
                count = torch.bincount(self.indices[:, t].long(), minlength=rows).clamp_(min=1).unsqueeze(1)
                gradient[where].view(rows, dim).div_(count)
                magnitude[where].view(rows, dim).div_(count)
            column += dim if self.combination == abi.CONCAT else 0
        return gradient, magnitude


def stream():
    return c_void_p(torch.cuda.current_stream().cuda_stream)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def call_with_workspace(library, call):
    """The size query, then the call itself with as much memory, which holds no zeros, and a guard behind it."""
    size = c_size_t()
    check(library, call(None, byref(size)))
    guard = 256
    workspace = torch.full((size.value + guard,), 0xFF, dtype=torch.uint8, device="cuda")
    check(library, call(workspace.data_ptr(), byref(size)))
    assert (workspace[size.value :] == 0xFF).all(), "the kernel wrote beyond its workspace"


def check(library, status):
    assert status == abi.OK, f"status {status}: {library.fe_cuda_last_error().decode()}"


def assert_gradient(problem, actual, scaled=False):
    assert_close(problem, actual, *problem.reference_gradient(scaled))


def assert_sparse_gradient(problem, rows, values):
    found = problem.indices[problem.indices != problem.padding[0]].unique()
    assert torch.equal(rows, found.long())
    expected, magnitude = (whole.view(problem.sizes[0])[rows] for whole in problem.reference_gradient())
    assert_close(problem, values.flatten(), expected.flatten(), magnitude.flatten())


def assert_close(problem, actual, expected, magnitude):
    if actual.numel() == 0:
        return
    # Sums in float32 (float64): each of log2-ish many roundings is relative to a partial sum, itself at most the sum of
    # magnitudes; a serial chain of 64 is the longest, or of 128 in the mean where TILE adds lookups one by one;
    # PRIVATE's grow with the lookups of a thread, whose errors have either sign. Then one rounding to the dtype.
    rounding = torch.finfo(accumulator(problem.dtype)).eps
    bound = 64 * rounding * magnitude + torch.finfo(problem.dtype).eps * expected.abs()
    error = (actual.double() - expected).abs()
    assert torch.isfinite(actual).all(), "elements were not written"
    worst = (error - bound).argmax()
    assert (error <= bound).all(), f"element {worst}: {actual[worst]} for {expected[worst]}, bound {bound[worst]}"


def summed(num_embeddings, dim):
    return [(rows, dim) for rows in num_embeddings]


def sort_plans(num_rows):
    plans = [
        abi.Plan(abi.SORT, tile=1024, digit_bits=10, sort_tile=8192),
        abi.Plan(abi.SORT, tile=256, digit_bits=8, sort_tile=4096),  # as on devices with little shared memory
        abi.Plan(abi.SORT, tile=32, digit_bits=4, sort_tile=512),  # several passes, several tiles a chunk
    ]
    if can_sort_in_clusters():
        plans += [
            abi.Plan(abi.SORT, tile=256, digit_bits=bits, sort_tile=8192, cluster=blocks)
            for bits, blocks in ((10, 8), (4, 1), (7, 3))
            if num_rows <= blocks * 16384
        ]
    return plans


def plans_for(problem):
    """All plans that fit: the table's own, and each strategy with the shortest and longest of its parameters."""
    sixteen_bit = problem.dtype in (torch.float16, torch.bfloat16)
    plans = [abi.Plan(abi.TILE, tile=tile, float32_scratch=sixteen_bit) for tile in (0, 32, 416, 1024)]
    if has_room_for_many_threads():
        plans += [abi.Plan(abi.TILE, threads=768, tile=tile, float32_scratch=sixteen_bit) for tile in (32, 3072)]
    plans += sort_plans(problem.num_rows)
    if len(problem.sizes) == 1 and problem.num_rows <= 2048:
        plans.append(abi.Plan(abi.OWN))
    width = 8 if problem.dtype == torch.float64 else 4
    shared_bytes = device_properties().shared_bytes_per_block
    rows = max(rows for rows, _ in problem.sizes)
    if problem.combination == abi.SUM:
        if has_room_for_sums(problem):
            plans += [abi.Plan(abi.PRIVATE, splits=splits) for splits in (1, 7, 132)]
    elif rows <= 200:
        threads = min(1024, shared_bytes // (rows * width)) // 32 * 32
        if threads:
            plans += [abi.Plan(abi.PRIVATE, threads=threads, splits=splits) for splits in (1, 7, 132)]
    if is_few_rows(problem):
        plans += FEW_ROWS_PLANS
    return plans


def has_room_for_many_threads():
    return device_properties().shared_bytes_per_block >= 96 << 10


def can_sort_in_clusters():
    """The device has 200 KB for a block of a cluster, and the library is of a CUDA that captures early launches."""
    device = device_properties()
    has_kernel = load_library().fe_cuda_compiled_version() >= 12030
    return has_kernel and device.compute_capability >= 90 and device.shared_bytes_per_block >= 200 << 10


def has_room_for_sums(problem):
    """For any embedding_dim: PRIVATE for sums takes less for less than 64."""
    width = accumulator(problem.dtype).itemsize
    rows = sum(rows for rows, _ in problem.sizes)
    least_bytes = rows * (64 * width + 32) + 2 * 64 * 64 * problem.dtype.itemsize + 4096 * width + 12288
    return len(problem.sizes) <= 16 and least_bytes <= device_properties().shared_bytes_per_block


# Sums in registers: by one block, and by some that share the rows.
FEW_ROWS_PLANS = [abi.Plan(abi.PRIVATE, threads=0, splits=splits) for splits in (1, 7, 132)]


def is_few_rows(problem):
    return (
        len(problem.sizes) == 1
        and problem.sizes[0][0] <= 16
        and problem.sizes[0][1] <= 64 * device_properties().num_sms
    )
