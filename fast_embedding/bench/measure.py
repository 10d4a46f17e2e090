"""What one table and many tables share: contenders that do the same lookup, checked against each other, then timed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .limits import Rates, Traffic, limits_us
from .timing import Call, CpuTimer, CudaTimer, Effort, Sampler, Timing, interleave

BASELINE = "nn.Embedding"
INDEX_ADD = "index_add_"
COMPILED = "torch.compile"
OFFSETS = "nn.Embedding, offset indices"
OURS = "fast_embedding"
OURS_COMPILED = "fast_embedding, torch.compile"
OURS_REPRODUCIBLE = "fast_embedding, reproducible"

# Relative error of a gradient in the norm: accumulation in some order and one rounding. A kernel that loses or doubles
# a row is orders of magnitude beyond. Only ours must keep it: torch's own add 16-bit values in 16 bits on some paths.
_GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Session:
    """One device with what was measured of it, and how much to do.

    ``compile`` measures torch.compile at every shape, ``compile_chosen`` at those of many tables that ask for it.
    """

    device: torch.device
    timer: CpuTimer | CudaTimer
    rates: Rates
    effort: Effort
    seed: int = 0
    compile: bool = False
    compile_chosen: bool = False
    reproducible: bool = False


def _untouched(call: Call) -> Call:
    return call


def _whole(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    return gradients


@dataclass(frozen=True)
class Contender:
    """One way to do a lookup.

    ``lookup`` takes nothing and returns the output, ``weights`` get the gradients, ``per_table`` brings these into the
    form of the baseline's, ``under`` runs a call in the contender's mode.
    """

    name: str
    lookup: Callable[[], Tensor]
    weights: tuple[Tensor, ...]
    per_table: Callable[[Sequence[Tensor]], Sequence[Tensor]] = field(default=_whole)
    under: Callable[[Call], Call] = field(default=_untouched)


def reproducibly(call: Call) -> Call:
    """Runs ``call`` under ``use_deterministic_algorithms``, without its debugging aid of NaN in all new memory."""

    def run() -> object:
        enabled = torch.are_deterministic_algorithms_enabled()
        fills: Any = torch.utils.deterministic  # a module with properties, which type checkers do not see
        filled = fills.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        fills.fill_uninitialized_memory = False
        try:
            return call()
        finally:
            fills.fill_uninitialized_memory = filled
            torch.use_deterministic_algorithms(enabled)

    return run


def measure(
    contenders: Sequence[Contender],
    grad_output: Tensor,
    exact_gradients: Sequence[Callable[[], Tensor]],
    moved: Traffic,
    session: Session,
    output_tolerance: float = 0,
) -> dict[str, object]:
    """Checks and times contenders that do the same lookup; the first is the baseline.

    Args:
        exact_gradients: of each of the baseline's weights, called one at a time: large tables fit once, not twice.
        output_tolerance: how far outputs may be apart, relative and in the norm, where they are sums.

    Returns:
        ``limit_us`` by pass; by contender and pass ``times`` (``forward``, ``backward``, ``both`` and on a GPU
        ``wall``: both, eager, host included), each a ``Timing`` as a dict, and ``share`` of the limit; by contender
        ``gradient_error`` against ``exact_gradients``, relative and in the norm; on a GPU by contender and pass
        ``extra_bytes``: the peak beyond inputs and outputs.

    Raises:
        ArithmeticError: an output differs from the baseline's, or our gradient from the exact one beyond rounding.
    """
    record: dict[str, object] = {
        "limit_us": limits_us(moved, session.rates),
        "gradient_error": _check(contenders, grad_output, exact_gradients, output_tolerance),
    }
    times: dict[str, dict[str, Timing]] = {contender.name: {} for contender in contenders}

    def time_pass(name: str, calls: dict[str, Call], make_sampler: Callable[[Call], Sampler]) -> None:
        samplers = {contender: make_sampler(call) for contender, call in calls.items()}
        for contender, timing in interleave(samplers, session.effort).items():
            times[contender][name] = timing

    both = {contender.name: contender.under(_both(contender, grad_output)) for contender in contenders}
    time_pass("forward", {c.name: c.under(c.lookup) for c in contenders}, session.timer.sampler)
    time_pass("backward", {c.name: c.under(_backward(c, grad_output)) for c in contenders}, session.timer.sampler)
    time_pass("both", both, session.timer.sampler)
    if isinstance(session.timer, CudaTimer):
        timer, calls = session.timer, session.effort.wall_calls
        time_pass("wall", both, lambda call: timer.wall_sampler(call, calls))
        record["extra_bytes"] = {contender.name: _extra_bytes(contender, grad_output) for contender in contenders}

    limit = limits_us(moved, session.rates)
    record["times"] = {
        name: {pass_: timing.as_dict() for pass_, timing in passes.items()} for name, passes in times.items()
    }
    record["share"] = {
        name: {pass_: limit[pass_] / timing.median for pass_, timing in passes.items() if pass_ in limit}
        for name, passes in times.items()
    }
    return record


def _backward(contender: Contender, grad_output: Tensor) -> Call:
    """The backward alone, over and over on one retained graph."""
    output = contender.under(contender.lookup)()
    assert isinstance(output, Tensor)
    return lambda: torch.autograd.grad(output, contender.weights, grad_output, retain_graph=True)


def _both(contender: Contender, grad_output: Tensor) -> Call:
    return lambda: torch.autograd.grad(contender.lookup(), contender.weights, grad_output)


def _check(
    contenders: Sequence[Contender],
    grad_output: Tensor,
    exact_gradients: Sequence[Callable[[], Tensor]],
    output_tolerance: float,
) -> dict[str, float]:
    """The relative error of each contender's gradient, after comparing the outputs."""
    tolerance = _GRADIENT_TOLERANCE[grad_output.dtype]
    expected_output = None
    errors = {}
    for contender in contenders:
        output, gradients = _outcome(contender, grad_output)
        if expected_output is None:
            expected_output = output
        elif not (
            torch.equal(output, expected_output)
            or relative_difference([output.double()], [expected_output.double()]) <= output_tolerance
        ):
            raise ArithmeticError(f"the output of {contender.name} differs from that of {contenders[0].name}")
        error = _gradient_error(contender.per_table(gradients), exact_gradients)
        if (
            contender.name in (OURS, OURS_COMPILED, OURS_REPRODUCIBLE) and not error <= tolerance
        ):  # so written that NaN fails
            raise ArithmeticError(
                f"the gradient of {contender.name} is off by {error:.1e} of its norm, more than {tolerance:.0e}"
            )
        errors[contender.name] = error
    return errors


