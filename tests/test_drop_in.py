"""Every documented behaviour of nn.Embedding: FastEmbedding, and nn.Embedding under enable(), against torch alone."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from fast_embedding import FastEmbedding, FastMultiEmbedding, _loader, enable, everywhere

V, D = 20, 6


@pytest.fixture(params=["FastEmbedding", "enable"])
def fast(request):
    """The class under test. With "enable" it is torch's, and what `torch_alone` wraps is the reference."""
    if request.param == "FastEmbedding":
        yield FastEmbedding
    else:
        with enable():
            yield nn.Embedding


@contextlib.contextmanager
def torch_alone():
    """torch without enable(), whoever called it."""
    active = everywhere._count
    for _ in range(active):
        _loader.leave_aten_alone()
    try:
        yield
    finally:
        for _ in range(active):
            _loader.accelerate_aten()


@pytest.fixture
def x(device):
    """Enough indices not to be left to ATen, with duplicates."""
    return torch.randint(V, (50, 7), device=device)


def same(layer):
    """torch's layer with the same settings and values."""
    reference = copy.deepcopy(layer)
    reference.__class__ = nn.Embedding
    return reference


def integers(output):
    """Sums of these do not depend on their order, so that results can be compared bit by bit."""
    return torch.arange(float(output.numel()), device=output.device).view_as(output) % 9 - 4


def train(layer, x):
    output = layer(x)
    (output * integers(output).to(output.dtype)).sum().backward()
    return output.detach(), layer.weight.grad, layer.weight.detach()


def assert_trains_as_torchs(layer, x):
    layer.zero_grad()
    reference = same(layer)
    with torch_alone():
        expected = train(reference, x)
    for result, wanted in zip(train(layer, x), expected, strict=True):
        torch.testing.assert_close(result, wanted)


# ---- Construction


@pytest.mark.parametrize("padding_idx", [None, 0, 3, V - 1, -1, -V])
def test_padding_row_starts_as_zero_and_stays(fast, x, device, padding_idx):
    layer = fast(V, D, padding_idx, device=device)
    assert layer.padding_idx == (None if padding_idx is None else padding_idx % V)
    zero_rows = (layer.weight == 0).all(1).nonzero().flatten().tolist()
    assert zero_rows == ([] if padding_idx is None else [padding_idx % V])
    assert_trains_as_torchs(layer, x)
    layer.reset_parameters()
    assert (layer.weight == 0).all(1).sum() == len(zero_rows)
    if padding_idx is not None:
        assert (layer.weight.grad[padding_idx] == 0).all()


@pytest.mark.parametrize(
    "arguments, options",
    [
        ((V, D, V), {}),
        ((V, D, -V - 1), {}),
        ((-1, D), {}),
        ((V, D), {"_weight": torch.zeros(V, D + 1)}),
        ((V, D), {"dtype": torch.int64}),
        ((V,), {}),
        ((V, D), {"device": "nonsense"}),
        ((V, "6"), {}),
    ],
    ids=str,
)
def test_wrong_construction_raises_what_torch_raises(fast, arguments, options):
    with pytest.raises((AssertionError, TypeError, RuntimeError, ValueError)) as expected, torch_alone():
        nn.Embedding(*arguments, **options)
    with pytest.raises(expected.type):
        fast(*arguments, **options)


def test_from_pretrained_keeps_every_option(fast, x, device):
    weight = torch.randn(V, D, device=device)
    options = {"padding_idx": 2, "max_norm": 1.5, "norm_type": 1.0, "scale_grad_by_freq": True, "sparse": False}
    layer = fast.from_pretrained(weight, freeze=False, **options)
    assert type(layer) is fast
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert {name: getattr(layer, name) for name in options} == options
    assert not fast.from_pretrained(weight).weight.requires_grad
    assert_trains_as_torchs(layer, x)
    with pytest.raises(AssertionError):
        fast.from_pretrained(weight[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 1}, {"max_norm": 2.0}, {"norm_type": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}],
    ids=str,
)
def test_representation(fast, options):
    assert fast(V, D, **options).extra_repr() == nn.Embedding(V, D, **options).extra_repr()


