"""fast_embedding::embedding_backward against float64 and against torch's own in the same dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = [(1, 500), (2, 1000), (7, 300), (100, 3000), (5000, 700), (20_000, 2000)]
DIMS = [1, 2, 3, 4, 5, 8, 31, 32, 64, 100, 300, 768]
# (num_embeddings, dim, n): tables in the shared memory of a GPU, tables in its L2, tables beyond it.
GPU_SIZES = [(2, 768, 16384), (10, 4, 1 << 20), (119, 300, 100_000), (1000, 32, 1 << 18), (50_257, 128, 1 << 17)]
GPU_SIZES += [(1_000_000, 64, 1 << 18), (1_000_000, 5, 1 << 18)]


def assert_exact(op, grad_output, indices, num_embeddings, reference, padding_idx=-1):
    """For integer gradients: float32 sums have no rounding, so that one rounding at the end is all that is right."""
    output = op.embedding_backward(grad_output, indices, num_embeddings, padding_idx)
    expected = reference(grad_output, indices, num_embeddings, padding_idx).to(grad_output.dtype)
    assert output.shape == (num_embeddings, grad_output.shape[-1])
    assert output.is_contiguous()
    assert output.dtype == grad_output.dtype
    assert output.device == grad_output.device
    assert torch.equal(output, expected)


def assert_not_worse_than_aten(op, grad_output, indices, num_embeddings, reference):
    """ATen in the same dtype is the measure, and one rounding of the result. In float64 it is the reference itself."""
    exact = reference(grad_output, indices, num_embeddings)
    ours = op.embedding_backward(grad_output, indices, num_embeddings)
    rounding = torch.finfo(grad_output.dtype).eps
    if grad_output.dtype != torch.float64:
        aten = torch.ops.aten.embedding_dense_backward(grad_output, indices, num_embeddings, -1, False)
        norm = torch.linalg.vector_norm  # a maximum would compare the luck of two summation orders
        assert norm(ours - exact) <= norm(aten - exact) + rounding * norm(exact)
    magnitude = reference(grad_output.abs(), indices, num_embeddings)
    assert ((ours - exact).abs() <= 4 * rounding * magnitude).all()


@pytest.mark.parametrize("num_embeddings, n", SIZES)
def test_exact_sums_rounded_once(
    op, device, dtype, index_dtype, distribution, num_embeddings, n, make_indices, make_grad, reference_backward, poison
):
    indices = make_indices(distribution, num_embeddings, n, index_dtype, device)
    for dim in (3, 32):
        grad_output = make_grad((indices.numel(), dim), dtype, device, integers=True)
        poison(num_embeddings * dim, dtype, device)
        assert_exact(op, grad_output, indices, num_embeddings, reference_backward)


@pytest.mark.parametrize("dim", DIMS)
def test_every_width(op, device, dtype, deterministic, dim, make_indices, make_grad, reference_backward, poison):
    for num_embeddings, n in ((3, 999), (1000, 1500)):
        indices = make_indices("zipf", num_embeddings, n, device=device)
        grad_output = make_grad((n, dim), dtype, device, integers=True)
        poison(num_embeddings * dim, dtype, device)
        assert_exact(op, grad_output, indices, num_embeddings, reference_backward)


@pytest.mark.parametrize("num_embeddings, n", SIZES)
def test_error_is_not_above_atens(
    op, device, dtype, distribution, deterministic, num_embeddings, n, make_indices, make_grad, reference_backward
):
    indices = make_indices(distribution, num_embeddings, n, device=device)
    grad_output = make_grad((indices.numel(), 16), dtype, device)
    assert_not_worse_than_aten(op, grad_output, indices, num_embeddings, reference_backward)


def test_close_to_aten(op, device, dtype, make_indices, make_grad):
    indices = make_indices("uniform", 500, 1000, device=device)
    grad_output = make_grad((1000, 24), dtype, device)
    # In 16 bits on the CPU it is ATen that is further than a rounding away: it adds in 16 bits.
    wide = grad_output if dtype == torch.float64 else grad_output.float()
    expected = torch.ops.aten.embedding_dense_backward(wide, indices, 500, -1, False).to(dtype)
    torch.testing.assert_close(op.embedding_backward(grad_output, indices, 500), expected)


def test_a_large_backward(op, device, dtype, deterministic, make_indices, make_grad, reference_backward):
    for distribution in ("zipf", "one_row"):
        indices = make_indices(distribution, 20_000, 60_000, device=device)
        grad_output = make_grad((60_000, 17), dtype, device, integers=True)
        assert_exact(op, grad_output, indices, 20_000, reference_backward)


@pytest.mark.parametrize("num_embeddings, dim, n", GPU_SIZES)
def test_every_gpu_strategy(
    op, cuda, dtype, deterministic, num_embeddings, dim, n, make_indices, make_grad, reference_backward, poison
):
    for distribution in ("uniform", "zipf", "one_row"):
        indices = make_indices(distribution, num_embeddings, n, device=cuda)
        grad_output = make_grad((n, dim), dtype, cuda, integers=True)
        poison(num_embeddings * dim, dtype, cuda)
        assert_exact(op, grad_output, indices, num_embeddings, reference_backward)


@pytest.mark.parametrize("num_embeddings, dim, n", GPU_SIZES)
def test_gpu_error_is_not_above_atens(
    op, cuda, dtype, deterministic, num_embeddings, dim, n, make_indices, make_grad, reference_backward
):
    indices = make_indices("zipf", num_embeddings, n, device=cuda)
    assert_not_worse_than_aten(op, make_grad((n, dim), dtype, cuda), indices, num_embeddings, reference_backward)


@pytest.mark.parametrize("distribution", ["uniform", "one_row", "half_on_one_row", "empty"])
@pytest.mark.parametrize("padding_idx", [0, 3, 6])
def test_padding_row_gets_no_gradient(
    op, device, dtype, distribution, padding_idx, make_indices, make_grad, reference_backward, poison
):
    for num_embeddings in (7, 7000):
        indices = make_indices(distribution, num_embeddings, 2000, device=device)
        indices[::3] = padding_idx
        grad_output = make_grad((indices.numel(), 5), dtype, device, integers=True)
        poison(num_embeddings * 5, dtype, device)
        assert_exact(op, grad_output, indices, num_embeddings, reference_backward, padding_idx)


def test_padding_row_drops_what_is_not_finite(op, device, dtype):
    grad_output = torch.tensor([[float("nan")], [1.0], [float("inf")]], device=device, dtype=dtype)
    output = op.embedding_backward(grad_output, torch.tensor([2, 0, 2], device=device), 3, 2)
    assert output.flatten().tolist() == [1, 0, 0]


def assert_means(op, grad_output, indices, num_embeddings, reference, padding_idx=-1):
    """scale_grad_by_freq, for integer gradients: a division and a rounding, or two, of an exact sum."""
    output = op.embedding_backward(grad_output, indices, num_embeddings, padding_idx, scale_grad_by_freq=True)
    count = torch.bincount(indices.flatten().long(), minlength=num_embeddings).clamp(min=1).unsqueeze(1)
    expected = reference(grad_output, indices, num_embeddings, padding_idx) / count
    assert output.dtype == grad_output.dtype
    # In 16 bits a mean between two values is rounded to either, where float32 has rounded it before. A mean of 100,000
    # may be subnormal in float16: such values stand `tiny * eps` apart.
    info = torch.finfo(output.dtype)
    assert ((output.double() - expected).abs() <= info.eps * expected.abs().clamp(min=info.tiny)).all()
    assert (output[expected == 0] == 0).all()


@pytest.mark.parametrize("num_embeddings, n", SIZES)
def test_scaled_by_frequency(
    op, device, dtype, index_dtype, distribution, num_embeddings, n, make_indices, make_grad, reference_backward, poison
):
    indices = make_indices(distribution, num_embeddings, n, index_dtype, device)
    for dim, padding_idx in ((3, -1), (32, num_embeddings // 2)):
        grad_output = make_grad((indices.numel(), dim), dtype, device, integers=True)
        poison(num_embeddings * dim, dtype, device)
        assert_means(op, grad_output, indices, num_embeddings, reference_backward, padding_idx)


@pytest.mark.parametrize("num_embeddings, dim, n", GPU_SIZES)
def test_scaled_by_frequency_on_a_gpu(
    op, cuda, dtype, num_embeddings, dim, n, make_indices, make_grad, reference_backward, poison
):
    for distribution in ("uniform", "zipf", "one_row"):
        indices = make_indices(distribution, num_embeddings, n, device=cuda)
        grad_output = make_grad((n, dim), dtype, cuda, integers=True)
        poison(num_embeddings * dim, dtype, cuda)
        assert_means(op, grad_output, indices, num_embeddings, reference_backward)


def test_scaled_error_is_not_above_atens(op, device, dtype, distribution, make_indices, make_grad, reference_backward):
    indices = make_indices(distribution, 5000, 9000, device=device)
    grad_output = make_grad((indices.numel(), 16), dtype, device)
    count = torch.bincount(indices, minlength=5000).clamp(min=1).unsqueeze(1)
    exact = reference_backward(grad_output, indices, 5000) / count
    ours = op.embedding_backward(grad_output, indices, 5000, scale_grad_by_freq=True)
    norm, rounding = torch.linalg.vector_norm, torch.finfo(dtype).eps
    if indices.numel() and dtype != torch.float64:  # torch fails for no indices on a GPU
        aten = torch.ops.aten.embedding_dense_backward(grad_output, indices, 5000, -1, True)
        assert norm(ours - exact) <= norm(aten - exact) + rounding * norm(exact)
    magnitude = reference_backward(grad_output.abs(), indices, 5000) / count
    assert ((ours - exact).abs() <= 4 * rounding * magnitude).all()


def test_not_a_number_reaches_its_row_alone(op, device, dtype, deterministic):
    grad_output = torch.ones(1000, 4, device=device, dtype=dtype)
    indices = torch.arange(1000, device=device) % 10
    grad_output[17, 2] = float("nan")
    output = op.embedding_backward(grad_output, indices, 10)
    expected = torch.full((10, 4), 100.0, device=device, dtype=dtype)
    expected[7, 2] = float("nan")
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)


def test_layouts_of_gradient(op, device, dtype, make_indices, make_grad, reference_backward):
    indices = make_indices("zipf", 50, 600, device=device)
    storage = make_grad((600 * 24 + 1,), dtype, device, integers=True)
    wide = storage[:-1].view(600, 24)
    for grad_output in (
        storage[1:].view(600, 24),  # aligned to its element alone
        wide[:, 5:12],  # rows further apart than they are long
        storage[:-1].view(24, 600).t(),  # columns further apart than rows
        wide[:1].expand(600, 24),  # the gradient of a sum over the batch
        wide[:, :1].expand(600, 24),
        storage[0].expand(600, 24),  # the gradient of .sum()
    ):
        assert_exact(op, grad_output, indices, 50, reference_backward)


def test_shapes_and_layouts_of_indices(op, device, index_dtype, make_grad, reference_backward):
    indices = torch.randint(9, (8, 6), dtype=index_dtype, device=device)
    for view in (
        indices,
        indices.t(),
        indices[::2, 1:4],
        indices[0],
        indices[2, 3],
        indices[:0],
        indices[:1].expand(5, 6),
    ):
        grad_output = make_grad((*view.shape, 3), device=device, integers=True)
        assert_exact(op, grad_output, view, 9, reference_backward)
        if view.dim() == 2:
            transposed = make_grad((view.shape[1], view.shape[0], 3), device=device, integers=True).transpose(0, 1)
            assert_exact(op, transposed, view, 9, reference_backward)


@pytest.mark.parametrize("num_embeddings, dim, n", [(0, 4, 0), (5, 0, 3), (0, 0, 0), (5, 4, 0)])
@pytest.mark.parametrize("scaled", [False, True])
def test_empty(op, device, num_embeddings, dim, n, scaled, poison):
    poison(num_embeddings * dim, torch.float32, device)
    indices = torch.zeros(n, dtype=torch.long, device=device)
    grad_output = torch.randn(n, dim, device=device)
    output = op.embedding_backward(grad_output, indices, num_embeddings, scale_grad_by_freq=scaled)
    assert torch.equal(output, torch.zeros(num_embeddings, dim, device=device))


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_out_of_range_names_index_position_and_table(op, bad):
    with pytest.raises(IndexError, match=rf"indices\[2\] = {bad} is out of range for an embedding of 5 rows"):
        op.embedding_backward(torch.randn(4, 3), torch.tensor([4, 0, bad, 0]), 5)


def test_the_same_bits_in_every_run(op, device, dtype, make_indices, make_grad):
    """use_deterministic_algorithms, over runs and thread counts."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        for num_embeddings, dim, n in ((3, 33, 20_000), (1000, 8, 30_000), (100_000, 20, 40_000)):
            indices = make_indices("zipf", num_embeddings, n, device=device)
            grad_output = make_grad((n, dim), dtype, device)
            for scaled in (False, True):
                call = (grad_output, indices, num_embeddings, -1, scaled)
                first = op.embedding_backward(*call)
                for count in (1, 2, threads):
                    torch.set_num_threads(count)
                    assert torch.equal(op.embedding_backward(*call), first)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_shape(op, reference_backward, data):
    """Random shapes, strides, offsets and padding on the CPU, and on the GPU where there is one."""
    draw = data.draw
    num_embeddings = draw(st.integers(1, 300), label="num_embeddings")
    dim = draw(st.integers(1, 70), label="dim")
    n = draw(st.integers(0, 400), label="n")
    offset = draw(st.integers(0, 9), label="offset")
    gap = draw(st.integers(0, 3), label="gap")
    padding_idx = draw(st.integers(-1, num_embeddings - 1), label="padding_idx")
    high = draw(st.integers(1, num_embeddings), label="rows used")
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]), label="dtype")
    index_dtype = draw(st.sampled_from([torch.int32, torch.int64]), label="index_dtype")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        indices = torch.randint(high, (n,), dtype=index_dtype, device=device)
        storage = torch.randint(-8, 9, (offset + n * (dim + gap),), device=device).to(dtype)
        grad_output = storage[offset:].view(n, dim + gap)[:, :dim]
        assert_exact(op, grad_output, indices, num_embeddings, reference_backward, padding_idx)
