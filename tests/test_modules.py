"""FastEmbedding is an nn.Embedding in all but its forward; FastMultiEmbedding is n of them in one parameter."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fast_embedding import FastEmbedding, FastMultiEmbedding

N = 2000  # large enough not to be left to ATen on the CPU


def test_constructor_is_that_of_torch():
    assert inspect.signature(FastEmbedding) == inspect.signature(nn.Embedding)
    assert inspect.signature(FastEmbedding.from_pretrained) == inspect.signature(nn.Embedding.from_pretrained)
    torch.manual_seed(3)
    ours = FastEmbedding(10, 3, -2, 1.0, 1.0, True, False)
    torch.manual_seed(3)
    theirs = nn.Embedding(10, 3, -2, 1.0, 1.0, True, False)
    assert torch.equal(ours.weight, theirs.weight)
    assert repr(ours) == "Fast" + repr(theirs)
    assert isinstance(ours, nn.Embedding)


def test_initial_weight():
    weight = torch.randn(10, 3)
    layer = FastEmbedding(10, 3, _weight=weight)
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert layer.weight.requires_grad


def test_from_pretrained():
    weight = torch.randn(10, 3)
    layer = FastEmbedding.from_pretrained(weight, padding_idx=4)
    assert type(layer) is FastEmbedding
    assert not layer.weight.requires_grad
    assert layer.padding_idx == 4
    assert torch.equal(layer(torch.tensor([3, 4])), weight[3:5])
    assert FastEmbedding.from_pretrained(weight, freeze=False).weight.requires_grad


@pytest.mark.parametrize("n", [5, N])
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_forward_and_backward(device, dtype, index_dtype, n, padding_idx):
    torch.manual_seed(0)
    theirs = nn.Embedding(10, 3, padding_idx, device=device, dtype=dtype)
    ours = FastEmbedding(10, 3, padding_idx, _weight=theirs.weight.detach().clone())
    x = torch.randint(10, (n, 2), dtype=index_dtype, device=device)
    for layer in (ours, theirs):
        layer(x).sum().backward()
    assert torch.equal(ours(x), theirs(x))
    # A sum of ones, which ATen rounds at every step in 16 bits on the CPU, and we once.
    counts = torch.bincount(x.flatten(), minlength=10).double()
    if padding_idx is not None:
        counts[padding_idx] = 0
    assert torch.equal(ours.weight.grad, counts.to(dtype)[:, None].expand(10, 3))


@pytest.mark.parametrize("n", [5, N])
@pytest.mark.parametrize("bad", [-1, 10])
def test_out_of_range(n, bad):
    x = torch.zeros(n, dtype=torch.long)
    x[4] = bad
    with pytest.raises(IndexError, match=rf"indices\[4\] = {bad} is out of range for an embedding of 10 rows"):
        FastEmbedding(10, 3)(x)


def test_weight_is_read_at_call_time():
    """FSDP and functional_call put other tensors, not always parameters, in the place of the weight."""
    layer = FastEmbedding(10, 3)
    x = torch.randint(10, (N,))
    other = torch.randn(10, 3)
    assert torch.equal(torch.func.functional_call(layer, {"weight": other}, x), other[x])
    del layer._parameters["weight"]
    layer.weight = other
    assert torch.equal(layer(x), other[x])


@pytest.mark.parametrize(
    "make",
    [
        lambda: FastEmbedding(10, 3, 1),
        lambda: FastMultiEmbedding([10, 4], [3, 2]),
        lambda: FastMultiEmbedding([10], [3], table_of_column=[0, 0], padding_idx=1, mode="sum"),
    ],
)
@pytest.mark.parametrize("used", [False, True])
def test_copies_and_pickles(make, used):
    layer = make()
    if used:
        layer(torch.zeros(3, 2, dtype=torch.long))
    x = torch.randint(4, (N, 2))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for copied in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stream, weights_only=False),
    ):
        assert type(copied) is type(layer)
        assert repr(copied) == repr(layer)
        assert torch.equal(copied(x), layer(x))
        assert copied.weight.data_ptr() != layer.weight.data_ptr()


def test_state_dicts_are_exchanged_with_torch():
    ours, theirs = FastEmbedding(10, 3), nn.Embedding(10, 3)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    ours.load_state_dict(nn.Embedding(10, 3).state_dict())
    assert not torch.equal(ours.weight, theirs.weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_jit_script():
    layer = FastEmbedding(10, 3, padding_idx=1)
    model = nn.Sequential(layer, nn.Linear(3, 2))
    scripted = torch.jit.script(model)
    x = torch.randint(10, (N,))
    assert torch.equal(scripted(x), model(x))
    scripted(x).sum().backward()
    assert layer.weight.grad is not None
    assert type(layer) is FastEmbedding


def test_distributed_data_parallel():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.ModuleDict({"one": FastEmbedding(10, 3), "many": FastMultiEmbedding([10, 4], [3, 2])})
        model.forward = lambda x: model["one"](x).sum() + model["many"](x).sum()
        x = torch.randint(4, (N, 2))
        model.forward(x).backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        nn.parallel.DistributedDataParallel(model)(x).backward()
        assert all(
            torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), expected, strict=True)
        )
    finally:
        dist.destroy_process_group()


# ---- FastMultiEmbedding


def test_multi_equals_separate_embeddings(device, dtype, index_dtype):
    sizes, dims, padding_idx = [10, 4, 300], [3, 2, 8], [None, 0, -1]
    layer = FastMultiEmbedding(sizes, dims, padding_idx=padding_idx, device=device, dtype=dtype)
    embeddings = layer.to_embeddings()
    x = torch.randint(4, (N, 3), dtype=index_dtype, device=device)
    expected = torch.cat([embedding(x[:, t]) for t, embedding in enumerate(embeddings)], 1)
    output = layer(x)
    assert torch.equal(output, expected)
    assert output.shape == (N, layer.output_dim)
    weights = torch.randint(-3, 4, expected.shape, device=device)
    (output.double() * weights).sum().backward()
    (expected.double() * weights).sum().backward()
    for gradient, embedding in zip(layer.layout.tables(layer.weight.grad), embeddings, strict=True):
        # ATen on the CPU adds 16-bit gradients in 16 bits.
        exact = {"rtol": 0, "atol": 0} if dtype in (torch.float32, torch.float64) else {"rtol": 0.05, "atol": 2}
        torch.testing.assert_close(gradient, embedding.weight.grad, **exact)


def test_multi_contract_of_the_original():
    """Input batch x n, output equal to cat([emb_i(x[:, i])], 1)."""
    embeddings = [nn.Embedding(v, d) for v, d in ((7, 3), (100, 32), (1, 1))]
    layer = FastMultiEmbedding([7, 100, 1], [3, 32, 1], _weight=[e.weight for e in embeddings])
    x = torch.randint(7, (129, 3))
    x[:, 2] = 0
    assert torch.equal(layer(x), torch.cat([embedding(x[:, t]) for t, embedding in enumerate(embeddings)], 1))


def test_multi_starts_as_embeddings_do(device):
    """The same seed, the same tables; padding rows and holes are zero."""
    torch.manual_seed(5)
    layer = FastMultiEmbedding([10, 4, 30], [3, 2, 8], padding_idx=[None, 1, None], device=device)
    torch.manual_seed(5)
    embeddings = [
        nn.Embedding(10, 3, device=device),
        nn.Embedding(4, 2, 1, device=device),
        nn.Embedding(30, 8, device=device),
    ]
    for table, embedding in zip(layer.tables(), embeddings, strict=True):
        assert torch.equal(table, embedding.weight)
    assert (layer.weight[30:32] == 0).all()
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    layer.reset_parameters()
    assert layer.weight.isfinite().all()
    assert (layer.weight[30:32] == 0).all()
    assert (layer.tables()[1][1] == 0).all()


def test_multi_holes_stay_zero_in_training():
    layer = FastMultiEmbedding([10, 3], [3, 3], padding_idx=[None, 0])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randint(3, (N, 2))).square().sum().backward()
        optimizer.step()
    assert (layer.weight[30:32] == 0).all()
    assert (layer.weight[41:] == 0).all()
    assert (layer.tables()[1][0] == 0).all()


def test_multi_tables_are_views():
    layer = FastMultiEmbedding([10, 4], [3, 2])
    with torch.no_grad():
        layer.tables()[1][2] = 7
    assert (layer(torch.tensor([[0, 2]]))[0, 3:] == 7).all()
    assert [tuple(table.shape) for table in layer.tables()] == [(10, 3), (4, 2)]


def test_multi_sum():
    layer = FastMultiEmbedding([10, 4], [3, 3], mode="sum")
    x = torch.randint(4, (N, 5, 2))
    first, second = layer.tables()
    torch.testing.assert_close(layer(x), F.embedding(x[..., 0], first) + F.embedding(x[..., 1], second))
    assert layer.output_dim == 3
    assert layer(x).shape == (N, 5, 3)


def test_multi_columns_that_share_a_table(device):
    """As one nn.Embedding used for several columns: its gradient is the sum of theirs."""
    layer = FastMultiEmbedding([10, 4], [3, 2], table_of_column=[0, 1, 0], padding_idx=[2, None], device=device)
    first, second = nn.Embedding(10, 3, 2, device=device), nn.Embedding(4, 2, device=device)
    with torch.no_grad():
        for table, embedding in zip(layer.tables(), (first, second), strict=True):
            embedding.weight.copy_(table)
    assert layer.table_of_column == (0, 1, 0)
    assert layer.output_dim == 8
    assert len(layer.tables()) == 2
    x = torch.randint(4, (N, 3), device=device)
    expected = torch.cat([first(x[:, 0]), second(x[:, 1]), first(x[:, 2])], 1)
    output = layer(x)
    assert torch.equal(output, expected)
    weights = torch.randint(-3, 4, expected.shape, device=device)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for gradient, embedding in zip(layer.layout.tables(layer.weight.grad), (first, second), strict=True):
        assert torch.equal(gradient, embedding.weight.grad)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.step()
    assert layer.weight.grad.shape == layer.weight.shape


def test_conversion_keeps_ties():
    first, second = nn.Embedding(10, 3, padding_idx=1), nn.Embedding(4, 3)
    tied = nn.Embedding(10, 3, padding_idx=1)
    tied.weight = first.weight
    layer = FastMultiEmbedding.from_embeddings([first, second, first, tied])
    assert layer.table_of_column == (0, 1, 0, 0)
    assert layer.num_embeddings == (10, 4)
    x = torch.randint(4, (N, 4))
    assert torch.equal(layer(x), torch.cat([first(x[:, 0]), second(x[:, 1]), first(x[:, 2]), first(x[:, 3])], 1))
    back = layer.to_embeddings()
    assert len(back) == 4
    assert back[0] is back[2] is back[3]
    assert torch.equal(back[0].weight, first.weight)
    assert torch.equal(back[1].weight, second.weight)
    tied.padding_idx = None
    with pytest.raises(ValueError, match=r"embeddings\[1\] has padding_idx=None, an earlier entry .* has 1"):
        FastMultiEmbedding.from_embeddings([first, tied])


def test_multi_repr():
    shared = FastMultiEmbedding([10, 4], [3, 2], table_of_column=[0, 1, 0])
    assert repr(shared) == "FastMultiEmbedding([10, 4], [3, 2], table_of_column=[0, 1, 0])"
    assert repr(FastMultiEmbedding([10, 4], [3, 2])) == "FastMultiEmbedding([10, 4], [3, 2])"
    layer = FastMultiEmbedding([10, 4], [3, 3], padding_idx=[None, -1], mode="sum")
    assert repr(layer) == "FastMultiEmbedding([10, 4], [3, 3], padding_idx=[None, 3], mode='sum')"
    assert layer.padding_idx == (None, 3)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_conversion_there_and_back(device, dtype, requires_grad, training):
    embeddings = [
        nn.Embedding(10, 3, device=device, dtype=dtype),
        FastEmbedding(4, 2, padding_idx=1, device=device, dtype=dtype),
    ]
    for embedding in embeddings:
        embedding.weight.requires_grad_(requires_grad)
        embedding.train(training)
    with torch.no_grad():
        embeddings[1].weight[1] = 5  # a padding row need not be zero
    layer = FastMultiEmbedding.from_embeddings(embeddings)
    assert layer.weight.is_leaf
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.padding_idx == (None, 1)
    for back, embedding in zip(layer.to_embeddings(), embeddings, strict=True):
        assert type(back) is nn.Embedding
        assert torch.equal(back.weight, embedding.weight)
        assert back.weight.dtype == dtype
        assert back.weight.device == embedding.weight.device
        assert back.weight.requires_grad == requires_grad
        assert back.training == training
        assert back.padding_idx == embedding.padding_idx
        assert back.weight.data_ptr() != embedding.weight.data_ptr()


class Scaled(nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "embedding, error, message",
    [
        (lambda: nn.Embedding(4, 2, sparse=True), ValueError, r"embeddings\[1\] has sparse=True"),
        (lambda: nn.Embedding(4, 2, max_norm=1.0), ValueError, r"embeddings\[1\] has max_norm"),
        (lambda: nn.Embedding(4, 2, scale_grad_by_freq=True), ValueError, r"embeddings\[1\] has .*scale_grad_by_freq"),
        (lambda: nn.Linear(4, 2), TypeError, r"embeddings\[1\] must be an nn.Embedding, got Linear"),
        (lambda: Scaled(4, 2), TypeError, r"embeddings\[1\] is a Scaled, whose forward is not nn.Embedding's"),
        (lambda: nn.Embedding(4, 2, dtype=torch.float64), ValueError, "table 1 must be torch.float32"),
        (lambda: nn.Embedding(4, 2, device="meta"), ValueError, "table 1 must be .* on cpu, got .* on meta"),
        (lambda: nn.Embedding(4, 2, _freeze=True), ValueError, "agree in requires_grad"),
    ],
)
def test_conversion_refuses_what_it_would_lose(embedding, error, message):
    with pytest.raises(error, match=message):
        FastMultiEmbedding.from_embeddings([nn.Embedding(10, 3), embedding()])


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (([3, 5], [2]), {}, ValueError, "one entry per table"),
        (([], []), {}, ValueError, "at least one table"),
        ((3, 5), {}, TypeError, "must be a sequence of ints"),
        (([3, "5"], [2, 2]), {}, TypeError, r"num_embeddings\[1\] must be an int, got str"),
        (([3], [-2]), {}, ValueError, r"embedding_dims\[0\] must be >= 0"),
        (([3, 5], [2, 3]), {"mode": "sum"}, ValueError, "tables of one embedding_dim"),
        (([3, 5], [2, 3]), {"mode": "max"}, ValueError, '"concat" or "sum"'),
        (([3, 5], [2, 3]), {"padding_idx": 3}, ValueError, "padding_idx of table 0"),
        (([3, 5], [2, 3]), {"table_of_column": [0, 0]}, ValueError, "must name each of the 2 tables at least once"),
        (([3, 5], [2, 3]), {"table_of_column": [0, 1.0]}, TypeError, r"table_of_column\[1\] must be an int"),
        (([3], [2]), {"_weight": torch.zeros(6)}, ValueError, r"_weight must have shape \(8,\)"),
        (([3], [2]), {"_weight": [torch.zeros(2, 3)]}, ValueError, r"table 0 must be .* of shape \(3, 2\)"),
        (([3], [2]), {"_weight": []}, ValueError, "one tensor per table, got 0 for 1 tables"),
        (([3], [2]), {"sparse": True}, TypeError, "sparse"),
    ],
)
def test_multi_checks_its_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        FastMultiEmbedding(*arguments, **options)


def test_multi_takes_a_flat_weight_as_it_is():
    weight = torch.randn(8)
    assert FastMultiEmbedding([3], [2], _weight=weight).weight.data_ptr() == weight.data_ptr()


def test_multi_state_dict():
    layer, other = FastMultiEmbedding([10, 4], [3, 2]), FastMultiEmbedding([10, 4], [3, 2])
    state = layer.state_dict()
    assert list(state) == ["weight"]
    assert state._metadata[""]["version"] == 1
    other.load_state_dict(state)
    assert torch.equal(other.weight, layer.weight)
    other.load_state_dict(dict(state))  # without metadata, as safetensors gives it
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        FastMultiEmbedding([11, 40], [3, 2]).load_state_dict(state)


def test_multi_state_dict_of_a_later_layout_is_refused():
    model = nn.ModuleDict({"columns": FastMultiEmbedding([10, 4], [3, 2])})
    state = model.state_dict()
    state._metadata["columns"]["version"] = 2
    with pytest.raises(RuntimeError, match=r'"columns\.weight" was saved with table layout version 2'):
        model.load_state_dict(state)


def test_multi_moves_and_casts(device):
    layer = FastMultiEmbedding([10, 4], [3, 2], padding_idx=0)
    x = torch.randint(4, (N, 2))
    expected = layer(x)
    layer = layer.to(device).to(torch.bfloat16)
    assert torch.equal(layer(x.to(device)).cpu(), expected.to(torch.bfloat16))
    meta = FastMultiEmbedding([10, 4], [3, 2], device="meta")
    assert meta(x.to("meta")).shape == (N, 5)
    meta.to_empty(device=device).reset_parameters()
    assert meta(x.to(device)).isfinite().all()