def test_without_initialisation(fast, x, device):
    layer = nn.utils.skip_init(fast, V, D, device=device)
    assert type(layer) is fast
    nn.init.ones_(layer.weight)
    assert (layer(x) == 1).all()


# ---- Options


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_max_norm_renormalises_the_rows_looked_up_in_place(fast, x, device, norm_type):
    layer = fast(V, D, max_norm=0.7, norm_type=norm_type, device=device)
    before = layer.weight.detach().clone()
    x = x.remainder(V // 2)
    assert_trains_as_torchs(layer, x)
    assert torch.equal(layer.weight[V // 2 :], before[V // 2 :])
    if not (device.type == "cuda" and norm_type == float("inf")):  # there torch takes the maximum norm of a row for 1
        norms = torch.linalg.vector_norm(layer.weight.detach(), norm_type, 1)
        assert (norms[: V // 2] <= 0.7 * (1 + 1e-5)).all()


def test_max_norm_is_not_tracked_but_noticed(fast, x, device):
    """nn.Embedding's own note: who uses the weight before the lookup must clone it, for the lookup changes it."""
    layer = fast(V, D, max_norm=0.7, device=device)
    matrix = torch.randn(D, D, device=device, requires_grad=True)
    (layer.weight.clone() @ matrix).sum().add(layer(x).sum()).backward()
    assert layer.weight.grad.isfinite().all()
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (layer.weight @ matrix).sum().add(layer(x).sum()).backward()


@pytest.mark.parametrize("padding_idx", [None, 4])
def test_scale_grad_by_freq(fast, x, device, dtype, padding_idx):
    layer = fast(V, D, padding_idx, scale_grad_by_freq=True, device=device, dtype=dtype)
    if dtype.itemsize > 2:
        assert_trains_as_torchs(layer, x)
        return
    # Torch adds in 16 bits on the CPU, so the measure is its float32, rounded.
    wide = same(layer).float()
    with torch_alone():
        expected = train(wide, x)[1].to(dtype)
    torch.testing.assert_close(train(layer, x)[1], expected)


@pytest.mark.parametrize("padding_idx", [None, 4])
def test_sparse_gradients(fast, x, device, padding_idx):
    layer = fast(V, D, padding_idx, sparse=True, device=device)
    reference = same(layer)
    with torch_alone():
        train(reference, x)
    train(layer, x)
    assert layer.weight.grad.is_sparse
    torch.testing.assert_close(layer.weight.grad.to_dense(), reference.weight.grad.to_dense())
    train(layer, x)  # accumulates
    torch.testing.assert_close(layer.weight.grad.to_dense(), 2 * reference.weight.grad.to_dense())


# ---- Indices and weights


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (600,), (2, 3, 100)], ids=str)
def test_shapes_of_indices(fast, device, index_dtype, shape):
    layer = fast(V, D, 1, device=device)
    x = torch.randint(V, shape, dtype=index_dtype, device=device)
    assert layer(x).shape == (*shape, D)
    assert_trains_as_torchs(layer, x)


@pytest.mark.parametrize("sizes", [(0, D), (V, 0), (1, 1)], ids=str)
def test_empty_and_least_tables(fast, device, sizes):
    layer = fast(*sizes, device=device)
    x = torch.zeros(0 if sizes[0] == 0 else 300, dtype=torch.long, device=device)
    if sizes[1] == 0 and device.type == "cuda":  # torch's own backward reads beyond its memory there
        assert layer(x).shape == (300, 0)
        layer(x).sum().backward()
        assert layer.weight.grad.shape == sizes
        torch.cuda.synchronize()
        return
    assert_trains_as_torchs(layer, x)


@pytest.mark.parametrize("kind", ["transposed", "expanded rows", "expanded columns", "strided", "offset", "computed"])
def test_layouts_of_weight_and_their_gradients(fast, x, device, kind):
    """The gradient of a view arrives at what it is a view of."""

    def view(base):
        return {
            "transposed": lambda: base[:D, :V].t(),
            "expanded rows": lambda: base[:1, :D].expand(V, D),
            "expanded columns": lambda: base[:V, :1].expand(V, D),
            "strided": lambda: base[::2, ::2][:V, :D],
            "offset": lambda: base.view(-1)[1 : 1 + V * D].view(V, D),
            "computed": lambda: base[:V, :D].softmax(1),
        }[kind]()

    layer = fast(V, D, device=device)
    results = []
    for candidate, context in ((layer, contextlib.nullcontext()), (same(layer), torch_alone())):
        base = torch.linspace(-1, 1, 1600, device=device).view(40, 40).requires_grad_()
        with context:
            output = torch.func.functional_call(candidate, {"weight": view(base)}, x)
            (output * integers(output)).sum().backward()
        results.append((output, base.grad))
    torch.testing.assert_close(*results)


def test_weight_that_requires_no_gradient(fast, x, device):
    layer = fast(V, D, _freeze=True, device=device)
    assert not layer(x).requires_grad
    mixed = layer(x) * torch.ones((), device=device, requires_grad=True)
    mixed.sum().backward()
    assert layer.weight.grad is None


def test_dtypes_by_conversion(fast, x, device):
    layer = fast(V, D, 1, device=device)
    for convert in (layer.double, layer.half, layer.bfloat16, layer.float):
        assert convert() is layer
        assert layer(x).dtype == layer.weight.dtype
        assert_trains_as_torchs(layer, x)


# ---- A module among modules


def test_hooks(fast, x, device):
    layer, calls = fast(V, D, device=device), []
    layer.register_forward_pre_hook(lambda module, args: (calls.append("pre"), (args[0].clamp(max=3),))[1])
    layer.register_forward_hook(lambda module, args, output: (calls.append("post"), output * 2)[1])
    layer.register_full_backward_pre_hook(lambda module, grad: calls.append("backward pre"))
    layer.register_full_backward_hook(lambda module, grads, outputs: calls.append("backward"))
    output = layer(x)
    assert torch.equal(output, 2 * layer.weight[x.clamp(max=3)])
    output.sum().backward()
    assert calls == ["pre", "post", "backward pre", "backward"]
    assert (layer.weight.grad[4:] == 0).all()


def test_state_dicts_both_ways(fast, device):
    ours, theirs = fast(V, D, device=device), nn.Embedding(V, D, device=device)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for source, target in ((ours, theirs), (theirs, ours)):
        nn.init.normal_(source.weight)
        assert target.load_state_dict(source.state_dict()) == ([], [])
        assert torch.equal(ours.weight, theirs.weight)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert ours.weight.data_ptr() == theirs.weight.data_ptr()
    assert isinstance(ours.weight, nn.Parameter)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        ours.load_state_dict(nn.Embedding(V + 1, D).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({})


def test_copies(fast, x, device):
    layer = fast(V, D, 3, device=device)
    layer.extra = ["attributes go along"]
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(made) is fast
        assert made.extra == layer.extra
        assert made.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(made(x), layer(x))
    assert copy.copy(layer).weight is layer.weight


def test_meta_and_to_empty(fast, x, device):
    layer = fast(V, D, 2, device="meta")
    assert layer(x.to("meta")).shape == (50, 7, D)
    layer.to_empty(device=device)
    layer.reset_parameters()
    assert (layer.weight[2] == 0).all()
    assert_trains_as_torchs(layer, x)
    with torch.device("meta"):
        assert fast(V, D).weight.is_meta


def test_shared_memory(fast):
    x = torch.randint(V, (300,))
    layer = fast(V, D).share_memory()
    assert layer.weight.is_shared()
    assert_trains_as_torchs(layer, x)
    layer.weight.grad = None
    layer.weight.share_memory_()
    assert torch.equal(layer(x), layer.weight[x])


def step_of_a_worker(rank, layer, x):
    layer(x).sum().backward()
    with torch.no_grad():
        layer.weight.add_(layer.weight.grad)


def test_other_processes_train_what_is_shared():
    """As Hogwild does: the weight sent to a process is the same memory there, the gradient is the process's own."""
    x = torch.arange(600) % V
    layer = FastEmbedding(V, D).share_memory()
    before = layer.weight.detach().clone()
    torch.multiprocessing.spawn(step_of_a_worker, (layer, x))
    assert torch.equal(layer.weight, before + 600 / V)
    assert layer.weight.grad is None


@pytest.mark.parametrize("switch", ["overwrite_module_params_on_conversion", "swap_module_params_on_conversion"])
def test_conversions_of_the_future(fast, x, device, switch):
    layer = fast(V, D, 1, device=device)
    before = getattr(torch.__future__, f"get_{switch}")()
    getattr(torch.__future__, f"set_{switch}")(True)
    try:
        layer.to(torch.float64)
        assert layer.weight.dtype == torch.float64
        assert isinstance(layer.weight, nn.Parameter)
        assert_trains_as_torchs(layer, x)
        layer.load_state_dict(same(layer).state_dict())
        assert_trains_as_torchs(layer, x)
    finally:
        getattr(torch.__future__, f"set_{switch}")(before)


@pytest.mark.parametrize(
    "reparametrize",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh()),
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "own", "pruned"],
)
def test_reparametrisations(fast, x, device, reparametrize):
    results = []
    for kind, context in ((fast, contextlib.nullcontext()), (nn.Embedding, torch_alone())):
        torch.manual_seed(0)
        layer = kind(V, D, device=device)
        layer = reparametrize(layer) or layer
        with context:
            output = layer(x)
            (output * integers(output)).sum().backward()
        assert isinstance(layer, kind)
        results.append([output, *(parameter.grad for parameter in layer.parameters())])
    torch.testing.assert_close(*results)


def test_tied_weights(fast, x, device):
    results = []
    for kind, context in ((fast, contextlib.nullcontext()), (nn.Embedding, torch_alone())):
        torch.manual_seed(0)
        layer, head = kind(V, D, device=device), nn.Linear(D, V, bias=False, device=device)
        head.weight = layer.weight
        with context:
            F.cross_entropy(head(layer(x)).flatten(0, 1), x.flatten()).backward()
        results.append(layer.weight.grad)
    torch.testing.assert_close(*results)


# ---- Autograd


def test_gradients_accumulate_into_what_is_there(fast, x, device):
    layer = fast(V, D, device=device)
    train(layer, x)
    once = layer.weight.grad.clone()
    memory = layer.weight.grad.data_ptr()
    train(layer, x)
    assert torch.equal(layer.weight.grad, 2 * once)
    assert layer.weight.grad.data_ptr() == memory
    layer.zero_grad(set_to_none=False)
    train(layer, x)
    assert torch.equal(layer.weight.grad, once)


def test_the_gradient_is_ones_own(fast, x, device):
    """Autograd keeps a gradient that nothing else refers to without copying it, so nothing else may."""
    layer = fast(V, D, device=device)
    gradients = []
    layer.weight.register_hook(gradients.append)
    train(layer, x)
    first = layer.weight.grad
    layer.weight.grad = None
    train(layer, x)
    assert first.data_ptr() != layer.weight.grad.data_ptr()
    assert torch.equal(first, layer.weight.grad)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_names_the_lookup(fast, x, device):
    layer = fast(V, D, device=device)
    with torch.autograd.detect_anomaly():
        train(layer, x)
        output = layer(x)
        output.register_hook(lambda grad: grad * float("nan"))
        with pytest.raises(RuntimeError, match=r"Embedding\w*Backward|EmbeddingFunction.* returned nan"):
            output.sum().backward()


def test_outputs_changed_in_place(fast, x, device):
    """The output is nobody's but the caller's: it may be changed, and gradients follow."""
    layer = fast(V, D, device=device)
    output = layer(x)
    output.mul_(3)
    output.sum().backward()
    counts = torch.bincount(x.flatten(), minlength=V).float()
    assert torch.equal(layer.weight.grad, 3 * counts[:, None].expand(V, D))


def test_input_of_the_backward_changed_in_place_is_noticed(fast, x, device):
    loss = fast(V, D, device=device)(x).sum()
    x.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(fast, x, device, use_reentrant):
    from torch.utils.checkpoint import checkpoint

    layer = fast(V, D, device=device)
    _, expected, _ = train(layer, x)
    layer.weight.grad = None
    scale = torch.ones((), device=device, requires_grad=True)  # reentrant checkpoints need an input with a gradient
    output = checkpoint(lambda scale: layer(x) * scale, scale, use_reentrant=use_reentrant)
    (output * integers(output)).sum().backward()
    assert torch.equal(layer.weight.grad, expected)


def test_saved_tensor_hooks(fast, x, device):
    """What the lookup saves for its backward may be moved away and back."""
    layer, packed = fast(V, D, device=device), []
    _, expected, _ = train(layer, x)
    layer.weight.grad = None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.cpu(), lambda t: t.to(device)):
        train(layer, x)
    assert any(tensor.dtype == x.dtype for tensor in packed)
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize(
    "transform",
    [
        lambda loss, weight: torch.func.grad_and_value(loss)(weight),
        lambda loss, weight: torch.func.jvp(loss, (weight,), (weight.cos(),)),
        lambda loss, weight: torch.func.vjp(loss, weight)[1](torch.ones((), device=weight.device)),
        lambda loss, weight: torch.func.hessian(loss)(weight),
        lambda loss, weight: torch.func.vmap(torch.func.grad(loss))(torch.stack([weight, 2 * weight])),
        lambda loss, weight: torch.autograd.functional.hvp(loss, weight, weight.sin()),
    ],
    ids=["grad", "jvp", "vjp", "hessian", "vmap of grad", "hvp"],
)
def test_function_transforms(fast, x, device, padding_idx, transform):
    """Of a layer as torch.func sees it, with as many indices as our kernels would take."""
    layer = fast(V, D, padding_idx, device=device)

    def of(candidate):
        return lambda weight: torch.func.functional_call(candidate, {"weight": weight}, x).sin().mean()

    weight = layer.weight.detach()
    with torch_alone():
        expected = transform(of(same(layer)), weight)
    torch.testing.assert_close(transform(of(layer), weight), expected)


def test_jacobians(fast, device):
    layer = fast(4, 3, device=device)
    x = torch.randint(4, (80,), device=device)
    expected = F.one_hot(x, 4).float()[:, None, :, None] * torch.eye(3, device=device)[None, :, None, :]
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        result = jacobian(lambda weight: torch.func.functional_call(layer, {"weight": weight}, x))(layer.weight)
        assert torch.equal(result, expected)


def test_per_sample_gradients(fast, x, device):
    """vmap(grad) over the samples: each gradient is that of the sample alone."""
    layer = fast(V, D, 2, device=device)
    parameters = {"weight": layer.weight.detach()}
    x = x.view(5, 70)

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, sample).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["weight"]
    reference = same(layer)
    for sample, gradient in zip(x, mapped, strict=True):
        reference.zero_grad()
        with torch_alone():
            reference(sample).square().sum().backward()
        torch.testing.assert_close(gradient, reference.weight.grad)


