"""fast_embedding::multi_embedding and its backward: the concatenation of one lookup per table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_embedding import functional
from fast_embedding.layout import Columns, TableLayout, output_columns

# num_embeddings and embedding_dims: one table, tables of one size, unlike sizes with holes, many.
TABLES = {
    "one": ([100], [7]),
    "alike": ([1000] * 10, [8] * 10),
    "unlike": ([1, 2, 7, 100, 3000, 8000], [3, 1, 32, 5, 16, 2]),
    "wide": ([50, 9, 11], [300, 1, 257]),
    "many": (list(range(1, 31)), [1 + t % 6 for t in range(30)]),
}
GPU_TABLES = {
    "small, 10": ([100] * 10, [4] * 10, 65_536),
    "medium, 10": ([1000] * 10, [32] * 10, 65_536),
    "large, 10": ([100_000] * 10, [32] * 10, 65_536),
    "wide, 26": ([40_000] * 26, [128] * 26, 8192),
    "unlike": ([3, 1_000_000, 50, 7, 30_000], [1, 16, 768, 4, 33], 40_000),
}


@pytest.fixture(params=TABLES)
def layout(request):
    return TableLayout(*TABLES[request.param])


def arguments(layout, padding_idx=None):
    return (
        list(layout.num_embeddings),
        list(layout.embedding_dims),
        list(layout.offsets),
        list(layout.padding_indices(padding_idx)),
    )


def column_arguments(columns):
    """What the operators take for columns that may share tables or be added."""
    fields = zip(*columns.description.tolist(), strict=True)
    num_embeddings, embedding_dims, offsets, _, padding = map(list, fields)
    return num_embeddings, embedding_dims, offsets, padding, columns.is_sum


def reference_gradient(grad_output, input, columns, reference):
    """The flat gradient in float64."""
    layout = columns.layout
    expected = torch.zeros(layout.numel, dtype=torch.float64, device=grad_output.device)
    tables = layout.tables(expected)
    dims = [layout.embedding_dims[table] for table in columns.tables]
    slices = [grad_output] * len(columns) if columns.is_sum else grad_output.split(dims, -1)
    for column, table in enumerate(columns.tables):
        rows, padding = layout.num_embeddings[table], columns.padding_idx[table]
        tables[table] += reference(slices[column], input[..., column], rows, padding)
    return expected


def make_input(layout, make_indices, distribution, n, dtype=torch.int64, device="cpu"):
    columns = [make_indices(distribution, rows, n, dtype, device) for rows in layout.num_embeddings]
    # "distinct" gives a table no more indices than it has rows.
    n = max(column.numel() for column in columns)
    return torch.stack([column.repeat(-(-n // max(1, column.numel())))[:n] for column in columns], 1)


def make_weight(layout, dtype=torch.float32, device="cpu", offset=0):
    """A weight with NaN in its holes: whatever reads them shows."""
    weight = torch.full((offset + layout.numel,), float("nan"), dtype=dtype, device=device)[offset:]
    for table in layout.tables(weight):
        table.copy_(torch.randn(table.shape))
    return weight


def composition(weight, input, layout):
    return torch.cat([table[input[..., t].long()] for t, table in enumerate(layout.tables(weight))], -1)


def assert_exact(op, grad_output, input, layout, reference, padding_idx=None):
    """For integer gradients, see test_embedding_backward.py; holes must be zero."""
    padding = layout.padding_indices(padding_idx)
    expected = torch.zeros(layout.numel, dtype=torch.float64, device=grad_output.device)
    columns = grad_output.split(layout.embedding_dims, -1)
    for t, table in enumerate(layout.tables(expected)):
        table.copy_(reference(columns[t], input[..., t], layout.num_embeddings[t], padding[t]))
    output = op.multi_embedding_backward(grad_output, input, layout.numel, *arguments(layout, padding_idx))
    assert output.dtype == grad_output.dtype
    assert output.device == grad_output.device
    assert torch.equal(output, expected.to(grad_output.dtype))


def test_forward_is_the_concatenation(op, device, dtype, index_dtype, distribution, layout, make_indices, poison):
    input = make_input(layout, make_indices, distribution, 400, index_dtype, device)
    weight = make_weight(layout, dtype, device)
    poison(input.shape[0] * sum(layout.embedding_dims), dtype, device)
    output = op.multi_embedding(weight, input, *arguments(layout))
    assert output.is_contiguous()
    assert output.dtype == dtype
    assert output.device == weight.device
    assert torch.equal(output, composition(weight, input, layout))


def test_backward_is_exact(
    op, device, dtype, distribution, deterministic, layout, make_indices, make_grad, reference_backward, poison
):
    input = make_input(layout, make_indices, distribution, 900, device=device)
    grad_output = make_grad((input.shape[0], sum(layout.embedding_dims)), dtype, device, integers=True)
    poison(layout.numel, dtype, device)
    assert_exact(op, grad_output, input, layout, reference_backward)


def test_backward_skips_padding(op, device, dtype, index_dtype, layout, make_indices, make_grad, reference_backward):
    input = make_input(layout, make_indices, "zipf", 500, index_dtype, device)
    grad_output = make_grad((500, sum(layout.embedding_dims)), dtype, device, integers=True)
    some = [None if t % 3 == 2 else t % rows for t, rows in enumerate(layout.num_embeddings)]
    for padding_idx in (0, -1, some):
        assert_exact(op, grad_output, input, layout, reference_backward, padding_idx)


@pytest.mark.parametrize("tables", GPU_TABLES)
def test_gpu_sizes(op, cuda, dtype, deterministic, tables, make_indices, make_grad, reference_backward, poison):
    *sizes, n = GPU_TABLES[tables]
    layout = TableLayout(*sizes)
    weight = make_weight(layout, dtype, cuda)
    for distribution in ("uniform", "zipf"):
        input = make_input(layout, make_indices, distribution, n, device=cuda)
        poison(layout.numel, dtype, cuda)
        output = op.multi_embedding(weight, input, *arguments(layout))
        assert torch.equal(output, composition(weight, input, layout))
        grad_output = make_grad(output.shape, dtype, cuda, integers=True)
        assert_exact(op, grad_output, input, layout, reference_backward)


def test_backward_error_is_not_above_atens(op, device, dtype, layout, make_indices, make_grad, reference_backward):
    """In float64 ATen is the reference itself, and the measure is the rounding of a sum of magnitudes."""
    input = make_input(layout, make_indices, "zipf", 3000, device=device)
    grad_output = make_grad((3000, sum(layout.embedding_dims)), dtype, device)
    ours = layout.tables(op.multi_embedding_backward(grad_output, input, layout.numel, *arguments(layout)))
    aten, exact, magnitude = [], [], []
    for t, columns in enumerate(grad_output.split(layout.embedding_dims, -1)):
        rows = layout.num_embeddings[t]
        aten.append(torch.ops.aten.embedding_dense_backward(columns, input[:, t], rows, -1, False))
        exact.append(reference_backward(columns, input[:, t], rows))
        magnitude.append(reference_backward(columns.abs(), input[:, t], rows))
    ours, aten, exact, magnitude = (
        torch.cat([t.flatten() for t in tables]) for tables in (ours, aten, exact, magnitude)
    )
    rounding = torch.finfo(dtype).eps
    if dtype != torch.float64:
        norm = torch.linalg.vector_norm
        assert norm(ours - exact) <= norm(aten - exact) + rounding * norm(exact)
    assert ((ours - exact).abs() <= 4 * rounding * magnitude).all()


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 4)])
def test_leading_dimensions(op, device, index_dtype, shape, make_grad, reference_backward):
    layout = TableLayout([6, 4, 9], [5, 1, 8])
    weight = make_weight(layout, device=device)
    input = torch.randint(4, (*shape, 3), dtype=index_dtype, device=device)
    output = op.multi_embedding(weight, input, *arguments(layout))
    assert output.shape == (*shape, 14)
    assert torch.equal(output, composition(weight, input, layout))
    assert_exact(op, make_grad((*shape, 14), device=device, integers=True), input, layout, reference_backward)


def test_layouts_of_input_and_gradient(op, device, index_dtype, make_grad, reference_backward):
    layout = TableLayout([6, 4, 9], [5, 1, 8])
    weight = make_weight(layout, device=device)
    input = torch.randint(4, (30, 12), dtype=index_dtype, device=device)
    storage = make_grad((30 * 20 + 1,), device=device, integers=True)
    gradients = (
        storage[1 : 1 + 30 * 14].view(30, 14),
        storage[:-1].view(30, 20)[:, 3:17],
        storage[: 30 * 14].view(14, 30).t(),
        storage[:14].expand(30, 14),
        storage[0].expand(30, 14),
    )
    views = (
        input[:, 2:5],
        input[:, ::4],
        input.view(-1)[:90].view(3, 30).t(),
        input[:1, :3].expand(30, 3),
        input[:, :1].expand(30, 3),
        input.view(-1)[1:91].view(30, 3),
    )
    for view in views:
        assert torch.equal(op.multi_embedding(weight, view, *arguments(layout)), composition(weight, view, layout))
        for grad_output in gradients:
            assert_exact(op, grad_output, view, layout, reference_backward)
    deep = input.view(5, 6, 12)[:, :, 1:4].transpose(0, 1)
    assert torch.equal(op.multi_embedding(weight, deep, *arguments(layout)), composition(weight, deep, layout))


def test_unaligned_and_strided_weight(op, device, dtype, make_indices):
    layout = TableLayout([60, 40], [16, 8])
    input = make_input(layout, make_indices, "uniform", 300, device=device)
    weight = make_weight(layout, dtype, device, offset=1)
    expected = composition(weight, input, layout)
    assert torch.equal(op.multi_embedding(weight, input, *arguments(layout)), expected)
    strided = torch.stack([weight, weight], 1)[:, 0]
    assert torch.equal(op.multi_embedding(strided, input, *arguments(layout)), expected)


@pytest.mark.parametrize("sizes", [([0, 3], [4, 2]), ([3, 3], [0, 2]), ([0], [0]), ([2, 2], [0, 0])])
def test_empty_tables(op, device, sizes, poison, make_grad, reference_backward):
    layout = TableLayout(*sizes)
    n = 0 if 0 in layout.num_embeddings else 5
    input = torch.ones(n, len(layout), dtype=torch.long, device=device)
    weight = make_weight(layout, device=device)
    assert torch.equal(op.multi_embedding(weight, input, *arguments(layout)), composition(weight, input, layout))
    poison(layout.numel, torch.float32, device)
    grad_output = make_grad((n, sum(layout.embedding_dims)), device=device, integers=True)
    assert_exact(op, grad_output, input, layout, reference_backward)


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_out_of_range_names_index_position_and_table(op, bad):
    layout = TableLayout([6, 4, 9], [5, 1, 8])
    input = torch.zeros(7, 3, dtype=torch.long)
    input[5, 1] = bad
    with pytest.raises(IndexError, match=rf"indices\[5, 1\] = {bad} is out of range for table 1 of 4 rows"):
        op.multi_embedding(make_weight(layout), input, *arguments(layout))
    with pytest.raises(IndexError, match=rf"indices\[5, 1\] = {bad} is out of range for table 1 of 4 rows"):
        op.multi_embedding_backward(torch.randn(7, 14), input, layout.numel, *arguments(layout))


@pytest.mark.parametrize(
    "sizes", [([60, 40, 7], 16), ([3000, 5, 70_000, 1], 5), ([7], 4), ([9] * 70, 1), ([50, 8], 600)]
)
def test_sums_round_once(
    op, device, dtype, index_dtype, deterministic, sizes, make_indices, make_grad, reference_backward, poison
):
    """Both ways: integers have exact sums, which 16 bits hold only if nothing is rounded on the way."""
    num_embeddings, dim = sizes
    columns = Columns(TableLayout(num_embeddings, [dim] * len(num_embeddings)), padding_idx=0, mode="sum")
    input = make_input(columns.layout, make_indices, "zipf", 900, index_dtype, device)
    weight = make_weight(columns.layout, torch.float64, device)
    for table in columns.layout.tables(weight):
        table.mul_(100).round_()
    expected = torch.stack([table[input[:, t].long()] for t, table in enumerate(columns.layout.tables(weight))]).sum(0)
    output = op.multi_embedding(weight.to(dtype), input, *column_arguments(columns))
    assert output.is_contiguous()
    if dtype != torch.bfloat16:  # whose 8 bits do not hold the terms
        assert torch.equal(output, expected.to(dtype))
    grad_output = make_grad((900, dim), dtype, device, integers=True)
    poison(columns.layout.numel, dtype, device)
    gradient = op.multi_embedding_backward(grad_output, input, columns.layout.numel, *column_arguments(columns))
    assert torch.equal(gradient, reference_gradient(grad_output, input, columns, reference_backward).to(dtype))


def test_sum_of_one_thread_equals_that_of_many(op, dtype, make_indices):
    columns = Columns(TableLayout([3000, 50, 9], [64] * 3), mode="sum")
    input = make_input(columns.layout, make_indices, "uniform", 20_000)
    weight = make_weight(columns.layout, dtype)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs.append(op.multi_embedding(weight, input, *column_arguments(columns)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("mode", ["concat", "sum"])
@pytest.mark.parametrize("table_of_column", [[0, 1, 1, 2], [2, 2, 0, 1, 2], [2, 1, 0]])
@pytest.mark.parametrize("n", [3, 4000])
def test_columns_that_share_tables(
    op, device, dtype, deterministic, mode, table_of_column, n, make_grad, reference_backward, poison
):
    """In any order. Integers again, so small that 16 bits hold each column's sum."""
    dims = [3, 3, 3] if mode == "sum" else [3, 16, 5]
    layout = TableLayout([50, 300, 9000], dims)
    columns = Columns(layout, table_of_column, [None, 1, -1], mode)
    input = torch.stack([torch.randint(layout.num_embeddings[table], (n,)) for table in table_of_column], 1).to(device)
    weight = make_weight(layout, dtype, device)
    tables = layout.tables(weight)
    rows = [tables[table][input[:, column]] for column, table in enumerate(table_of_column)]
    output = op.multi_embedding(weight, input, *column_arguments(columns))
    if mode == "concat":
        assert torch.equal(output, torch.cat(rows, -1))
    else:
        torch.testing.assert_close(output, torch.stack(rows).double().sum(0).to(dtype))
    grad_output = make_grad((n, columns.output_dim), dtype, device, integers=True).sign()
    poison(layout.numel, dtype, device)
    gradient = op.multi_embedding_backward(grad_output, input, layout.numel, *column_arguments(columns))
    assert gradient.shape == (layout.numel,)
    assert torch.equal(gradient, reference_gradient(grad_output, input, columns, reference_backward).to(dtype))


