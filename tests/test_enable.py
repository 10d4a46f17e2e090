"""fast_embedding.enable(): unmodified modules and functions on our kernels, and back."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from fast_embedding import _loader, enable, everywhere

TORCHS_EMBEDDING = F.embedding


@pytest.fixture(autouse=True)
def undone():
    """Each test leaves the process as it found it."""
    torch._dynamo.reset()
    yield
    assert F.embedding is TORCHS_EMBEDDING
    assert everywhere._count == 0
    torch._dynamo.reset()


def ran_ours(device, lookup=F.embedding):
    """Whether forward and backward of `lookup` ran our kernels, which must be both or neither."""
    x = torch.zeros(600, dtype=torch.long, device=device)
    weight = torch.ones(2, 8, dtype=torch.bfloat16, device=device, requires_grad=True)
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            lookup(x, weight).backward(torch.ones(600, 8, dtype=torch.bfloat16, device=device))
            torch.cuda.synchronize()
        kernels = [event.key for event in profile.key_averages() if "fast_embedding" in event.key]
        ours = [any("backward" in key for key in kernels), any("backward" not in key for key in kernels)]
    else:
        lookup(x, weight).sum().backward()
        # torch adds in bfloat16 on the CPU, where 256 + 1 = 256.
        backward = {600: True, 256: False}[weight.grad[0, 0].item()]
        with pytest.raises(IndexError) as caught:
            lookup(x.fill_(9), weight)
        ours = ["embedding of 2 rows" in str(caught.value), backward]
    assert len(set(ours)) == 1
    return ours[0]


@pytest.mark.parametrize(
    "lookup",
    [
        F.embedding,
        lambda x, weight: F.embedding(x, weight),
        lambda x, weight: torch.embedding(weight, x),
        lambda x, weight: torch.func.functional_call(nn.Embedding(2, 8), {"weight": weight}, x),
    ],
    ids=["F.embedding kept", "F.embedding", "torch.embedding", "nn.Embedding"],
)
def test_every_way_to_look_up(device, lookup):
    assert not ran_ours(device, lookup)
    with enable():
        assert ran_ours(device, lookup)
    assert not ran_ours(device, lookup)


def test_several_at_once(device):
    first = enable()
    assert ran_ours(device)
    with enable() as second:
        first.disable()
        first.disable()
        assert ran_ours(device)
    assert not ran_ours(device)
    second.disable()
    with enable():
        assert ran_ours(device)


def test_an_exception_ends_it(device):
    with pytest.raises(KeyError), enable():
        raise KeyError
    assert not ran_ours(device)


def step(device, dtype=torch.float32, index_dtype=torch.int64, n=(40, 5), **options):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(20, 6, generator=generator).to(device, dtype).requires_grad_()
    x = torch.randint(20, n, generator=generator).to(device, index_dtype)
    output = F.embedding(x, weight, **options)
    # Integers: the order of their sum does not matter.
    (output * torch.randint(-4, 5, output.shape, generator=generator).to(device)).sum().backward()
    return output.detach(), weight.grad, weight.detach()


@pytest.mark.parametrize("n", [(), (0,), (1,), (2, 3), (40, 5)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": -2},
        {"padding_idx": 3},
        {"sparse": True},
        {"scale_grad_by_freq": True},
        {"max_norm": 1.0, "norm_type": 1.0},
    ],
    ids=str,
)
def test_results_are_torchs(device, dtype, index_dtype, n, options):
    if device.type == "cuda" and n == (0,) and not {"scale_grad_by_freq", "max_norm"}.isdisjoint(options):
        pytest.skip("torch launches a kernel of no blocks there, and fails")
    expected = step(device, dtype, index_dtype, n, **options)
    with enable():
        ours = step(device, dtype, index_dtype, n, **options)
    if dtype.itemsize == 2 and "scale_grad_by_freq" in options:  # torch adds in 16 bits on the CPU
        wide = step(device, torch.float32, index_dtype, n, **options)[1]
        expected = expected[0], wide.to(dtype), expected[2]
    for result, reference in zip(ours, expected, strict=True):
        assert result.layout == reference.layout
        torch.testing.assert_close(result, reference.coalesce() if reference.is_sparse else reference)


def test_what_has_no_kernel_runs_as_ever(device):
    x = torch.randint(5, (300,), device=device)
    others = [
        torch.randn(5, 3, dtype=torch.complex64, device=device),
        torch.arange(15, device=device).view(5, 3),
        torch.randn(5, 3, device="meta"),
        torch.randn(5, 3, device=device).as_subclass(type("Plain", (torch.Tensor,), {})),
    ]
    with enable():
        for weight in others:
            output = F.embedding(x.to(weight.device), weight)
            assert type(output) is type(weight)
            assert output.dtype == weight.dtype
            if not output.is_meta:
                assert (output == weight[x]).all()


def test_errors_are_torchs(device):
    x, weight = torch.zeros(3, dtype=torch.long, device=device), torch.randn(5, 3, device=device)
    for arguments in ((x.float(), weight), (x, weight[0]), ([0], weight), (x, [[1.0]])):
        with pytest.raises((TypeError, RuntimeError, AttributeError)) as expected:
            F.embedding(*arguments)
        with enable(), pytest.raises(expected.type):
            F.embedding(*arguments)
    with enable(), pytest.raises(AssertionError, match="Padding_idx"):
        F.embedding(x, weight, 5)
    if device.type == "cpu":
        with enable(), pytest.raises(IndexError):
            F.embedding(x + 5, weight)


@pytest.mark.parametrize("padding_idx", [-7, 5, 2**40, 2, -1])
def test_the_backward_as_an_operator_takes_what_torchs_takes(device, padding_idx):
    """Any padding_idx, and a gradient whose shape is another view of the rows."""
    if device.type == "cuda" and padding_idx == 2**40:
        pytest.skip("torch cuts padding_idx to 32 bits there: 2**40 pads row 0")
    x = torch.tensor([[0, 2, 2], [4, 0, 1]], device=device)
    backward = torch.ops.aten.embedding_dense_backward
    for shape in ((2, 3, 4), (6, 4), (3, 2, 4)):
        grad_output = torch.arange(24.0, device=device).view(shape)
        expected = backward(grad_output, x, 5, padding_idx, False)
        with enable():
            assert torch.equal(backward(grad_output, x, 5, padding_idx, False), expected)


def test_derivatives_are_torchs(device):
    x = torch.tensor([[0, 3], [1, 4], [3, 3]], device=device)
    weight = torch.randn(5, 3, device=device, dtype=torch.float64, requires_grad=True)

    def lookup(weight):
        return F.embedding(x, weight, 1)

    def derivatives():
        (first,) = torch.autograd.grad(lookup(weight).pow(3).sum(), weight, create_graph=True)
        return (
            torch.autograd.grad(first.pow(2).sum(), weight)[0],
            torch.func.jvp(lookup, (weight,), (torch.ones_like(weight),)),
            torch.func.jacrev(lookup)(weight),
            torch.func.vmap(torch.func.grad(lambda w: lookup(w).pow(2).sum()))(weight.expand(4, 5, 3) * 2),
            torch.func.vmap(lambda x: F.embedding(x, weight))(x),
        )

    expected = derivatives()
    with enable():
        torch.testing.assert_close(derivatives(), expected)
        assert torch.autograd.gradcheck(lambda w: F.embedding(x, w), weight)
        assert torch.autograd.gradgradcheck(lambda w: F.embedding(x, w), weight)
        with torch.inference_mode():
            assert torch.equal(lookup(weight), weight[x])


def test_embedding_bag_is_untouched(device):
    bag = nn.EmbeddingBag(20, 4, mode="sum", padding_idx=2, device=device)
    x = torch.randint(20, (30, 5), device=device)

    def step():
        bag.zero_grad()
        output = bag(x)
        output.square().sum().backward()
        return output, bag.weight.grad

    expected = step()
    with enable():
        torch.testing.assert_close(step(), expected)


def test_autograd_keys_stay_torchs(op):
    """An overridden derivative would poison torch.compile's caches on disk, which are shared with other processes."""
    program = """
import torch
from fast_embedding import enable, ops
ops.load()
names = ("aten::embedding", "aten::embedding_dense_backward")
table = lambda: [line for name in names for line in torch._C._dispatch_dump_table(name).splitlines()]
before = table()
enable()
changed = [old.split(":")[0] for old, new in zip(before, table(), strict=True) if old != new]
print(*sorted(set(changed)))
"""
    expected = "CPU CUDA" if torch.version.cuda else "CPU"
    assert python(program) == expected + "\n"