def test_forward_mode(fast, x, device):
    """A dual parameter, as torch.autograd.forward_ad makes it, and a gradient of the tangent."""
    layer = fast(V, D, device=device)
    tangent = torch.randn(V, D, device=device, requires_grad=True)
    with torch.autograd.forward_ad.dual_level():
        weight = torch.autograd.forward_ad.make_dual(layer.weight, tangent)
        output = torch.func.functional_call(layer, {"weight": weight}, x)
        primal, derivative = torch.autograd.forward_ad.unpack_dual(output)
        assert torch.equal(primal, layer.weight[x])
        assert torch.equal(derivative, tangent[x])
        (derivative * integers(derivative)).sum().backward()
    reference = same(layer)
    with torch_alone():
        train(reference, x)
    torch.testing.assert_close(tangent.grad, reference.weight.grad)


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_gradient_scaling(fast, device, amp_dtype):
    if device.type == "cpu" and amp_dtype == torch.float16:
        pytest.skip("torch.autocast on the CPU: bfloat16 here, float16 on a GPU")
    x = torch.randint(V, (600,), device=device)
    losses = []
    for kind, context in ((fast, contextlib.nullcontext()), (nn.Embedding, torch_alone())):
        torch.manual_seed(0)
        model = nn.Sequential(kind(V, D), nn.Linear(D, V)).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler(device.type)
        losses.append([])
        with context:
            for _ in range(4):
                optimizer.zero_grad()
                with torch.autocast(device.type, amp_dtype):
                    assert model[0](x).dtype == torch.float32
                    loss = F.cross_entropy(model(x).float(), x)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                losses[-1].append(loss.item())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    assert losses[0][-1] < losses[0][0]


