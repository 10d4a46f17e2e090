"""sparse=True: the coalesced gradient against float64 and against torch's own, and what uses it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fast_embedding import FastEmbedding, enable, functional

SIZES = [(1, 300), (7, 2000), (100, 3000), (20_000, 700), (50_000, 40_000)]


def gradient(indices, grad_output, num_embeddings, padding_idx=None):
    """The gradient of a weight without values of its own, as torch.autograd.grad returns it."""
    weight = torch.zeros(num_embeddings, grad_output.shape[-1], dtype=grad_output.dtype, device=grad_output.device)
    output = functional.embedding(indices, weight.requires_grad_(), padding_idx, sparse=True)
    return torch.autograd.grad(output, weight, grad_output)[0]


def assert_coalesced(grad, indices, padding_idx=None):
    assert grad.is_sparse
    assert grad.is_coalesced()
    rows = indices.long().unique()
    assert torch.equal(grad.indices()[0], rows[rows != (-1 if padding_idx is None else padding_idx)])


def assert_exact(grad, grad_output, indices, num_embeddings, reference, padding_idx=None):
    """For integer gradients: float32 sums have no rounding, so that one rounding at the end is all that is right."""
    assert_coalesced(grad, indices, padding_idx)
    expected = reference(grad_output, indices, num_embeddings, -1 if padding_idx is None else padding_idx)
    assert grad.shape == expected.shape
    assert grad.dtype == grad_output.dtype
    assert grad.values().is_contiguous()
    assert torch.equal(grad.values(), expected[grad.indices()[0]].to(grad.dtype))


@pytest.mark.parametrize("num_embeddings, n", SIZES)
def test_exact_sums_rounded_once(
    device, dtype, index_dtype, distribution, num_embeddings, n, make_indices, make_grad, reference_backward, poison
):
    indices = make_indices(distribution, num_embeddings, n, index_dtype, device)
    for dim, padding_idx in ((3, None), (32, num_embeddings // 2)):
        grad_output = make_grad((indices.numel(), dim), dtype, device, integers=True)
        poison(n * dim, dtype, device)
        grad = gradient(indices, grad_output, num_embeddings, padding_idx)
        assert_exact(grad, grad_output, indices, num_embeddings, reference_backward, padding_idx)


@pytest.mark.parametrize("num_embeddings, n", SIZES)
def test_error_is_not_above_atens(device, dtype, distribution, num_embeddings, n, make_indices, make_grad):
    indices = make_indices(distribution, num_embeddings, n, device=device)
    grad_output = make_grad((indices.numel(), 16), dtype, device)
    ours = gradient(indices, grad_output, num_embeddings).to_dense().double()
    # The dense one: what coalesces torch's sparse gradient adds in an order of its own, with its own luck in it.
    aten, exact = (
        torch.ops.aten.embedding_dense_backward(x, indices, num_embeddings, -1, False).double()
        for x in (grad_output, grad_output.double())
    )
    norm = torch.linalg.vector_norm
    if dtype != torch.float64:  # the reference itself
        assert norm(ours - exact) <= norm(aten - exact) + torch.finfo(dtype).eps * norm(exact)
    magnitude = torch.ops.aten.embedding_dense_backward(grad_output.double().abs(), indices, num_embeddings, -1, False)
    assert ((ours - exact).abs() <= 4 * torch.finfo(dtype).eps * magnitude).all()


@pytest.mark.parametrize("indices", [[], [4], [4, 4, 4], [[2, 1], [2, 0]]], ids=str)
@pytest.mark.parametrize("num_embeddings", [1, 5])
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize("dim", [0, 1, 8])
def test_small_and_empty(device, index_dtype, indices, num_embeddings, padding_idx, dim):
    indices = torch.tensor(indices, dtype=index_dtype, device=device).clamp(max=num_embeddings - 1)
    grad_output = torch.randint(-8, 9, (*indices.shape, dim), device=device).float()
    grad = gradient(indices, grad_output, num_embeddings, padding_idx)
    weight = torch.zeros(num_embeddings, dim, device=device, requires_grad=True)
    expected = torch.autograd.grad(F.embedding(indices, weight, padding_idx, sparse=True), weight, grad_output)[0]
    assert grad.is_coalesced()
    expected = expected.coalesce()
    assert torch.equal(grad.indices(), expected.indices())
    assert torch.equal(grad.values(), expected.values())
    assert grad.indices().dtype == torch.int64


@pytest.mark.parametrize("n, num_embeddings, padding_idx", [(0, 50, 3), (1, 50, None), (900, 1, None), (900, 1, 0)])
def test_no_synchronisation_where_the_shape_tells(cuda, n, num_embeddings, padding_idx):
    indices = torch.zeros(n, dtype=torch.long, device=cuda)
    layer = FastEmbedding(num_embeddings, 8, padding_idx, sparse=True, device=cuda)
    layer(indices).sum().backward()
    layer.weight.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(indices).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.weight.grad.is_coalesced()


def test_captured_in_a_graph_it_is_torchs_own(cuda):
    weight = torch.randn(50, 8, device=cuda, requires_grad=True)
    indices = torch.randint(50, (2000,), device=cuda)

    def step():
        output = functional.embedding(indices, weight, sparse=True)
        return torch.autograd.grad(output, weight, torch.ones_like(output))[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = step()
    indices.copy_(torch.randint(50, (2000,), device=cuda))
    graph.replay()
    assert not grad.is_coalesced()
    expected = torch.bincount(indices, minlength=50).unsqueeze(1).expand(50, 8).float()
    assert torch.equal(grad.to_dense(), expected)


@pytest.fixture
def layers(device):
    ours = FastEmbedding(500, 12, padding_idx=3, sparse=True, device=device)
    theirs = nn.Embedding(500, 12, padding_idx=3, sparse=True, device=device)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("n", [10, 3000])
def test_the_weights_gradient_is_coalesced(device, layers, n):
    """AccumulateGrad drops the mark of the tensor that it takes."""
    indices = torch.randint(500, (n,), device=device)
    layer, _ = layers
    for _ in range(3):
        layer.weight.grad = None
        layer(indices).square().sum().backward()
        assert_coalesced(layer.weight.grad, indices, 3)


def test_gradients_that_are_not_coalesced_are_not_marked(device, layers):
    """What accumulates, what a hook or another lookup adds to: a row may be there twice."""
    layer, reference = (layer.double() for layer in layers)
    indices = torch.randint(500, (3000,), device=device)

    def train(layer, twice):
        output = layer(indices)
        if twice:
            output = output + layer(indices.flip(0))
        output.square().sum().backward()

    for twice in (False, True, False):
        train(layer, twice)
        train(reference, twice)
        grad = layer.weight.grad
        if grad.is_coalesced():
            assert grad.indices()[0].unique().numel() == grad._nnz()
        torch.testing.assert_close(grad.to_dense(), reference.weight.grad.to_dense())
    layer.weight.grad = None
    layer.weight.register_hook(lambda grad: torch.sparse_coo_tensor(
        torch.cat([grad._indices(), grad._indices()], 1), torch.cat([grad._values(), grad._values()]), grad.shape
    ))  # fmt: skip
    train(layer, False)
    assert not layer.weight.grad.is_coalesced()


def test_a_gradient_that_someone_holds_is_left_alone(device, layers):
    """DDP's exchange reads it in another thread, in which a mark that comes meanwhile is an internal error of torch."""
    layer, _ = layers
    held = []
    layer.weight.register_post_accumulate_grad_hook(lambda weight: held.append(weight.grad))
    layer(torch.randint(500, (3000,), device=device)).sum().backward()
    assert held[0] is layer.weight.grad
    assert not held[0].is_coalesced()