def test_tables_by_description_are_tables_by_lists(op, device, dtype, layout, make_indices):
    input = make_input(layout, make_indices, "uniform", 300, device=device)
    weight = make_weight(layout, dtype, device).requires_grad_()
    columns = Columns(layout, padding_idx=0)
    outputs = (
        op.multi_embedding(weight, input, *column_arguments(columns)),
        op.multi_embedding(weight, input, columns.description),
    )
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(output.square().nan_to_num().sum(), weight)[0] for output in outputs]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "tables, message",
    [
        ([[3, 2, 0, 2]], r"must be a contiguous int64 tensor \[n, 5\]"),
        ([[3, 2, 0, 2, -1.0]], "must be a contiguous int64 tensor"),
        ([], "must be a contiguous int64 tensor"),
        ([[3, 2, 0, 3, -1]], "tables must be packed, got the stride 3 for table 0"),
        ([[3, 2, -8, 2, -1]], "must lie within the weight's 32"),
        ([[3, 2, 30, 2, -1]], "table 0 of 3 x 2 elements at 30 must lie within the weight's 32"),
        ([[2**62, 4, 0, 4, -1]], "must lie within the weight's 32"),
        ([[3, 2, 0, 2, 3]], "padding_idx must be -1 or a row of 3 for table 0, got 3"),
        ([[-3, 2, 0, 2, -1]], "must not be negative"),
        ([[3, 2, 8, 2, -1], [3, 2, 4, 2, -1]], "tables must not overlap unless they are the same, got the offset 8"),
        ([[3, 2, 8, 2, -1], [2, 2, 8, 2, -1]], "tables must not overlap unless they are the same"),
        ([[3, 2, 8, 2, -1], [2, 3, 8, 3, -1]], "tables must not overlap unless they are the same"),
    ],
)
def test_descriptions_are_checked(op, tables, message):
    tables = torch.tensor(tables)
    with pytest.raises(RuntimeError, match=message):
        op.multi_embedding(torch.zeros(32), torch.zeros(1, len(tables), dtype=torch.long), tables)


