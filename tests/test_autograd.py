"""Derivatives: first, second and forward-mode, under every way torch offers to ask for them."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from fast_embedding import FastEmbedding, FastMultiEmbedding, functional

# num_embeddings, embedding_dims, weight_offsets, padding_idx, sum; in a weight of 64 elements
MANY_TABLES = {
    "concat": ([4, 3, 5], [2, 5, 1], [0, 8, 24], [1, -1, 4], False),
    "shared": ([5, 4, 5], [2, 5, 2], [8, 24, 8], [4, -1, 4], False),
    "sum": ([4, 3, 5], [2, 2, 2], [0, 8, 16], [1, -1, 4], True),
    "shared sum": ([5, 3, 5], [2, 2, 2], [8, 0, 8], [4, -1, 4], True),
}


@pytest.fixture
def indices(device):
    return torch.tensor([[0, 3, 3], [1, 4, 0]], device=device)


@pytest.fixture(params=MANY_TABLES)
def many_tables(request):
    return MANY_TABLES[request.param]


@pytest.fixture
def many_indices(device):
    return torch.tensor([[0, 1, 4], [1, 2, 3], [3, 0, 0], [1, 1, 4]], device=device)


def double(*shape, device):
    return torch.randn(*shape, device=device, dtype=torch.float64, requires_grad=True)


def test_gradcheck_of_embedding(op, device, indices):
    weight = double(5, 3, device=device)
    assert gradcheck(lambda w: op.embedding(w, indices), weight)
    assert gradgradcheck(lambda w: op.embedding(w, indices), weight)
    # With padding the gradient is not the derivative, by definition; the map from it to the weight's is still linear.
    grad_output = double(2, 3, 3, device=device)
    assert gradcheck(lambda g: op.embedding_backward(g, indices, 5, 3), grad_output)
    assert gradgradcheck(lambda g: op.embedding_backward(g, indices, 5, 3), grad_output)


def without_padding(tables):
    return (*tables[:3], [-1, -1, -1], tables[4])


def test_gradcheck_of_multi_embedding(op, device, many_indices, many_tables):
    weight = double(64, device=device)
    no_padding = without_padding(many_tables)
    assert gradcheck(lambda w: op.multi_embedding(w, many_indices, *no_padding), weight)
    assert gradgradcheck(lambda w: op.multi_embedding(w, many_indices, *no_padding), weight)
    grad_output = double(4, 2 if many_tables[4] else sum(many_tables[1]), device=device)
    assert gradcheck(lambda g: op.multi_embedding_backward(g, many_indices, 64, *many_tables), grad_output)
    assert gradgradcheck(lambda g: op.multi_embedding_backward(g, many_indices, 64, *many_tables), grad_output)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("padding_idx", [-1, 3])
def test_second_derivative_equals_atens(op, device, indices, padding_idx, scaled):
    def derivatives(lookup):
        torch.manual_seed(0)
        weight = double(5, 3, device=device)
        (first,) = torch.autograd.grad(lookup(weight).pow(3).sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), weight, create_graph=True)
        (third,) = torch.autograd.grad(second.pow(2).sum(), weight)
        return first, second, third

    ours = derivatives(lambda weight: op.embedding(weight, indices, padding_idx, scaled))
    aten = derivatives(lambda weight: torch.embedding(weight, indices, padding_idx, scaled))
    torch.testing.assert_close(ours, aten)


def test_second_derivative_of_many_tables_equals_atens(op, device, many_indices, many_tables):
    def derivatives(lookup):
        torch.manual_seed(0)
        weight = double(64, device=device)
        (first,) = torch.autograd.grad(lookup(weight).pow(3).sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), weight)
        return first, second

    def composed(weight):
        rows = [
            torch.embedding(weight[o : o + v * d].view(v, d), many_indices[:, t], p)
            for t, (v, d, o, p) in enumerate(zip(*many_tables[:4], strict=True))
        ]
        return torch.stack(rows).sum(0) if many_tables[4] else torch.cat(rows, -1)

    torch.testing.assert_close(
        derivatives(lambda weight: op.multi_embedding(weight, many_indices, *many_tables)), derivatives(composed)
    )


def test_func_transforms_equal_atens(op, device, indices):
    weight = torch.randn(5, 3, device=device)
    ours = lambda w: op.embedding(w, indices, 3)  # noqa: E731
    aten = lambda w: torch.embedding(w, indices, 3)  # noqa: E731
    for transform in (
        lambda f: torch.func.grad(lambda w: f(w).pow(3).sum())(weight),
        lambda f: torch.func.grad(lambda w: torch.func.grad(lambda v: f(v).pow(3).sum())(w).pow(2).sum())(weight),
        lambda f: torch.func.jvp(f, (weight,), (torch.ones_like(weight),)),
        lambda f: torch.func.jacrev(f)(weight),
        lambda f: torch.func.jacfwd(f)(weight),
        lambda f: torch.func.vmap(f)(weight.expand(4, 5, 3) * 2),
        lambda f: torch.func.vmap(torch.func.grad(lambda w: f(w).pow(2).sum()))(weight.expand(4, 5, 3) * 2),
    ):
        torch.testing.assert_close(transform(ours), transform(aten))


def test_vmap_over_indices(op, device, indices):
    weight = torch.randn(5, 3, device=device)
    assert torch.equal(torch.func.vmap(lambda i: op.embedding(weight, i))(indices), weight[indices])
    expected = torch.stack([op.embedding_backward(weight[i], i, 5, 3) for i in indices])
    mapped = torch.func.vmap(lambda i: op.embedding_backward(weight[i], i, 5, 3))(indices)
    torch.testing.assert_close(mapped, expected)


def test_func_transforms_of_many_tables(op, device, many_indices, many_tables):
    weight = torch.randn(64, device=device)
    no_padding = without_padding(many_tables)
    lookup = lambda w: op.multi_embedding(w, many_indices, *no_padding)  # noqa: E731
    expected = torch.autograd.functional.jacobian(lookup, weight)
    torch.testing.assert_close(torch.func.jacrev(lookup)(weight), expected)
    torch.testing.assert_close(torch.func.jacfwd(lookup)(weight), expected)
    stacked = torch.randn(3, 64, device=device)
    torch.testing.assert_close(torch.func.vmap(lookup)(stacked), torch.stack([lookup(w) for w in stacked]))
    grad_output = torch.randn(3, *lookup(weight).shape, device=device)
    backward = lambda g: op.multi_embedding_backward(g, many_indices, 64, *many_tables)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(backward)(grad_output), torch.stack([backward(g) for g in grad_output]))


def test_func_transforms_of_the_layer(device, many_indices):
    """The eager form of the operator, under every transform."""
    layer = FastMultiEmbedding([5, 4], [2, 2], table_of_column=[0, 1, 0], mode="sum", device=device)
    call = lambda w: torch.func.functional_call(layer, {"weight": w}, many_indices)  # noqa: E731
    weight = layer.weight.detach()
    expected = torch.autograd.functional.jacobian(call, weight)
    torch.testing.assert_close(torch.func.jacrev(call)(weight), expected)
    torch.testing.assert_close(torch.func.jacfwd(call)(weight), expected)
    stacked = torch.randn(3, len(weight), device=device)
    torch.testing.assert_close(torch.func.vmap(call)(stacked), torch.stack([call(w) for w in stacked]))


def test_forward_mode(op, device, indices):
    weight, tangent = torch.randn(2, 5, 3, device=device)
    with forward_ad.dual_level():
        output = forward_ad.unpack_dual(op.embedding(forward_ad.make_dual(weight, tangent), indices))
    assert torch.equal(output.primal, weight[indices])
    assert torch.equal(output.tangent, tangent[indices])


@pytest.fixture(params=["FastEmbedding", "FastMultiEmbedding"])
def layer_and_input(request, device):
    """A layer and an input large enough not to be left to ATen."""
    if request.param == "FastEmbedding":
        return FastEmbedding(50, 8, device=device), torch.randint(50, (600,), device=device)
    layer = FastMultiEmbedding([50, 20], [8, 3], device=device)
    return layer, torch.randint(20, (600, 2), device=device)


def test_graph_is_kept_on_request_only(layer_and_input):
    layer, x = layer_and_input
    loss = layer(x).sum()
    loss.backward(retain_graph=True)
    first = layer.weight.grad.clone()
    loss.backward()
    assert torch.equal(layer.weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_no_graph_without_need(layer_and_input):
    layer, x = layer_and_input
    assert layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).is_inference()
        inference_input = x.clone()
    layer.weight.requires_grad_(False)
    assert layer(x).grad_fn is None
    assert torch.equal(layer(inference_input), layer(x))


def test_inference_parameters(layer_and_input):
    layer, x = layer_and_input
    expected = layer(x)
    with torch.inference_mode():
        layer = copy.deepcopy(layer)
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)


def test_hooks_run_and_may_change_the_gradient(layer_and_input):
    layer, x = layer_and_input
    layer(x).sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    calls = []
    layer.register_full_backward_hook(lambda *_: calls.append("module"))
    layer.weight.register_hook(lambda grad: calls.append("parameter") or 2 * grad)
    layer.weight.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    output = layer(x)
    output.register_hook(lambda grad: calls.append("output"))
    output.sum().backward()
    assert sorted(calls) == ["accumulated", "module", "output", "parameter"]
    assert torch.equal(layer.weight.grad, 2 * expected)


def test_indices_changed_before_the_backward_are_noticed(layer_and_input):
    layer, x = layer_and_input
    loss = layer(x).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weight_changed_before_the_backward_is_fine(layer_and_input):
    layer, x = layer_and_input
    loss = layer(x).sum()
    with torch.no_grad():
        layer.weight.zero_()
    loss.backward()
    assert layer.weight.grad.sum() > 0


def test_weight_that_is_no_leaf(device):
    """Weight normalisation and other parametrisations hand the lookup a computed weight."""
    x = torch.randint(20, (500,), device=device)
    gradients = []
    for lookup in (functional.embedding, F.embedding):
        torch.manual_seed(0)
        base = torch.randn(20, 6, device=device, requires_grad=True)
        lookup(x, base / base.norm(dim=1, keepdim=True)).pow(3).sum().backward()
        gradients.append(base.grad)
    torch.testing.assert_close(*gradients)


def test_two_lookups_accumulate(layer_and_input):
    layer, x = layer_and_input
    (layer(x).sum() + layer(x.flip(0)).sum()).backward()
    twice, layer.weight.grad = layer.weight.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(twice, 2 * layer.weight.grad)


def test_checkpointing(layer_and_input):
    from torch.utils.checkpoint import checkpoint

    layer, x = layer_and_input
    layer(x).pow(2).sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    checkpoint(layer, x, use_reentrant=False).pow(2).sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)


def test_threads_do_not_disturb_each_other(device):
    def gradient(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(100, (3000,), generator=generator).to(device)
        weight = torch.ones(100, 16, device=device, requires_grad=True)
        functional.embedding(x, weight).sum().backward()
        return weight.grad

    expected = [gradient(seed) for seed in range(8)]
    results = [None] * 8

    def work(seed):
        for _ in range(20):
            results[seed] = gradient(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


def test_autocast_never_casts(layer_and_input):
    layer, x = layer_and_input
    with torch.autocast(x.device.type, torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.float32
    output.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
