"""Sparse gradients: a training step of one table with ``SparseAdam``, ``FastEmbedding`` against ``nn.Embedding``.

Both wait for the device in every step, ours for the number of rows, torch's where the optimizer coalesces the gradient.
So on a GPU what is measured is wall time, of several steps in a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fast_embedding import FastEmbedding

from .limits import count_distinct
from .measure import BASELINE, OURS, Session, exact_gradient, random_weight, relative_difference
from .shapes import LookupShape
from .timing import Call, CudaTimer, interleave

# Of our values against float64, in the norm: float32 sums.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Model:
    layer: nn.Embedding
    optimizer: torch.optim.Optimizer
    indices: Tensor
    grad_output: Tensor

    def gradient(self) -> Tensor:
        """As optimizers take it: coalesced."""
        (gradient,) = torch.autograd.grad(self.layer(self.indices), self.layer.weight, self.grad_output)
        return gradient.coalesce()

    def step(self) -> None:
        self.optimizer.zero_grad()
        torch.autograd.backward(self.layer(self.indices), self.grad_output)
        self.optimizer.step()


def required_bytes(shape: LookupShape, dtype: torch.dtype) -> int:
    """Device memory that ``run`` may need: a weight and two models of it with two moments each, an exact gradient."""
    weights = shape.num_embeddings * shape.embedding_dim
    outputs = shape.num_indices * shape.embedding_dim
    return weights * (7 * dtype.itemsize + 16) + outputs * (8 * dtype.itemsize + 8) + 128 * shape.num_indices


def run(shape: LookupShape, dtype: torch.dtype, session: Session) -> dict[str, object]:
    """Checks and times one shape.

    Returns:
        The shape's own numbers; by contender ``times``, of ``gradient`` (forward, backward, coalesced) and of ``step``
        (that and the optimizer), each a ``Timing`` as a dict; ``gradient_error`` of ours against float64.

    Raises:
        ArithmeticError: our gradient has other rows than torch's, or values that are off by more than rounding.
    """
    indices = shape.draw(session.seed).to(session.device)
    torch.manual_seed(session.seed)
    weight = random_weight(shape.num_embeddings, shape.embedding_dim, dtype, session)
    grad_output = torch.randn(shape.num_indices, shape.embedding_dim, dtype=dtype, device=session.device)

    def model(layer_type: type[nn.Embedding]) -> _Model:
        layer = layer_type(shape.num_embeddings, shape.embedding_dim, sparse=True, _weight=weight.clone())
        return _Model(layer, torch.optim.SparseAdam(layer.parameters(), lr=1e-3), indices, grad_output)

    models = {BASELINE: model(nn.Embedding), OURS: model(FastEmbedding)}
    error = _check(models, shape, indices, grad_output)
    times: dict[str, dict[str, object]] = {name: {} for name in models}
    passes: dict[str, dict[str, Call]] = {
        "gradient": {name: contender.gradient for name, contender in models.items()},
        "step": {name: contender.step for name, contender in models.items()},
    }
    for pass_, calls in passes.items():
        samplers = {name: _sampler(call, session) for name, call in calls.items()}
        for name, timing in interleave(samplers, session.effort).items():
            times[name][pass_] = timing.as_dict()
    return {
        **shape.as_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "distinct": count_distinct(indices),
        "gradient_error": error,
        "times": times,
    }


def _sampler(call: Call, session: Session) -> Callable[[], float]:
    if not isinstance(session.timer, CudaTimer):
        return session.timer.sampler(call)
    call()
    return session.timer.wall_sampler(call, session.effort.wall_calls)


def _check(models: dict[str, _Model], shape: LookupShape, indices: Tensor, grad_output: Tensor) -> float:
    theirs, ours = (models[name].gradient() for name in (BASELINE, OURS))
    if not torch.equal(ours.indices(), theirs.indices()):
        raise ArithmeticError(f"the sparse gradient of {OURS} has other rows than that of {BASELINE}")
    exact = exact_gradient(shape.num_embeddings, indices, grad_output).index_select(0, ours.indices()[0])
    error = relative_difference([ours.values()], [exact])
    if not error <= _TOLERANCE:  # so written that NaN fails
        raise ArithmeticError(f"the sparse gradient of {OURS} is off by {error:.1e} of its norm")
    return error
