"""What exists on a GPU alone: device assertions, CUDA graphs, streams, the absence of synchronisation, size."""

import subprocess
import sys

import pytest
import torch

from fast_embedding import FastEmbedding, FastMultiEmbedding, functional

# (num_embeddings, dim, n): shared memory, tile and sort, see test_embedding_backward.GPU_SIZES.
SIZES = [(10, 4, 100_000), (5000, 32, 30_000), (500_000, 16, 100_000)]


@pytest.fixture(params=["FastEmbedding", "FastMultiEmbedding", "FastMultiEmbedding sum", "FastMultiEmbedding shared"])
def layer(request, cuda):
    """With integers for weights: their gradients in step() have exact sums, the same in any order."""
    if request.param == "FastEmbedding":
        layer = FastEmbedding(5000, 32, padding_idx=7, device=cuda)
    elif request.param == "FastMultiEmbedding":
        layer = FastMultiEmbedding([5000, 60, 300], [16, 5, 8], padding_idx=[None, 0, None], device=cuda)
    elif request.param == "FastMultiEmbedding sum":
        layer = FastMultiEmbedding([5000, 60, 300], [7, 7, 7], padding_idx=[None, 0, None], mode="sum", device=cuda)
    else:
        layer = FastMultiEmbedding([5000, 60], [16, 5], table_of_column=[0, 1, 0], device=cuda)
    with torch.no_grad():
        layer.weight.round_()
    return layer


def new_input(layer, n):
    columns = 3 if isinstance(layer, FastMultiEmbedding) else 1
    return torch.randint(60, (n, columns), device="cuda").squeeze(-1)


def step(layer, x):
    output = layer(x)
    (gradient,) = torch.autograd.grad(output.square().sum(), layer.weight)
    return output, gradient


PROGRAM = """
import torch
from fast_embedding import functional
x = torch.zeros(3000, {columns}, dtype=torch.long, device="cuda")
x[7, -1] = 12345
weight = torch.zeros({shape}, device="cuda", requires_grad=True)
try:
    output = {lookup}
    torch.cuda.synchronize()
except RuntimeError as error:
    print("RuntimeError:", error)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        {"columns": 1, "shape": (50, 4), "lookup": "functional.embedding(x, weight)"},
        {"columns": 2, "shape": (32,), "lookup": "functional.multi_embedding(x, weight, [3, 5], [5, 2])"},
        {"columns": 2, "shape": (32,), "lookup": "functional.multi_embedding(x, weight, [3, 5], [3, 3], mode='sum')"},
    ],
    ids=["embedding", "multi_embedding", "sum"],
)
def test_out_of_range_is_a_device_assertion_that_names_index_and_size(cuda, arguments):
    """In a process of its own: an assertion ends the CUDA context."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(**arguments)], capture_output=True, text=True, timeout=300
    )
    text = result.stdout + result.stderr
    assert "RuntimeError: " in result.stdout, text
    assert "assert" in result.stdout, text
    assert "12345" in text
    assert ("50" if arguments["columns"] == 1 else "5 ") in text


def test_out_of_range_raises_with_checks_on(cuda):
    x = torch.zeros(300, 2, dtype=torch.long, device=cuda)
    x[8, 1] = 50
    with pytest.raises(IndexError, match=r"indices\[8, 1\] = 50 is out of range for an embedding of 50 rows"):
        functional.embedding(x, torch.randn(50, 4, device=cuda), check_indices=True)
    with pytest.raises(IndexError, match=r"indices\[8, 1\] = 50 is out of range for table 1 of 5 rows"):
        functional.multi_embedding(x, torch.randn(32, device=cuda), [3, 5], [5, 2], check_indices=True)
    assert torch.ones(3, device=cuda).sum() == 3  # the context is still alive