def python(program, **environment):
    """What `program` prints, in a process of its own, where warnings are errors and stderr must stay empty."""
    command = [sys.executable, "-W", "error", "-W", "ignore:.*NumPy", "-c", program]
    environment = {**os.environ, **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_no_warning_is_left_on_screen(device):
    """C++ warnings become Python's once an interpreter is there, and go to stderr otherwise; neither may happen."""
    python(f"""
import torch
torch.set_warn_always(True)
from fast_embedding import enable
layer, x = torch.nn.Embedding(9, 4, device="{device}"), torch.zeros(5000, dtype=torch.long, device="{device}")
for _ in range(2):
    with enable():
        layer(x).sum().backward()
""")


def test_toggled_while_threads_train(device):
    """In a process of its own: the very first enable() replaces the kernels under the feet of eight threads."""
    output = python(f"""
import sys, threading, time
import torch
import torch._dynamo  # enable() imports it, slowly beside busy threads
from fast_embedding import enable
torch.set_num_threads(1)
sys.setswitchinterval(1e-4)
running, steps, failures = True, [0] * 8, []

def train(number):
    x = torch.randint(50, (300,), generator=torch.Generator().manual_seed(number)).to("{device}")
    counts = torch.bincount(x, minlength=50).float()
    layer = torch.nn.Embedding(50, 8, device="{device}")
    while running:
        layer.zero_grad()
        layer(x).sum().backward()
        if not torch.equal(layer.weight.grad, counts[:, None].expand(50, 8)):
            failures.append(number)
        steps[number] += 1

threads = [threading.Thread(target=train, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
while min(steps) < 3:
    time.sleep(0.01)
seen = sum(steps)
for _ in range(100):
    with enable():
        time.sleep(0.001)
    time.sleep(0.001)
running = False
for thread in threads:
    thread.join()
print(not failures, sum(steps) > seen + 100)
""")
    assert output == "True True\n"


def test_without_kernels_for_the_platform_it_does_nothing(monkeypatch):
    monkeypatch.setattr(_loader, "native_platform", lambda: False)
    with enable():
        assert F.embedding is TORCHS_EMBEDDING
        assert not ran_ours(torch.device("cpu"))


def test_what_cannot_be_loaded_is_an_error_and_changes_nothing(monkeypatch):
    reason = "fast-embedding was built for another torch"
    monkeypatch.setattr(_loader, "_state", _loader._State(_loader._Part(reason=reason)))
    with pytest.raises(RuntimeError, match=reason):
        enable()
    assert F.embedding is TORCHS_EMBEDDING
    assert everywhere._count == 0


def test_a_wrapper_put_around_it_meanwhile_is_kept(device):
    calls, graphs = [], []
    try:
        with enable():
            ours = F.embedding

            def wrapper(*args, **kwargs):
                calls.append("wrapper")
                return ours(*args, **kwargs)

            F.embedding = wrapper
        assert F.embedding is wrapper
        assert not ran_ours(device, lambda x, weight: F.embedding(x, weight))
        assert calls
        compiled_step(nn.Embedding(50, 8, device=device), graphs)
        assert not uses_our_backward(graphs)
    finally:
        F.embedding = TORCHS_EMBEDDING


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_recorders_see_torchs_function(logged):
    x, layer = torch.randint(20, (300,)), nn.Embedding(20, 5, padding_idx=1)
    with enable():
        F.embedding(x, layer.weight.as_subclass(logged))
        traced = torch.fx.symbolic_trace(layer)
        scripted = torch.jit.script(nn.Sequential(layer))
        recorded = torch.jit.trace(layer, x)
        exported = [torch.export.export(layer, (x,), strict=strict) for strict in (False, True)]
    assert TORCHS_EMBEDDING in logged.seen
    assert TORCHS_EMBEDDING in [node.target for node in traced.graph.nodes]
    for module in (traced, scripted, recorded, *(program.module() for program in exported)):
        assert torch.equal(module(x), layer(x))
    for program in exported:
        assert torch.ops.aten.embedding.default in [node.target for node in program.graph.nodes]


# ---- torch.compile

# The Dynamo of torch 2.4 keeps torch's own modules whole, and what they call out of reach: there, what they call.
WHOLE_MODULES = torch.__version__.startswith("2.4.")


def compiled_step(layer, graphs, compiled=None):
    """A training step of `layer` through torch.compile, checked against eager; `graphs` gets the sets of operators."""

    def capture(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return make_boxed_func(graph.forward)

    if compiled is None:
        backend = aot_autograd(fw_compiler=capture, bw_compiler=capture)
        lookup = (lambda x: F.embedding(x, layer.weight, layer.padding_idx)) if WHOLE_MODULES else layer
        compiled = torch.compile(lookup, fullgraph=True, backend=backend)
    x = torch.randint(50, (700,), device=layer.weight.device)
    gradients = []
    for module in (compiled, layer):
        layer.zero_grad()
        module(x).sum().backward()
        gradients.append(layer.weight.grad)
    torch.testing.assert_close(*gradients)
    return compiled


def uses_our_backward(graphs):
    forward, backward = graphs
    assert forward == {"aten.embedding.default"}  # which Inductor fuses into what follows
    return "fast_embedding.embedding_backward.default" in backward


def test_compiled_code_follows_the_switch(device):
    layer, off, on = nn.Embedding(50, 8, padding_idx=3, device=device), [], []
    compiled = compiled_step(layer, off)
    assert not uses_our_backward(off)
    with enable():
        compiled_step(layer, off, compiled)
        assert uses_our_backward(off[2:])
        with enable():
            compiled_step(layer, off, compiled)
    compiled_step(layer, off, compiled)
    assert len(off) == 4  # neither a second enable() nor the way back compiles anything new
    torch._dynamo.reset()
    with enable():
        compiled = compiled_step(layer, on)
        assert uses_our_backward(on)
    compiled_step(layer, on, compiled)
    assert not uses_our_backward(on[2:])


def test_inside_of_what_is_compiled(device):
    """A model that switches it on itself, in eager code around a compiled part."""
    layer, graphs = nn.Embedding(50, 8, device=device), []
    reference = copy.deepcopy(layer)
    x = torch.randint(50, (700,), device=device)

    def record(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    @torch.compile(backend=record)
    def step():
        with enable():
            return layer(x).square().sum()

    step().backward()
    assert any("fast_embedding.embedding.default" in graph for graph in graphs)
    reference(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, reference.weight.grad)


@pytest.mark.parametrize("forget", ["", "torch._dynamo.trace_rules.clear_lru_cache()"])
def test_switched_on_before_dynamo_is_there(op, forget):
    """Dynamo looks torch's functions up by name, at its first use and when torch.distributed starts."""
    lookup = "lambda x: torch.nn.functional.embedding(x, layer.weight)" if WHOLE_MODULES else "layer"
    output = python(f"""
import sys, torch
from fast_embedding import enable
assert "torch._dynamo" not in sys.modules

def show(graph, _):
    print(*[node.target.__module__ for node in graph.graph.nodes if "embedding" in str(node.target)])
    return graph.forward

layer, x = torch.nn.Embedding(50, 8), torch.zeros(700, dtype=torch.long)
acceleration = enable()
import torch._dynamo
{forget}
compiled = torch.compile({lookup}, fullgraph=True, backend=show)
compiled(x)
acceleration.disable()
compiled(x)
""")
    assert output == "torch._ops.fast_embedding\ntorch.nn.functional\n"


CACHED_PROGRAM = """
import hashlib, os, sys, torch
accelerated = "fast" in sys.argv
if accelerated:
    import fast_embedding
    fast_embedding.enable()
torch.manual_seed(0)
layer = torch.nn.Embedding(50, 8, padding_idx=3, device="{device}")
x = torch.randint(50, (700,)).to("{device}")
compiled = torch.compile(lambda x: layer(x).tanh(), fullgraph=True)
compiled(x).sum().backward()
compiled_gradient, layer.weight.grad = layer.weight.grad, None
layer(x).tanh().sum().backward()
torch.testing.assert_close(compiled_gradient, layer.weight.grad)
from torch._dynamo.utils import counters
print(counters["inductor"]["fxgraph_cache_hit"] > 0, counters["aot_autograd"]["autograd_cache_hit"] > 0)
if not accelerated:
    assert not hasattr(torch.ops.fast_embedding, "embedding_backward")
"""


@pytest.mark.compat
def test_another_process_that_shares_the_compile_cache(device, tmp_path):
    """Neither finds what the other has compiled of the same code; each finds its own again."""
    if device.type == "cuda":
        pytest.importorskip("triton")
    script = tmp_path / "program.py"
    script.write_text(CACHED_PROGRAM.replace("{device}", str(device)))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}

    def hits(*arguments):
        command = [sys.executable, str(script), *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()[-2:]

    assert hits("fast") == ["False", "False"]
    plain = hits()
    assert plain[1] == "False"
    assert "True" in hits()
    assert "True" in hits("fast")


def test_cuda_graph(cuda):
    layer = nn.Embedding(5000, 32, padding_idx=7, device=cuda)
    with torch.no_grad():
        layer.weight.round_()  # sums are exact, so that they are the same in any order
    x = torch.randint(5000, (20_000,), device=cuda)

    def step():
        output = layer(x)
        return output, torch.autograd.grad(output.square().sum(), layer.weight)[0]

    with enable():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
    for _ in range(3):
        x.copy_(torch.randint(5000, (20_000,), device=cuda))
        graph.replay()
        torch.testing.assert_close(results, step(), rtol=0, atol=0)
