"""Fixtures of all tests: devices, dtypes, index streams, references.

The tests run against the installed package, on the CPU and, from the same files, on a GPU where there is one.
FAST_EMBEDDING_REQUIRE_GPU=1 makes a missing GPU a failure.
"""

import os
from typing import ClassVar

import pytest
import torch

from fast_embedding import ops

REQUIRE_GPU = os.environ.get("FAST_EMBEDDING_REQUIRE_GPU", "0") not in ("", "0")
HAS_GPU = torch.cuda.is_available()

# One test that is skipped, those of test_cuda.py, says as much as thousands.
DEVICES = ["cpu", "cuda"] if HAS_GPU or REQUIRE_GPU else ["cpu"]


def pytest_report_header():
    return f"torch {torch.__version__}, GPU: {torch.cuda.get_device_name() if HAS_GPU else 'none'}"


@pytest.fixture(scope="session")
def op():
    """The torch operators. They run the kernels whatever the size, where functional leaves small lookups to ATen."""
    ops.load()
    return torch.ops.fast_embedding


@pytest.fixture(params=DEVICES)
def device(request):
    return cuda_device() if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(scope="session")  # so that it comes before fixtures of a module, which need what it looks for
def cuda():
    """The GPU, for tests of what exists there alone."""
    if "cuda" not in DEVICES:
        pytest.skip("needs a GPU")
    return cuda_device()


def cuda_device():
    if not HAS_GPU:
        pytest.fail("FAST_EMBEDDING_REQUIRE_GPU is set and torch sees no GPU")
    ops.require("cuda")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=[torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=lambda t: str(t)[6:])
def dtype(request):
    return request.param


@pytest.fixture(params=[torch.int32, torch.int64], ids=lambda t: str(t)[6:])
def index_dtype(request):
    return request.param


@pytest.fixture(params=["uniform", "zipf", "one_row", "distinct", "sorted", "half_on_one_row", "empty"])
def distribution(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["default", "deterministic"])
def deterministic(request):
    """Runs the test in both modes of torch.use_deterministic_algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_indices():
    """(distribution, num_embeddings, n, dtype, device) -> a stream of about n indices, the same in every run."""

    def make(distribution, num_embeddings, n, dtype=torch.int64, device="cpu"):
        generator = torch.Generator().manual_seed(7)
        v = num_embeddings
        if distribution == "empty":
            indices = torch.empty(0)
        elif distribution == "one_row":
            indices = torch.full((n,), v - 1)
        elif distribution == "distinct":
            indices = torch.randperm(v, generator=generator)[:n]
        elif distribution == "zipf":
            # p(k) ~ 1/k by inverting the integral of 1/x, over a random permutation of the rows.
            rank = (v ** torch.rand(n, generator=generator, dtype=torch.float64)).long().clamp_(max=v) - 1
            indices = torch.randperm(v, generator=generator)[rank]
        else:
            indices = torch.randint(v, (n,), generator=generator)
            if distribution == "sorted":
                indices = indices.sort().values
            elif distribution == "half_on_one_row":
                indices[::2] = v // 2
        return indices.to(device=device, dtype=dtype)

    return make


@pytest.fixture(scope="session")
def make_grad():
    """(shape, dtype, device, integers=False) -> a gradient. Small integers have exact sums in float32, in any order."""

    def make(shape, dtype=torch.float32, device="cpu", integers=False):
        generator = torch.Generator().manual_seed(11)
        if integers:
            grad = torch.randint(-8, 9, shape, generator=generator)
        else:
            grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        return grad.to(device=device, dtype=dtype)

    return make


@pytest.fixture(scope="session")
def reference_backward():
    """The gradient of an embedding in float64, on the device of ``grad_output``."""

    def backward(grad_output, indices, num_embeddings, padding_idx=-1):
        columns = grad_output.shape[-1]
        grad = grad_output.detach().double().reshape(indices.numel(), columns)
        rows = indices.detach().long().reshape(-1)
        keep = rows != padding_idx
        return grad.new_zeros(num_embeddings, columns).index_add_(0, rows[keep], grad[keep])

    return backward


@pytest.fixture(scope="session")
def poison():
    """Leaves NaN in the memory that the next tensors of this size reuse, so that an element never written shows."""

    def fill(numel, dtype, device):
        blocks = [torch.full((numel,), float("nan"), dtype=dtype, device=device) for _ in range(3)]
        del blocks

    return fill


@pytest.fixture
def logged():
    """A subclass of Tensor whose `seen` lists the functions that were called on it."""

    class Logged(torch.Tensor):
        seen: ClassVar[list] = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    return Logged