def test_cuda_graph_replays_with_new_indices(layer, deterministic):
    x = new_input(layer, 20_000)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(layer, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(layer, x)
    for _ in range(3):
        x.copy_(new_input(layer, 20_000))
        graph.replay()
        torch.testing.assert_close(results, step(layer, x), rtol=0, atol=0)


def test_cuda_graph_of_a_large_gradient(cuda):
    """Its zeros are written beside the sort: three launches, each of which begins while the one before runs."""
    weight = torch.randn(300_000, 64, device=cuda, requires_grad=True)
    x = torch.randint(300_000, (5000,), device=cuda)
    grad_output = torch.randn(5000, 64, device=cuda)

    def gradient():
        return torch.autograd.grad(functional.embedding(x, weight), weight, grad_output)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradient()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradient()
    for _ in range(3):
        x.copy_(torch.randint(300_000, (5000,), device=cuda))
        captured.fill_(torch.nan)
        graph.replay()
        expected = torch.zeros(300_000, 64, dtype=torch.float64, device=cuda).index_add_(0, x, grad_output.double())
        torch.testing.assert_close(captured.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(captured, gradient())


def test_checks_are_skipped_while_capturing(layer):
    x = new_input(layer, 1000)
    weight = torch.randn(60, 4, device="cuda")
    functional.embedding(x, weight, check_indices=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = functional.embedding(x, weight, check_indices=True)
    graph.replay()
    assert torch.equal(output, weight[x])


def test_side_streams(layer):
    """Queued behind slow work of their own stream; a launch on another stream would see the old indices."""
    inputs = [new_input(layer, 20_000) for _ in range(4)]
    expected = [step(layer, x) for x in inputs]
    buffers = [torch.zeros_like(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results = []
    for stream, buffer, x in zip(streams, buffers, inputs, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            buffer.copy_(x)
            results.append(step(layer, buffer))
    torch.cuda.synchronize()
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=0)


def test_nothing_synchronises(layer, deterministic):
    x = new_input(layer, 20_000)
    step(layer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_embeddings, dim, n", SIZES)
def test_the_same_bits_in_every_run(op, cuda, dtype, num_embeddings, dim, n, make_indices, make_grad):
    """Beside other work on the GPU, which changes the order in which blocks run."""
    indices = make_indices("zipf", num_embeddings, n, device=cuda)
    grad_output = make_grad((n, dim), dtype, cuda)
    noise = torch.randn(2048, 2048, device=cuda)
    side = torch.cuda.Stream()
    torch.use_deterministic_algorithms(True)
    try:
        first = op.embedding_backward(grad_output, indices, num_embeddings)
        for _ in range(3):
            with torch.cuda.stream(side):
                noise @ noise
            assert torch.equal(op.embedding_backward(grad_output, indices, num_embeddings), first)
    finally:
        torch.use_deterministic_algorithms(False)


def test_second_device(layer):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = new_input(layer, 5000)
    expected = step(layer, x)
    torch.testing.assert_close(step(layer.to("cuda:1"), x.to("cuda:1")), [t.to("cuda:1") for t in expected])


def test_tensors_on_two_devices_are_refused(cuda):
    x, weight = torch.zeros(5000, dtype=torch.long), torch.zeros(20, 4)
    for arguments in ((x, weight.to(cuda)), (x.to(cuda), weight)):
        with pytest.raises(RuntimeError, match="device"):
            functional.embedding(*arguments)


def test_autocast_and_grad_scaler(layer):
    x = new_input(layer, 5000)
    scaler = torch.amp.GradScaler("cuda")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.autocast("cuda", torch.float16):
        loss = layer(x).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert layer.weight.isfinite().all()


@pytest.mark.large
@pytest.mark.parametrize("num_embeddings, dim, n", [(1000, 64, (1 << 25) + 3000), (1 << 26, 40, 5000)])
def test_more_than_2_31_elements(op, cuda, num_embeddings, dim, n):
    """An output, or a table and its gradient, of more elements than an int32 counts."""
    needed = 2 * (num_embeddings + 3 * n) * dim * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GB of GPU memory")
    weight = torch.arange(num_embeddings, device=cuda).remainder_(512).to(torch.float16)[:, None].repeat(1, dim)
    indices = torch.arange(n, device=cuda).mul_(max(1, num_embeddings // n)).remainder_(num_embeddings)
    output = op.embedding(weight, indices)
    rows = torch.tensor([0, n // 2, n - 1], device=cuda)
    assert torch.equal(output[rows], weight[indices[rows]])
    assert torch.equal(output[:, 0], weight[:, 0][indices])
    assert torch.equal(output[:, -1], output[:, 0])
    del weight
    gradient = op.embedding_backward(output.fill_(1), indices, num_embeddings)
    counts = torch.bincount(indices, minlength=num_embeddings).to(torch.float16)
    assert torch.equal(gradient[:, 0], counts)
    assert torch.equal(gradient[:, -1], counts)