# ---- Optimizers


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}
SPARSE_OPTIMIZERS = {
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def trained(layer, optimizer, inputs):
    for x in inputs:
        optimizer.zero_grad()
        output = layer(x)
        (output * integers(output)).sum().backward()
        optimizer.step()
    return layer.weight.detach()


@pytest.mark.parametrize(
    "sparse, name",
    [*((False, name) for name in OPTIMIZERS), *((True, name) for name in SPARSE_OPTIMIZERS)],
    ids=lambda value: {False: "dense", True: "sparse"}.get(value, value),
)
def test_optimizers(fast, device, sparse, name):
    make = (SPARSE_OPTIMIZERS if sparse else OPTIMIZERS)[name]
    inputs = [torch.randint(V, (600,), device=device) for _ in range(4)]
    layer = fast(V, D, 1, sparse=sparse, device=device)
    reference = same(layer)
    with torch_alone():
        expected = trained(reference, make(reference.parameters()), inputs)
    start = layer.weight.detach().clone()
    torch.testing.assert_close(trained(layer, make(layer.parameters()), inputs), expected)
    assert not torch.allclose(start, expected)
    assert (layer.weight[1] == 0).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_many_tables(device, name):
    """One step of the one parameter is a step of each table."""
    make = OPTIMIZERS[name]
    layer = FastMultiEmbedding([V, 4, 9], [D, 3, 8], padding_idx=[1, None, -1], device=device)
    tables = nn.ModuleList(layer.to_embeddings())
    inputs = [torch.randint(4, (600, 3), device=device) for _ in range(4)]
    trained(layer, make(layer.parameters()), inputs)
    optimizer = make(tables.parameters())
    for x in inputs:
        optimizer.zero_grad()
        output = torch.cat([table(x[:, t]) for t, table in enumerate(tables)], 1)
        (output * integers(output)).sum().backward()
        optimizer.step()
    for ours, theirs in zip(layer.tables(), tables, strict=True):
        torch.testing.assert_close(ours, theirs.weight)


def test_sparse_optimizers_of_many_tables_are_refused():
    """The gradient is dense, and the optimizer says so itself."""
    layer = FastMultiEmbedding([V, 4], [D, 3])
    layer(torch.zeros(300, 2, dtype=torch.long)).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients"):
        torch.optim.SparseAdam(layer.parameters()).step()