def test_hooks_see_the_coalesced_gradient(device, layers):
    layer, _ = layers
    indices = torch.randint(500, (3000,), device=device)
    seen = []
    layer.weight.register_hook(lambda grad: seen.append(grad.is_coalesced()) or grad * 2)
    layer(indices).sum().backward()
    once = layer.weight.grad.clone()
    assert seen == [True]
    expected = 2.0 * torch.bincount(indices, minlength=500).index_fill(0, torch.tensor([3], device=device), 0)
    assert torch.equal(once.to_dense()[:, 0], expected)


def test_a_weight_that_is_no_leaf(device):
    indices = torch.randint(50, (3000,), device=device)
    weight = torch.randn(50, 4, device=device, requires_grad=True)
    functional.embedding(indices, weight * 2, sparse=True).sum().backward()
    expected = 2.0 * torch.bincount(indices, minlength=50)
    assert torch.equal(weight.grad.to_dense()[:, 0], expected)


OPTIMIZERS = {
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.125),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_the_same_steps(device, layers, name, make_indices):
    optimizers = [OPTIMIZERS[name](layer.parameters()) for layer in layers]
    for layer in layers:
        nn.init.zeros_(layer.weight)  # SGD adds what is not coalesced term by term; here that is exact
    for distribution in ("uniform", "one_row", "zipf"):
        indices = make_indices(distribution, 500, 3000, device=device)
        for layer, optimizer in zip(layers, optimizers, strict=True):
            optimizer.zero_grad()
            output = layer(indices)
            # Integers: the order of their sum does not matter.
            (output * torch.arange(output.numel(), device=device).view_as(output).remainder(9).sub(4)).sum().backward()
            optimizer.step()
    ours, theirs = (layer.weight.detach() for layer in layers)
    torch.testing.assert_close(ours, theirs)
    assert ours.any()