def test_sums_need_one_dim(op):
    with pytest.raises(RuntimeError, match="a sum needs tables of one embedding_dim, got 2 and 3"):
        op.multi_embedding(torch.zeros(32), torch.zeros(1, 2, dtype=torch.long), [3, 2], [2, 3], [0, 8], [-1, -1], True)


def test_sum_of_more_tables_than_the_kernel_takes(op):
    columns = Columns(TableLayout([2] * 2500, [1] * 2500), mode="sum")
    weight = torch.ones(columns.layout.numel)
    output = op.multi_embedding(weight, torch.ones(3, 2500, dtype=torch.long), *column_arguments(columns))
    assert torch.equal(output, torch.full((3, 1), 2500.0))


def test_output_columns():
    columns = Columns(TableLayout([3, 5], [2, 1]), table_of_column=[1, 0, 1])
    assert output_columns(columns.key, torch.device("cpu")).tolist() == [
        [0, 1, 1, 2],
        [5, 3, 3, 5],
        [1, 2, 2, 1],
        [8, 0, 1, 8],
    ]


def test_sum_of_tables(device, dtype, index_dtype, make_indices):
    layout = TableLayout([60, 40, 7], [16, 16, 16])
    input = make_input(layout, make_indices, "uniform", 300, index_dtype, device)
    weight = make_weight(layout, dtype, device).nan_to_num_().requires_grad_()
    output = functional.multi_embedding(input, weight, *arguments(layout)[:2], mode="sum")
    expected = torch.stack([table[input[:, t].long()] for t, table in enumerate(layout.tables(weight))], -2).sum(-2)
    assert output.shape == (300, 16)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    counts = torch.zeros(layout.numel, device=device)
    for t, table in enumerate(layout.tables(counts)):
        table += torch.bincount(input[:, t], minlength=layout.num_embeddings[t])[:, None]
    assert torch.equal(weight.grad, counts.to(dtype))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_columns(op, reference_backward, data):
    """Random tables, columns, modes and padding on the CPU, and on the GPU where there is one."""
    draw = data.draw
    mode = draw(st.sampled_from(["concat", "sum"]), label="mode")
    dim = st.just(draw(st.integers(1, 40), label="dim")) if mode == "sum" else st.integers(1, 40)
    sizes = draw(st.lists(st.tuples(st.integers(1, 60), dim), min_size=1, max_size=5), label="sizes")
    again = draw(st.lists(st.integers(0, len(sizes) - 1), max_size=4), label="again")
    table_of_column = draw(st.permutations([*range(len(sizes)), *again]), label="table_of_column")
    padding_idx = [draw(st.none() | st.integers(-rows, rows - 1)) for rows, _ in sizes]
    columns = Columns(TableLayout(*zip(*sizes, strict=True)), table_of_column, padding_idx, mode)
    n = draw(st.integers(0, 200), label="n")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        input = torch.stack([torch.randint(sizes[table][0], (n,)) for table in table_of_column], 1).to(device)
        weight = make_weight(columns.layout, device=device)
        tables = columns.layout.tables(weight)
        rows = [tables[table][input[:, column]] for column, table in enumerate(table_of_column)]
        output = op.multi_embedding(weight, input, columns.description, columns.is_sum)
        torch.testing.assert_close(output, torch.stack(rows).sum(0) if mode == "sum" else torch.cat(rows, -1))
        grad_output = torch.randint(-8, 9, output.shape, device=device).float()
        gradient = op.multi_embedding_backward(grad_output, input, columns.layout.numel, *column_arguments(columns))
        assert torch.equal(gradient, reference_gradient(grad_output, input, columns, reference_backward).float())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tables(op, reference_backward, data):
    """Random tables, padding and offsets on the CPU, and on the GPU where there is one."""
    draw = data.draw
    sizes = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=9), label="sizes")
    layout = TableLayout(*zip(*sizes, strict=True))
    padding_idx = [draw(st.none() | st.integers(-rows, rows - 1)) for rows, _ in sizes]
    n = draw(st.integers(0, 200), label="n")
    offset = draw(st.integers(0, 9), label="offset")
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]), label="dtype")
    index_dtype = draw(st.sampled_from([torch.int32, torch.int64]), label="index_dtype")
    columns = sum(layout.embedding_dims)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        input = torch.stack([torch.randint(rows, (n,), dtype=index_dtype) for rows, _ in sizes], 1).to(device)
        weight = make_weight(layout, dtype, device, offset)
        assert torch.equal(op.multi_embedding(weight, input, *arguments(layout)), composition(weight, input, layout))
        grad_output = torch.randint(-8, 9, (offset + n * columns,), device=device).to(dtype)[offset:].view(n, columns)
        assert_exact(op, grad_output, input, layout, reference_backward, padding_idx)


