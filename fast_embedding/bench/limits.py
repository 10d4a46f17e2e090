"""The limit of a lookup: the time of the fewest bytes that it must move, at the speed this device moves bytes.

    forward   (N * 8 indices + U * D * b rows read + N * D * b output) / copy rate
    backward  (N * 8 indices + N * D * b gradient read) / copy rate + V * D * b dense gradient / fill rate

V rows in the table, D columns, N indices, U distinct rows among them, b bytes an element; tables whose rows are added
share one output and one gradient of it; on the GPU each of the two
takes at least one launch. Copy and fill rate are measured at the start of a run, on buffers far beyond any cache. On a
CPU small lookups stay in the caches and can beat this limit.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .timing import CpuTimer, CudaTimer, Effort, interleave

_INDEX_BYTES = 8
# What an empty kernel reads between two events on an H200.
_CUDA_LAUNCH_US = 3.0


@dataclass(frozen=True)
class Rates:
    """Bytes a second. A copy counts its reads and its writes."""

    copy: float
    fill: float
    launch_us: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Traffic:
    """The fewest bytes that forward and backward move; ``dense_gradient`` is the part that is only written."""

    forward: int = 0
    backward: int = 0
    dense_gradient: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.forward + other.forward,
            self.backward + other.backward,
            self.dense_gradient + other.dense_gradient,
        )

    def without(self, num_bytes: int) -> "Traffic":
        """The same with fewer bytes each way, but for the gradient that is written."""
        return Traffic(self.forward - num_bytes, self.backward - num_bytes, self.dense_gradient)


def traffic(*, num_embeddings: int, embedding_dim: int, num_indices: int, distinct: int, element_size: int) -> Traffic:
    """The traffic of one table; that of several is their sum."""
    row = embedding_dim * element_size
    indices = num_indices * _INDEX_BYTES
    return Traffic(
        forward=indices + (distinct + num_indices) * row,
        backward=indices + num_indices * row,
        dense_gradient=num_embeddings * row,
    )


def limits_us(moved: Traffic, rates: Rates) -> dict[str, float]:
    """Microseconds for ``forward``, ``backward`` and ``both``, one launch each of the first two."""
    forward = moved.forward / rates.copy * 1e6 + rates.launch_us
    backward = (moved.backward / rates.copy + moved.dense_gradient / rates.fill) * 1e6 + rates.launch_us
    return {"forward": forward, "backward": backward, "both": forward + backward}


def count_distinct(indices: Tensor) -> int:
    return int(torch.unique(indices).numel())


def measure_rates(device: torch.device, timer: CpuTimer | CudaTimer) -> Rates:
    """Copies and fills a large buffer: 1 GB on a GPU, 256 MB on a CPU."""
    size = 1 << 30 if device.type == "cuda" else 1 << 28
    source = torch.zeros(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    effort = Effort(min_rounds=5, max_rounds=11, seconds=1.0)
    samplers = {
        "copy": timer.sampler(lambda: target.copy_(source)),
        "fill": timer.sampler(target.zero_),
    }
    times = interleave(samplers, effort)
    return Rates(
        copy=2 * size / times["copy"].median * 1e6,
        fill=size / times["fill"].median * 1e6,
        launch_us=_CUDA_LAUNCH_US if device.type == "cuda" else 0.0,
    )