def test_the_same_bits_in_every_run(device, dtype, make_indices, make_grad):
    threads = torch.get_num_threads()
    try:
        for distribution in ("zipf", "one_row"):
            indices = make_indices(distribution, 30_000, 40_000, device=device)
            grad_output = make_grad((40_000, 20), dtype, device)
            first = gradient(indices, grad_output, 30_000).values()
            for count in (1, 2, threads):
                torch.set_num_threads(count)
                assert torch.equal(gradient(indices, grad_output, 30_000).values(), first)
    finally:
        torch.set_num_threads(threads)


def test_memory_beyond_the_gradient(cuda):
    """No buffer as large as the incoming gradient."""
    indices = torch.randint(1000, (1 << 20,), device=cuda)
    weight = torch.zeros(1000, 128, device=cuda, requires_grad=True)
    output = functional.embedding(indices, weight, sparse=True)
    grad_output = torch.randn_like(output)
    torch.autograd.grad(output, weight, grad_output, retain_graph=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(output, weight, grad_output)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 16 * indices.numel() + grad_output.nbytes // 10 + (8 << 20)


def test_second_derivative_is_torchs(device):
    indices = torch.tensor([[0, 3, 3], [1, 4, 0]], device=device)
    results = []
    for embedding in (functional.embedding, F.embedding):
        torch.manual_seed(1)
        weight = torch.randn(5, 3, dtype=torch.float64, device=device, requires_grad=True)
        output = embedding(indices, weight, 3, sparse=True)
        (grad,) = torch.autograd.grad(output.pow(3).sum(), weight, create_graph=True)
        assert grad.is_sparse
        assert grad.requires_grad
        (second,) = torch.autograd.grad(grad.to_dense().square().sum(), weight)
        results.append(second.to_dense())
    torch.testing.assert_close(*results)


def test_with_frequencies_it_is_torchs_error(device):
    weight = torch.randn(5, 3, device=device, requires_grad=True)
    for embedding in (functional.embedding, F.embedding):
        output = embedding(
            torch.zeros(300, dtype=torch.long, device=device), weight, sparse=True, scale_grad_by_freq=True
        )
        with pytest.raises(RuntimeError, match="scale_grad_by_freq not supported with sparse"):
            output.sum().backward()


def test_compiled_it_is_torchs_own(device):
    layer = FastEmbedding(50, 8, sparse=True, device=device)
    indices = torch.randint(50, (3000,), device=device)
    torch._dynamo.reset()
    torch.compile(layer, backend="aot_eager", dynamic=False)(indices).sum().backward()
    expected = torch.bincount(indices, minlength=50).unsqueeze(1).expand(50, 8).float()
    assert torch.equal(layer.weight.grad.to_dense(), expected)


def test_every_lookup_of_the_process(device):
    layer = nn.Embedding(500, 8, 3, sparse=True, device=device)
    indices = torch.randint(500, (3000,), device=device)
    with enable():
        layer(indices).sum().backward()
    assert_coalesced(layer.weight.grad, indices, 3)
    layer.weight.grad = None
    layer(indices).sum().backward()
    assert not layer.weight.grad.is_coalesced()


def test_out_of_range_is_an_index_error(device):
    if device.type != "cpu":
        pytest.skip("a device assertion there")
    layer = FastEmbedding(5, 3, sparse=True)
    with pytest.raises(IndexError, match=r"indices\[1\] = 5 is out of range"):
        layer(torch.tensor([0, 5]))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_shape(reference_backward, data):
    """Random shapes, strides, offsets and padding on the CPU, and on the GPU where there is one."""
    draw = data.draw
    num_embeddings = draw(st.integers(1, 300), label="num_embeddings")
    dim = draw(st.integers(1, 70), label="dim")
    n = draw(st.integers(0, 400), label="n")
    offset = draw(st.integers(0, 9), label="offset")
    gap = draw(st.integers(0, 3), label="gap")
    padding_idx = draw(st.none() | st.integers(0, num_embeddings - 1), label="padding_idx")
    high = draw(st.integers(1, num_embeddings), label="rows used")
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]), label="dtype")
    index_dtype = draw(st.sampled_from([torch.int32, torch.int64]), label="index_dtype")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        indices = torch.randint(high, (n,), dtype=index_dtype, device=device)
        storage = torch.randint(-8, 9, (offset + n * (dim + gap),), device=device).to(dtype)
        grad_output = storage[offset:].view(n, dim + gap)[:, :dim]
        grad = gradient(indices, grad_output, num_embeddings, padding_idx)
        assert_exact(grad, grad_output, indices, num_embeddings, reference_backward, padding_idx)
