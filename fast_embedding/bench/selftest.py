"""A quick numeric check of both layers on each device there is, against ATen and float64."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fast_embedding import FastEmbedding, FastMultiEmbedding, ops

from .measure import relative_difference
from .shapes import draw_indices

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DISTRIBUTIONS = ("uniform", "zipf", "one")
_NUM_INDICES = 5000

Check = tuple[str, Callable[[], str | None]]  # a name, and a call that returns what is wrong


def run() -> int:
    """Runs all checks and prints a line for each device, and for each check that fails.

    Returns:
        The exit code: 1 if a check failed or a device's native library does not load.
    """
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    failed = False
    for device in devices:
        name = "cpu" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
        if ops.native_platform():
            try:
                ops.require(device.type)
            except RuntimeError as error:
                print(f"{name}: the native library does not load: {error}")
                failed = True
                continue
        passed = total = 0
        for check, call in _checks(device):
            total += 1
            wrong = call()
            if wrong is None:
                passed += 1
            else:
                print(f"{name}: {check}: {wrong}")
        print(f"{name}: {passed} of {total} checks passed")
        failed |= passed < total
    return 1 if failed else 0


def _checks(device: torch.device) -> Iterator[Check]:
    for dtype in _DTYPES:
        for distribution in _DISTRIBUTIONS:
            for size in ((3, 5), (100, 16), (5000, 64)):
                name = f"FastEmbedding{size} {str(dtype).removeprefix('torch.')} {distribution}"
                yield name, partial(_check_single, size, dtype, distribution, device)
            name = f"FastMultiEmbedding {str(dtype).removeprefix('torch.')} {distribution}"
            yield name, partial(_check_multi, dtype, distribution, device)


def _check_single(size: tuple[int, int], dtype: torch.dtype, distribution: str, device: torch.device) -> str | None:
    indices = draw_indices(size[0], _NUM_INDICES, distribution, seed=0).view(50, -1).to(device)
    reference = nn.Embedding(*size, padding_idx=0, device=device, dtype=dtype)
    ours = FastEmbedding(*size, padding_idx=0, _weight=reference.weight)
    return _compare(
        ours(indices), [ours.weight], lambda g: g, reference(indices), [reference.weight], [(size[0], indices, 0)]
    )


def _check_multi(dtype: torch.dtype, distribution: str, device: torch.device) -> str | None:
    sizes = [(3, 5), (100, 16), (5000, 8)]
    columns = [draw_indices(rows, _NUM_INDICES, distribution, seed=rows) for rows, _ in sizes]
    indices = torch.stack(columns, dim=1).to(device)
    references = [nn.Embedding(*size, device=device, dtype=dtype) for size in sizes]
    ours = FastMultiEmbedding.from_embeddings(references)
    expected = torch.cat([embedding(indices[:, table]) for table, embedding in enumerate(references)], dim=1)
    return _compare(
        ours(indices),
        [ours.weight],
        lambda gradients: ours.layout.tables(gradients[0]),
        expected,
        [embedding.weight for embedding in references],
        [(rows, indices[:, table], -1) for table, (rows, _) in enumerate(sizes)],
    )


def _compare(
    output: Tensor,
    weights: Sequence[Tensor],
    per_table: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    expected_output: Tensor,
    expected_weights: Sequence[Tensor],
    tables: Sequence[tuple[int, Tensor, int]],
) -> str | None:
    """The output must be ATen's to the bit, the gradient no further from float64 than ATen's or than rounding.

    ``tables`` holds rows, indices and padding row (-1: none) of each table.
    """
    if not torch.equal(output, expected_output):
        return "the output differs from nn.Embedding's"
    generator = torch.Generator(device=output.device).manual_seed(1)
    grad_output = torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)
    gradients = per_table(torch.autograd.grad(output, weights, grad_output))
    atens = torch.autograd.grad(expected_output, expected_weights, grad_output)

    exact = []
    widths = [weight.shape[1] for weight in expected_weights]
    for (rows, indices, padding_idx), slice_ in zip(
        tables, torch.split(grad_output.double(), widths, dim=-1), strict=True
    ):
        table = slice_.new_zeros(rows, slice_.shape[-1])
        table.index_add_(0, indices.reshape(-1), slice_.reshape(-1, slice_.shape[-1]))
        if padding_idx >= 0:
            table[padding_idx] = 0
        exact.append(table)
    error = relative_difference([gradient.double() for gradient in gradients], exact)
    allowed = max(relative_difference([gradient.double() for gradient in atens], exact), _rounding(output.dtype))
    if not error <= allowed:  # so written that NaN fails
        return f"the gradient is {error:.1e} off float64, allowed {allowed:.1e}"
    return None


def _rounding(dtype: torch.dtype) -> float:
    """What a sound gradient may be off: half a unit where it is rounded once, a random walk where each addition is."""
    epsilon = torch.finfo(dtype).eps
    return epsilon / 2 if dtype.itemsize == 2 else epsilon * math.sqrt(_NUM_INDICES)
