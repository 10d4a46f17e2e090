"""fast_embedding.functional: the arguments, results and errors of torch.nn.functional.embedding."""

import inspect
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fast_embedding import functional

# Below and above the size up to which a lookup on the CPU is left to ATen.
SMALL, LARGE = 6, 5000


def run(lookup, x, weight, *args, **kwargs):
    weight = weight.clone().requires_grad_()
    output = lookup(x, weight, *args, **kwargs)
    output.backward(torch.arange(float(output.numel()), device=x.device).view_as(output) % 7)
    return output.detach(), weight.grad, weight.detach()


def test_signature_is_that_of_torch():
    ours = inspect.signature(functional.embedding).parameters
    torchs = inspect.signature(F.embedding).parameters
    assert list(ours)[: len(torchs)] == list(torchs)
    assert all(ours[name].default == torchs[name].default for name in torchs)
    assert all(ours[name].kind == inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(torchs) :])


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 0},
        {"padding_idx": 3},
        {"padding_idx": -1},
        {"padding_idx": -20},
        {"max_norm": 1.0},
        {"max_norm": 0.5, "norm_type": 1.0, "padding_idx": 2},
        {"scale_grad_by_freq": True},
        {"scale_grad_by_freq": True, "padding_idx": -3},
        {"sparse": True},
        {"sparse": True, "padding_idx": 4},
    ],
    ids=str,
)
def test_options_give_torchs_results(device, index_dtype, n, options):
    x = torch.randint(20, (n,), dtype=index_dtype, device=device)
    weight = torch.randn(20, 5, device=device)
    ours, expected = run(functional.embedding, x, weight, **options), run(F.embedding, x, weight, **options)
    for result, reference in zip(ours, expected, strict=True):
        assert result.is_sparse == reference.is_sparse
        torch.testing.assert_close(result, reference.coalesce() if reference.is_sparse else reference)


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("padding_idx", [20, 21, -21])
def test_padding_outside_the_table_is_torchs_error(n, padding_idx):
    x, weight = torch.zeros(n, dtype=torch.long), torch.randn(20, 5)
    with pytest.raises(AssertionError, match="Padding_idx must be within num_embeddings"):
        F.embedding(x, weight, padding_idx)
    with pytest.raises(AssertionError, match="Padding_idx must be within num_embeddings"):
        functional.embedding(x, weight, padding_idx)


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize(
    "x, weight",
    [
        (torch.zeros(1), torch.randn(5, 3)),
        (torch.zeros(1, dtype=torch.long), torch.randn(5)),
        ([0, 1], torch.randn(5, 3)),
        (torch.zeros(1, dtype=torch.long), [[1.0]]),
    ],
    ids=["float indices", "1-D weight", "list of indices", "list as weight"],
)
def test_wrong_arguments_raise_what_torch_raises(n, x, weight):
    if isinstance(x, torch.Tensor):
        x = x.expand(n)
    with pytest.raises((TypeError, RuntimeError, AttributeError)) as expected:
        F.embedding(x, weight)
    with pytest.raises(expected.type):
        functional.embedding(x, weight)


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("check_indices", [None, False, True])
@pytest.mark.parametrize("bad", [-3, 20])
def test_out_of_range_on_the_cpu_always_names_the_index(n, check_indices, bad):
    x = torch.zeros(n // 2, 2, dtype=torch.long)
    x[2, 1] = bad
    message = rf"= {bad} is out of range for an embedding of 20 rows"
    with pytest.raises(IndexError, match=message):
        functional.embedding(x, torch.randn(20, 5), check_indices=check_indices)
    with pytest.raises(IndexError, match=rf"indices\[2, 1\] = {bad} is out of range for an embedding of 20 rows"):
        functional.embedding(x, torch.randn(20, 5), max_norm=1.0, check_indices=True)


def test_check_indices_names_the_table(device):
    x = torch.tensor([[1, 1], [2, 3], [0, 5]], device=device)
    with pytest.raises(IndexError, match=r"indices\[2, 1\] = 5 is out of range for table 1 of 5 rows"):
        functional.multi_embedding(x, torch.zeros(32, device=device), [3, 5], [5, 2], check_indices=True)


def test_check_indices_accepts_what_is_in_range(device, index_dtype):
    x = torch.randint(20, (LARGE,), dtype=index_dtype, device=device)
    weight = torch.randn(20, 5, device=device)
    assert torch.equal(functional.embedding(x, weight, check_indices=True), F.embedding(x, weight))
    assert functional.embedding(x[:0], weight, check_indices=True).shape == (0, 5)


def test_check_indices_lets_transforms_and_meta_pass():
    x, weight = torch.randint(20, (7, 3)), torch.randn(20, 5)
    lookup = torch.func.vmap(lambda x: functional.embedding(x, weight, check_indices=True))
    assert torch.equal(lookup(x), F.embedding(x, weight))
    assert functional.embedding(x.to("meta"), weight.to("meta"), check_indices=True).shape == (7, 3, 5)


def test_the_environment_switches_checks_on(device):
    program = f"""
import torch
from fast_embedding import functional
try:
    functional.embedding(torch.tensor([7], device="{device}"), torch.zeros(5, 2, device="{device}"), max_norm=1.0)
except IndexError as error:
    print(error)
"""
    environment = {**os.environ, "FAST_EMBEDDING_CHECK": "1"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == "indices[0] = 7 is out of range for an embedding of 5 rows\n", result.stderr


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_subclasses_of_tensor_see_torchs_function(logged, n):
    x, weight = torch.randint(20, (n,)), torch.randn(20, 5)
    assert torch.equal(functional.embedding(x, weight.as_subclass(logged)).as_subclass(torch.Tensor), weight[x])
    assert F.embedding in logged.seen
    logged.seen.clear()
    functional.embedding(x.as_subclass(logged), weight)
    assert F.embedding in logged.seen


def test_function_modes_see_the_lookup():
    with torch.device("meta"):
        weight = torch.empty(20, 5)
        assert functional.embedding(torch.empty(LARGE, dtype=torch.long), weight).is_meta
    with torch.device("cpu"):
        assert functional.embedding(torch.zeros(LARGE, dtype=torch.long), torch.ones(20, 5)).sum() == LARGE * 5


def test_meta_and_fake_tensors():
    from torch._subclasses import FakeTensorMode

    assert functional.embedding(
        torch.empty(LARGE, dtype=torch.long, device="meta"), torch.empty(9, 4, device="meta")
    ).is_meta
    with FakeTensorMode():
        assert functional.embedding(torch.empty(3, LARGE, dtype=torch.long), torch.empty(9, 4)).shape == (3, LARGE, 4)


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_weights(device, dtype, n):
    x, weight = torch.randint(20, (n,), device=device), torch.randn(20, 5, dtype=dtype, device=device)
    assert torch.equal(functional.embedding(x, weight), weight[x])
    # torch has no gradient for them and says so.
    with pytest.raises(RuntimeError, match="complex"):
        functional.embedding(x, weight.requires_grad_())


def test_float8_weights():
    x, weight = torch.randint(20, (LARGE,)), torch.randn(20, 5).to(torch.float8_e4m3fn)
    assert torch.equal(functional.embedding(x, weight).float(), weight.float()[x])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_records_torchs_operation():
    x, weight = torch.randint(20, (LARGE,)), torch.randn(20, 5)
    traced = torch.jit.trace(lambda x, w: functional.embedding(x, w, 1), (x, weight))
    assert "aten::embedding" in str(traced.graph)
    assert "fast_embedding" not in str(traced.graph)
    assert torch.equal(traced(x[:7], weight), weight[x[:7]])


@pytest.mark.parametrize("padding_idx, of_tables", [(None, (None, None)), (-1, (-1, -1)), ([None, 2], (None, 2))])
def test_multi_embedding_is_torchs_concatenation(device, padding_idx, of_tables):
    x = torch.randint(3, (500, 2), device=device)

    def composed(x, weight):
        first, second = weight[:15].view(3, 5), weight[16:26].view(5, 2)
        return torch.cat([F.embedding(x[:, 0], first, of_tables[0]), F.embedding(x[:, 1], second, of_tables[1])], 1)

    def ours(x, weight):
        return functional.multi_embedding(x, weight, [3, 5], [5, 2], padding_idx=padding_idx)

    weight = torch.randn(32, device=device)
    torch.testing.assert_close(run(ours, x, weight), run(composed, x, weight))


def test_multi_embedding_of_subclasses_is_composed_of_torchs():
    class Plain(torch.Tensor):
        pass

    x, weight = torch.randint(3, (50, 2)), torch.randn(32)
    expected = functional.multi_embedding(x, weight, [3, 5], [5, 2])
    output = functional.multi_embedding(x, weight.as_subclass(Plain), [3, 5], [5, 2])
    assert type(output) is Plain
    assert torch.equal(output.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize(
    "x_shape, weight_shape, options, message",
    [
        ((4, 3), (32,), {}, r"one column per table in its last dimension, 2, got shape \(4, 3\)"),
        ((), (32,), {}, "one column per table"),
        ((4, 2), (31,), {}, r"weight must have shape \(32,\) for these tables, got \(31,\)"),
        ((4, 2), (2, 16), {}, r"weight must have shape \(32,\)"),
        ((4, 2), (32,), {"table_of_column": [0, 1, 1]}, r"one column per table in its last dimension, 3"),
        ((4, 2), (32,), {"table_of_column": [0, 0]}, "must name each of the 2 tables at least once"),
        ((4, 2), (32,), {"table_of_column": [0, 2]}, r"and nothing else, got \[0, 2\]"),
        ((4, 2), (32,), {"mode": "mean"}, 'mode must be "concat" or "sum"'),
        ((4, 2), (32,), {"mode": "sum"}, "tables of one embedding_dim"),
        ((4, 2), (32,), {"padding_idx": 4}, "padding_idx of table 0 must be within its 3 rows, got 4"),
        ((4, 2), (32,), {"padding_idx": [0]}, "padding_idx must have one entry per table"),
    ],
)
def test_multi_embedding_checks_its_arguments(x_shape, weight_shape, options, message):
    with pytest.raises(ValueError, match=message):
        functional.multi_embedding(
            torch.zeros(x_shape, dtype=torch.long), torch.zeros(weight_shape), [3, 5], [5, 2], **options
        )