def _gradient_error(gradients: Sequence[Tensor], exact_gradients: Sequence[Callable[[], Tensor]]) -> float:
    """``relative_difference`` with one exact gradient at a time in memory."""
    difference = reference = 0.0
    for gradient, make_exact in zip(gradients, exact_gradients, strict=True):
        exact = make_exact()
        reference = math.hypot(reference, _norm(exact))
        difference = math.hypot(difference, _norm(exact.sub_(gradient)))
    return difference / (reference or 1.0)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _outcome(contender: Contender, grad_output: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    results: list[tuple[Tensor, Sequence[Tensor]]] = []

    def step() -> None:
        output = contender.lookup()
        results.append((output.detach(), torch.autograd.grad(output, contender.weights, grad_output)))

    contender.under(step)()
    return results[0]


def exact_gradient(num_embeddings: int, indices: Tensor, grad_output: Tensor) -> Tensor:
    """One table's gradient in float64, or in float32 for the 16-bit types."""
    precise = torch.float32 if grad_output.dtype.itemsize == 2 else torch.float64
    gradient = torch.zeros(num_embeddings, grad_output.shape[1], dtype=precise, device=grad_output.device)
    return gradient.index_add_(0, indices, grad_output.to(precise))


def relative_difference(values: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """``|values - reference| / |reference|`` in the 2-norm over all tensors together, in the reference's precision."""
    differences = [_norm(a.to(b.dtype) - b) for a, b in zip(values, reference, strict=True)]
    return math.hypot(*differences) / (math.hypot(*map(_norm, reference)) or 1.0)


def _extra_bytes(contender: Contender, grad_output: Tensor) -> dict[str, int]:
    """Peak of the allocator beyond what stood before and what comes out."""

    def peak_beyond(call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        peak = torch.cuda.max_memory_allocated()
        outputs = (results,) if isinstance(results, Tensor) else tuple(results)  # type: ignore[arg-type]
        return max(0, peak - before - sum(tensor.nbytes for tensor in outputs))

    return {
        "forward": peak_beyond(contender.under(contender.lookup)),
        "backward": peak_beyond(contender.under(_backward(contender, grad_output))),
    }


def plain_lookup(weight: Tensor, indices: Tensor) -> Tensor:
    """``torch.nn.functional.embedding`` in the order of ``index_add_lookup``: what ``torch.compile`` gets."""
    return functional.embedding(indices, weight)


def index_add_lookup(weight: Tensor, indices: Tensor) -> Tensor:
    """A lookup whose backward is ``zeros.index_add_``: what is often written in place of ``nn.Embedding``."""
    return weight.index_select(0, indices)


def random_weight(num_embeddings: int, embedding_dim: int, dtype: torch.dtype, session: Session) -> Tensor:
    """Standard normal, as ``nn.Embedding`` begins."""
    return torch.randn(num_embeddings, embedding_dim, dtype=dtype, device=session.device)


def working_set_bytes(
    weight_numel: int, largest_table: int, output_numel: int, num_indices: int, element_size: int
) -> int:
    """An upper estimate of what measuring one shape holds at once.

    Weights, their copy where tables are packed, a gradient with what is summed into it, and one more; in the check of
    one table the exact gradient and what its norm takes; the incoming gradient, widened too, and an output per
    contender; indices and sort workspaces.
    """
    widened = 4 if element_size == 2 else 8
    return (
        weight_numel * (4 * element_size + (widened if element_size == 2 else 0))
        + largest_table * 3 * widened
        + output_numel * (6 * element_size + widened)
        + 128 * num_indices
    )
