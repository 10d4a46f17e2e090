"""torch.compile, torch.export and the checks that torch has for custom operators."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

from fast_embedding import FastEmbedding, FastMultiEmbedding, functional
from fast_embedding.layout import TableLayout

LAYOUT = TableLayout([10, 4, 6], [3, 2, 8])
TABLES = (list(LAYOUT.num_embeddings), list(LAYOUT.embedding_dims), list(LAYOUT.offsets), [-1, 1, 5])


@pytest.fixture(autouse=True)
def forget_compilations():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["FastEmbedding", "FastMultiEmbedding", "FastMultiEmbedding sum"])
def layer(request, device):
    if request.param == "FastEmbedding":
        return FastEmbedding(4, 3, padding_idx=1, device=device)
    if request.param == "FastMultiEmbedding":
        return FastMultiEmbedding([10, 4], [3, 2], padding_idx=[None, 1], device=device)
    return FastMultiEmbedding([10, 4], [3, 3], mode="sum", device=device)


def capturing_backend(graphs):
    def capture(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=capture, bw_compiler=capture)


def targets(graph):
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}


def check_against_eager(compiled, layer, x):
    expected = layer(x)
    weights = torch.arange(float(expected.numel()), device=x.device).view_as(expected) % 5
    (expected * weights).sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    output = compiled(x)
    (output * weights).sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(layer.weight.grad, gradient)
    layer.weight.grad = None


def test_one_graph_without_breaks(layer, device):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (3, 1000):
        check_against_eager(compiled, layer, torch.randint(4, (n, 2), device=device))


def test_forward_is_atens_and_backward_is_ours(op, device):
    """Inductor fuses aten.embedding into what follows; it has no backward as good as ours."""
    layer = FastEmbedding(40, 3, padding_idx=1, device=device)
    graphs = []
    compiled = torch.compile(layer, fullgraph=True, backend=capturing_backend(graphs))
    check_against_eager(compiled, layer, torch.randint(40, (1000,), device=device))
    forward, backward = graphs
    assert targets(forward) == {"aten.embedding.default"}
    assert "fast_embedding.embedding_backward.default" in targets(backward)
    assert not any("embedding_dense_backward" in target for target in targets(backward))


def test_many_tables_are_one_operation_each_way(op, device):
    layer = FastMultiEmbedding([40] * 12, [3] * 12, device=device)
    graphs = []
    compiled = torch.compile(layer, fullgraph=True, backend=capturing_backend(graphs))
    check_against_eager(compiled, layer, torch.randint(40, (100, 12), device=device))
    forward, backward = graphs
    assert "fast_embedding.multi_embedding.default" in targets(forward)
    assert "fast_embedding.multi_embedding_backward.default" in targets(backward)


def test_batch_sizes_do_not_recompile(layer, device):
    """On both sides of the size from which the CPU leaves a lookup to ATen, too."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for n in (50, 3, 300, 4000, 7):  # not first 2, which torch.compile would take for the number of columns
        x = torch.randint(4, (n, 2), device=device)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_functional_compiles(device):
    weight = torch.randn(LAYOUT.numel, device=device)

    def lookup(x, weight):
        many = functional.multi_embedding(x, weight, *TABLES[:2], padding_idx=[None, 1, -1], check_indices=True)
        return many, functional.embedding(x, weight[:30].view(10, 3), -1, check_indices=True)

    x = torch.randint(4, (500, 3), device=device)
    torch.testing.assert_close(torch.compile(lookup, fullgraph=True, backend="aot_eager")(x, weight), lookup(x, weight))


def test_inductor(device):
    if device.type == "cuda":
        pytest.importorskip("triton")
    layer = torch.nn.Sequential(FastEmbedding(50, 8, padding_idx=3), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    layer.to(device)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randint(50, (700,), device=device)
    gradients = []
    for candidate in (layer, compiled):
        layer.zero_grad()
        candidate(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_compiled_autograd(device):
    layer = FastEmbedding(50, 8, device=device)
    x = torch.randint(50, (700,), device=device)
    layer(x).square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_holds_torchs_operations_alone(layer, device, strict):
    x = torch.randint(4, (1000, 2), device=device)
    rows = torch.export.Dim("rows", min=2, max=100_000)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},), strict=strict)
    assert not any("fast_embedding" in target for target in targets(exported.graph_module))
    for n in (5, 3000):
        x = torch.randint(4, (n, 2), device=device)
        torch.testing.assert_close(exported.module()(x), layer(x))


def test_make_fx(op, device):
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randint(4, (1000,), device=device)
    traced = make_fx(lambda x, w: op.embedding(w, x))(x, torch.randn(4, 3, device=device))
    assert targets(traced) == {"aten.embedding.default"}


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(op, device, index_dtype, requires_grad):
    x = torch.randint(4, (6, 3), dtype=index_dtype, device=device)

    def floats(*shape):
        return torch.randn(*shape, device=device, requires_grad=requires_grad)

    for arguments in ((floats(7, 5), x), (floats(7, 5), x, 2)):
        torch.library.opcheck(op.embedding.default, arguments)
    torch.library.opcheck(op.embedding_backward.default, (floats(6, 3, 5), x, 7, 2))
    torch.library.opcheck(op.multi_embedding.default, (floats(LAYOUT.numel), x, *TABLES))
    torch.library.opcheck(op.multi_embedding_backward.default, (floats(6, 13), x, LAYOUT.numel, *TABLES))
