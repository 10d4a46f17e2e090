"""torch.compile, torch.export and the checks that torch has for custom operators."""

import collections
import contextlib
import re

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

from fast_embedding import FastEmbedding, FastMultiEmbedding, enable, functional
from fast_embedding.layout import Columns, TableLayout, output_columns

LAYOUT = TableLayout([10, 4, 6], [3, 2, 8])
TABLES = (list(LAYOUT.num_embeddings), list(LAYOUT.embedding_dims), list(LAYOUT.offsets), [-1, 1, 5])


@pytest.fixture(autouse=True)
def forget_compilations():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["FastEmbedding", "FastMultiEmbedding", "FastMultiEmbedding sum", "FastMultiEmbedding shared"])
def layer(request, device):
    if request.param == "FastEmbedding":
        return FastEmbedding(4, 3, padding_idx=1, device=device)
    if request.param == "FastMultiEmbedding":
        return FastMultiEmbedding([10, 4], [3, 2], padding_idx=[None, 1], device=device)
    if request.param == "FastMultiEmbedding shared":
        return FastMultiEmbedding([4], [3], table_of_column=[0, 0], padding_idx=2, device=device)
    return FastMultiEmbedding([10, 4], [3, 3], padding_idx=1, mode="sum", device=device)


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


@pytest.mark.parametrize(
    "mode, lookups", [("concat", {"aten.take.default": 1}), ("sum", {"aten.embedding.default": 12})]
)
def test_many_tables_are_torchs_lookups_forward_and_ours_backward(op, device, mode, lookups):
    layer = FastMultiEmbedding([40] * 12, [3] * 12, mode=mode, device=device)
    graphs = []
    compiled = torch.compile(layer, fullgraph=True, backend=capturing_backend(graphs))
    check_against_eager(compiled, layer, torch.randint(40, (100, 12), device=device))
    forward, backward = (
        collections.Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        for graph in graphs
    )
    assert {name: forward[name] for name in ("aten.take.default", "aten.embedding.default") if forward[name]} == lookups
    assert not any("fast_embedding" in target for target in forward)
    assert backward["fast_embedding.multi_embedding_backward.default"] == 1
    assert not any("embedding_dense_backward" in target for target in backward)


@pytest.mark.parametrize("bad", [-1, 4, 9])
@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_an_index_out_of_range_reads_no_neighbour(bad, mode):
    """All tables are one tensor: what is out of range in one of them is a place in the next."""
    layer = FastMultiEmbedding([4, 4, 4], [3, 3, 3], mode=mode)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.zeros(100, 3, dtype=torch.long)
    compiled(x)
    x[50, 1] = bad
    with torch.no_grad(), pytest.raises(IndexError, match="out of range"):
        compiled(x)


def test_batch_sizes_do_not_recompile(layer, device):
    """On both sides of the size from which the CPU leaves a lookup to ATen, too."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for n in (50, 3, 300, 4000, 7):  # not first 2, which torch.compile would take for the number of columns
        x = torch.randint(4, (n, 2), device=device)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_names_of_who_compiles_are_left_alone(layer, device):
    """Dynamo of torch 2.4 binds globals there, named as functions of ours."""
    names = {"layer": layer, **{name: object() for name in ("load", "ops", "functional", "embedding", "torch")}}
    exec("def step(x): return layer(x).sum()", names)
    before = dict(names)
    torch.compile(names["step"], fullgraph=True, backend="aot_eager")(torch.randint(4, (700, 2), device=device))
    assert {name: names[name] for name in before} == before


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


@pytest.mark.parametrize("way", ["FastEmbedding", "enable"])
def test_the_gather_fuses_with_what_follows(op, device, way):
    """One loop of Inductor's own for the lookup, the activation and the sum; our kernel would be a call of its own."""
    if device.type == "cuda":
        pytest.importorskip("triton")
    utils = pytest.importorskip("torch._inductor.utils")
    if not hasattr(utils, "run_fw_bw_and_get_code"):
        pytest.skip(f"torch {torch.__version__} does not show its generated code")
    layer = (FastEmbedding if way == "FastEmbedding" else torch.nn.Embedding)(50, 8, padding_idx=3, device=device)
    x = torch.randint(50, (700,), device=device)
    with enable() if way == "enable" else contextlib.nullcontext():
        compiled = torch.compile(lambda x: (layer(x).tanh() * 2 + 1).square().sum(-1), fullgraph=True)
        output, (forward, backward) = utils.run_fw_bw_and_get_code(lambda: compiled(x))
    torch.testing.assert_close(output, (layer(x).tanh() * 2 + 1).square().sum(-1))
    assert "embedding" in the_one_kernel(forward)
    assert "fast_embedding" not in forward
    assert "torch.ops.fast_embedding.embedding_backward.default" in backward


def the_one_kernel(code):
    names = set(re.findall(r"\b(?:cpp|triton)_\w*fused\w*", code))
    assert len(names) == 1, names
    return names.pop()