def test_layout_is_for_ever():
    """Version 1: saved models depend on these numbers."""
    layout = TableLayout([3, 5, 1, 0, 4], [5, 2, 1, 7, 8])
    assert layout.offsets == (0, 16, 32, 40, 40)
    assert layout.numel == 72
    assert len(layout) == 5


def test_layouts_concatenate():
    first, second = TableLayout([3, 5], [5, 2]), TableLayout([7], [3])
    both = TableLayout(first.num_embeddings + second.num_embeddings, first.embedding_dims + second.embedding_dims)
    weights = make_weight(first), make_weight(second)
    for table, expected in zip(
        both.tables(torch.cat(weights)), first.tables(weights[0]) + second.tables(weights[1]), strict=True
    ):
        assert torch.equal(table, expected)


@pytest.mark.parametrize(
    "sizes, error, message",
    [
        (([3, 5], [2]), ValueError, "one entry per table, got 2 and 1 entries"),
        (([], []), ValueError, "at least one table"),
        (([3, -5], [2, 2]), ValueError, r"num_embeddings\[1\] must be >= 0, got -5"),
        (([3, 5], [2, 2.0]), TypeError, r"embedding_dims\[1\] must be an int, got float"),
        ((3, [2]), TypeError, "num_embeddings must be a sequence of ints"),
    ],
)
def test_layout_checks_its_sizes(sizes, error, message):
    with pytest.raises(error, match=message):
        TableLayout(*sizes)


@pytest.mark.parametrize("padding_idx", [3, -4, [None, 5], [0], [0, 0, 0]])
def test_layout_checks_padding(padding_idx):
    with pytest.raises(ValueError, match="padding_idx"):
        TableLayout([3, 5], [2, 2]).padding_indices(padding_idx)
