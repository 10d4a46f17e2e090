"""The benchmark's grid as pytest-benchmark cases: for comparing two builds with its own tools.

    pytest tests/test_perf.py --benchmark-autosave

It runs only when it is named: pyproject.toml leaves it out of the default run. No case asserts a time. The times are
eager wall times; ``fast-embedding bench`` is the better instrument: interleaved, device time on a GPU, the
limit beside each number.
"""

import pytest
import torch

from fast_embedding.bench import environment, lookup, measure, multi, shapes
from fast_embedding.bench.limits import Rates
from fast_embedding.bench.timing import CpuTimer, Effort

pytest.importorskip("pytest_benchmark")

# What a shape's weight or output may hold on a CPU: the grid's largest take a second a step there.
CPU_MAX_NUMEL = 40 * 10**6
USABLE_MEMORY = 0.8


def grid(name, shapes_of_it, contenders):
    """Every combination of a shape with device, dtype, contender and passes."""

    def decorate(test):
        for names, values, ids in (
            (name, shapes_of_it, lambda shape: shape.label),
            ("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"], None),
            ("dtype", [torch.float32, torch.bfloat16], lambda dtype: str(dtype).removeprefix("torch.")),
            ("contender", contenders, None),
            ("passes", ["forward", "both"], None),
        ):
            test = pytest.mark.parametrize(names, values, ids=ids)(test)
        return test

    return decorate


def session_on(device):
    # Only the contenders are taken from it; the clock is pytest-benchmark's.
    return measure.Session(torch.device(device), CpuTimer(), Rates(1, 1, 0), Effort(1, 1, 0))


def skip_unless_it_fits(device, needed_bytes, numel):
    if device == "cpu" and numel > CPU_MAX_NUMEL:
        pytest.skip("takes seconds a step on a CPU")
    if needed_bytes > USABLE_MEMORY * environment.available_bytes(torch.device(device)):
        pytest.skip("does not fit the memory of this device")


def run(benchmark, entries, contender, grad_output, passes):
    (entry,) = [entry for entry in entries if entry.name == contender]

    def step():
        output = entry.lookup()
        if passes == "both":
            torch.autograd.grad(output, entry.weights, grad_output)
        if grad_output.is_cuda:
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=15, warmup_rounds=2)


@grid("shape", shapes.LOOKUP_SHAPES, [measure.BASELINE, measure.INDEX_ADD, measure.OURS])
def test_lookup(benchmark, shape, device, dtype, contender, passes):
    numel = max(shape.num_embeddings, shape.num_indices) * shape.embedding_dim
    skip_unless_it_fits(device, lookup.required_bytes(shape, dtype), numel)
    benchmark.group = f"{shape.label}, {device}, {dtype}, {passes}"
    session = session_on(device)
    weight = measure.random_weight(shape.num_embeddings, shape.embedding_dim, dtype, session)
    entries = lookup.contenders(weight, shape.draw(0).to(device), session)
    grad_output = torch.randn(shape.num_indices, shape.embedding_dim, dtype=dtype, device=device)
    run(benchmark, entries, contender, grad_output, passes)


@grid("shape", shapes.multi_shapes(), [measure.BASELINE, measure.OURS])
def test_multi(benchmark, shape, device, dtype, contender, passes):
    numel = max(shape.weight_numel, shape.num_rows * sum(shape.embedding_dims))
    skip_unless_it_fits(device, multi.required_bytes(shape, dtype), numel)
    benchmark.group = f"{shape.label}, {device}, {dtype}, {passes}"
    session = session_on(device)
    embeddings = [
        torch.nn.Embedding(rows, dim, _weight=measure.random_weight(rows, dim, dtype, session))
        for rows, dim in zip(shape.num_embeddings, shape.embedding_dims, strict=True)
    ]
    entries = multi.contenders(embeddings, shape.draw(0).to(device), session, shape.mode)
    grad_output = torch.randn(shape.num_rows, shape.output_dim, dtype=dtype, device=device)
    run(benchmark, entries, contender, grad_output, passes)
