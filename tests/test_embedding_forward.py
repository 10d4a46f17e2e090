"""fast_embedding::embedding forward: bit for bit torch's own."""

import pytest
import torch
import torch.nn.functional as F

DIMS = [1, 2, 3, 4, 5, 8, 31, 32, 64, 100, 300, 768]


def assert_same_as_aten(op, weight, indices):
    output = op.embedding(weight, indices)
    expected = F.embedding(indices, weight)
    assert output.dtype == expected.dtype
    assert output.device == expected.device
    assert output.shape == expected.shape
    assert output.is_contiguous()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("num_embeddings, n", [(1, 50), (2, 33), (100, 1000), (5000, 700)])
def test_equals_aten(op, device, dtype, index_dtype, distribution, num_embeddings, n, make_indices, poison):
    indices = make_indices(distribution, num_embeddings, n, index_dtype, device)
    for dim in (3, 64):
        weight = torch.randn(num_embeddings, dim, device=device).to(dtype)
        poison(indices.numel() * dim, dtype, device)
        assert_same_as_aten(op, weight, indices)


@pytest.mark.parametrize("dim", DIMS)
def test_every_width(op, device, dtype, dim, make_indices, poison):
    weight = torch.randn(77, dim, device=device).to(dtype)
    indices = make_indices("uniform", 77, 1001, device=device)
    poison(indices.numel() * dim, dtype, device)
    assert_same_as_aten(op, weight, indices)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 4), (1, 1, 1, 5)])
def test_shapes_of_indices(op, device, index_dtype, shape):
    weight = torch.randn(9, 4, device=device)
    assert_same_as_aten(op, weight, torch.randint(9, shape, dtype=index_dtype, device=device))


def test_layouts_of_indices(op, device, index_dtype):
    weight = torch.randn(50, 6, device=device)
    indices = torch.randint(50, (40, 30), dtype=index_dtype, device=device)
    for view in (indices.t(), indices[::2, 1::3], indices[:, 0], indices[:1].expand(40, 30), indices[3, 5].expand(7)):
        assert_same_as_aten(op, weight, view)
    assert_same_as_aten(op, weight, indices.view(-1)[1:])  # not aligned to 16 bytes


def test_layouts_of_weight(op, device, dtype):
    storage = torch.randn(40 * 24 + 1, device=device).to(dtype)
    indices = torch.randint(10, (500,), device=device)
    wide = storage[:-1].view(40, 24)
    for weight in (
        storage[1:].view(40, 24),  # aligned to its element alone
        wide[:, 3:10],  # rows further apart than they are long
        wide[::2],
        wide[:24].t(),  # columns further apart than rows
        wide[:1].expand(40, 24),
        wide[:, :1].expand(40, 24),
    ):
        assert_same_as_aten(op, weight, indices)


@pytest.mark.parametrize("num_embeddings, dim, n", [(0, 4, 0), (5, 0, 3), (0, 0, 0), (5, 4, 0)])
def test_empty(op, device, num_embeddings, dim, n):
    indices = torch.zeros(n, dtype=torch.long, device=device)
    output = op.embedding(torch.randn(num_embeddings, dim, device=device), indices)
    assert output.shape == (n, dim)


def test_padding_idx_is_looked_up_like_any_row(op, device):
    weight = torch.randn(5, 3, device=device)
    indices = torch.tensor([1, 4, 1], device=device)
    assert torch.equal(op.embedding(weight, indices, 1), weight[indices])


def test_not_a_number_and_infinity_pass_unchanged(op, device, dtype):
    weight = torch.tensor([[float("nan"), float("inf")], [-float("inf"), -0.0]], device=device, dtype=dtype)
    output = op.embedding(weight, torch.tensor([1, 0], device=device))
    torch.testing.assert_close(output, weight.flip(0), rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(output[0, 1])


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_out_of_range_names_index_position_and_table(op, bad):
    indices = torch.tensor([[0, 1, 2], [4, bad, 0]])
    with pytest.raises(IndexError, match=rf"= {bad} is out of range for an embedding of 5 rows"):
        op.embedding(torch.randn(5, 3), indices)


def test_out_of_range_in_a_large_lookup_names_the_first(op, index_dtype):
    indices = torch.zeros(100_000, dtype=index_dtype)
    indices[[70_001, 99_999]] = 12
    with pytest.raises(IndexError, match=r"indices\[70001\] = 12 "):
        op.embedding(torch.randn(5, 3), indices)


@pytest.mark.parametrize("index_dtype", [torch.float32, torch.int16, torch.uint8, torch.bool])
def test_dtype_of_indices_is_checked(op, device, index_dtype):
    with pytest.raises(RuntimeError, match=r"(?i)long|int"):
        op.embedding(torch.randn(5, 3, device=device), torch.zeros(4, dtype=index_dtype, device=device))


@pytest.mark.parametrize("shape", [(), (5,), (5, 3, 2)])
def test_weight_must_be_2d(op, device, shape):
    with pytest.raises(RuntimeError, match="2-D"):
        op.embedding(torch.randn(shape, device=device), torch.zeros(4, dtype=torch.long, device=device))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_other_dtypes_are_left_to_aten(op, dtype):
    weight = torch.randint(2, (5, 3)).to(dtype)
    indices = torch.tensor([4, 0, 4])
    # Bits: some torch can neither compare nor index float8.
    assert torch.equal(op.embedding(weight, indices).view(torch.uint8), weight.view(torch.uint8)[indices])


def test_one_thread_equals_many(op, make_indices):
    weight = torch.randn(1000, 33)
    indices = make_indices("zipf", 1000, 50_000)
    expected = op.embedding(weight, indices)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(op.embedding(weight, indices), expected)
    finally:
        torch.set_num_threads(threads)