@pytest.mark.parametrize("mode, lookup", [("concat", "take"), ("sum", "embedding")])
@pytest.mark.parametrize("table_of_column", [None, [0, 1, 2, 0, 2, 1, 1, 0, 2]])
def test_many_lookups_fuse_into_one_kernel(op, device, mode, lookup, table_of_column):
    if device.type == "cuda":
        pytest.importorskip("triton")
    utils = pytest.importorskip("torch._inductor.utils")
    if not hasattr(utils, "run_fw_bw_and_get_code"):
        pytest.skip(f"torch {torch.__version__} does not show its generated code")
    tables = 9 if table_of_column is None else 3
    layer = FastMultiEmbedding(
        range(7, 7 + tables), [8] * tables, table_of_column=table_of_column, padding_idx=3, mode=mode, device=device
    )
    x = torch.randint(7, (700, 9), device=device)
    compiled = torch.compile(lambda x: (layer(x).tanh() * 2 + 1).square().sum(-1), fullgraph=True)
    output, (forward, backward) = utils.run_fw_bw_and_get_code(lambda: compiled(x))
    torch.testing.assert_close(output, (layer(x).tanh() * 2 + 1).square().sum(-1))
    assert lookup in the_one_kernel(forward)
    assert "fast_embedding" not in forward
    assert "torch.ops.fast_embedding.multi_embedding_backward.default" in backward


def test_compiled_concatenation_is_exact(device):
    if device.type == "cuda":
        pytest.importorskip("triton")
    layer = FastMultiEmbedding([10, 4, 6], [3, 2, 8], padding_idx=[None, 1, 5], device=device)
    compiled = torch.compile(layer, fullgraph=True)
    for dtype in (torch.int32, torch.int64):
        x = torch.randint(4, (700, 3), dtype=dtype, device=device)
        assert torch.equal(compiled(x), layer(x))


def test_reduce_overhead(device, layer):
    """CUDA graphs, taken and replayed by torch.compile."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs")
    pytest.importorskip("triton")
    model = torch.nn.Sequential(layer, torch.nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        x = torch.randint(4, (3000, 2), device=device)
        gradients = []
        for candidate in (model, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            layer.zero_grad()
            candidate(x).sum().backward()
            gradients.append(layer.weight.grad.clone())
        torch.testing.assert_close(*gradients)


def test_compiled_autograd(layer, device):
    x = torch.randint(4, (700, 2), device=device)
    layer(x).square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    compiled_autograd = torch._dynamo.compiled_autograd
    enable_it = getattr(compiled_autograd, "_enable", None) or compiled_autograd.enable  # its name up to torch 2.5
    with enable_it(torch.compile(backend="eager")):
        layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_holds_torchs_operations_alone(layer, device, strict):
    x = torch.randint(4, (1000, 2), device=device)
    rows = torch.export.Dim("rows", min=2, max=100_000)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},), strict=strict)
    holds_ours = any("fast_embedding" in target for target in targets(exported.graph_module))
    # Before torch 2.7 nothing tells a strict export from torch.compile.
    assert holds_ours == (strict and not hasattr(torch.compiler, "is_exporting"))
    for n in (5, 3000):
        x = torch.randint(4, (n, 2), device=device)
        torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.compat
@pytest.mark.parametrize("way", ["as it is", "enable"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Exporting a model while")
def test_onnx_export(layer, way):
    """The forward, with a batch of any size, run by onnxruntime. The file names torch's operations alone."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    if not hasattr(torch.onnx, "ONNXProgram"):
        pytest.skip(f"torch {torch.__version__} has no torch.onnx.export(dynamo=True)")
    x = torch.randint(4, (1000, 2), device=layer.weight.device)
    rows = torch.export.Dim("rows", min=2, max=100_000)
    with enable() if way == "enable" else contextlib.nullcontext():
        program = torch.onnx.export(
            layer, (x,), dynamo=True, dynamic_shapes=({0: rows},), input_names=["x"], verbose=False
        )
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for n in (5, 3000):
        x = torch.randint(4, (n, 2))
        (output,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), layer.cpu()(x).detach())


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
    torch.library.opcheck(op.embedding.options, (floats(7, 5), x, 2, True))
    torch.library.opcheck(op.embedding_backward.default, (floats(6, 3, 5), x, 7, 2))
    torch.library.opcheck(op.embedding_backward.default, (floats(6, 3, 5), x, 7, 2, True))
    torch.library.opcheck(op.multi_embedding.default, (floats(LAYOUT.numel), x, *TABLES))
    torch.library.opcheck(op.multi_embedding_backward.default, (floats(6, 13), x, LAYOUT.numel, *TABLES))
    columns = output_columns(Columns(LAYOUT, padding_idx=[None, 1, 5]).key, device)
    torch.library.opcheck(op.multi_embedding.default, (floats(LAYOUT.numel), x, *TABLES, False, columns))
    shared = ([10, 6, 6], [2, 2, 2], [0, 24, 24], [1, -1, -1])
    for arguments in ((*shared, False), (*shared, True)):
        width = 2 if arguments[-1] else 6
        torch.library.opcheck(op.multi_embedding.default, (floats(36), x, *arguments))
        torch.library.opcheck(op.multi_embedding_backward.default, (floats(6, width), x, 36, *arguments))
