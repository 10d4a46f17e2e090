"""Interleaved timing: every contender is sampled once a round, so that drift of clocks and caches hits all alike.

On the GPU a sample is **device time**: the L2 is flushed, a sleep kernel holds the stream while the host enqueues the
call, and events around the call measure what the device alone takes. The host is then out of the picture, so it is
timed apart (``wall_sampler``). On the CPU a sample is wall time, over as many calls as one sample needs to be read
well off the clock.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

Call = Callable[[], object]
Sampler = Callable[[], float]  # one sample, in microseconds

_cuda: Any = torch.cuda  # events and _sleep have no types

_FLUSH_BYTES = 256 << 20
_WARM_UP_CALLS = 3
# A sample shorter than this drowns in the resolution of the clock and in interrupts.
_SHORTEST_CPU_SAMPLE_US = 200.0
# About 0.25 ms and 35 ms at 1.9 GHz: the longest covers the launches of 26 lookups with their backwards, 6 ms of host.
_FIRST_SLEEP_CYCLES = 1 << 19
_LONGEST_SLEEP_CYCLES = 1 << 26


@dataclass(frozen=True)
class Effort:
    """How long to measure one call of all contenders: at least ``min_rounds``, then until ``seconds`` are over."""

    min_rounds: int
    max_rounds: int
    seconds: float
    wall_calls: int = 10


@dataclass(frozen=True)
class Timing:
    """Microseconds a call. ``host_bound``: the call could not be queued ahead (it synchronises), host time included."""

    median: float
    p10: float
    p90: float
    repetitions: int
    host_bound: bool = False

    def as_dict(self) -> dict[str, object]:
        """For JSON, to the nanosecond."""
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self).items()}


def summarise(samples: list[float], *, host_bound: bool = False) -> Timing:
    """Median and quantiles of at least one sample."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    return Timing(statistics.median(samples), deciles[0], deciles[-1], len(samples), host_bound)


def interleave(samplers: Mapping[str, Sampler], effort: Effort) -> dict[str, Timing]:
    """Samples each in turn, the first one rotating from round to round.

    Args:
        samplers: by name; each returns one sample in microseconds.
        effort: the number of rounds.
    """
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    with _no_garbage_collection():
        for round_ in range(effort.max_rounds):
            if round_ >= effort.min_rounds and time.perf_counter() - start > effort.seconds:
                break
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(samplers[name]())
    return {
        name: summarise(values, host_bound=getattr(samplers[name], "host_bound", False))
        for name, values in samples.items()
    }


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class CpuTimer:
    """Wall time on the CPU. The caches are not flushed: rows are warm or cold as the call before left them."""

    def sampler(self, call: Call) -> Sampler:
        """Warms the call up and returns its sampler."""
        call()
        calls = max(1, round(_SHORTEST_CPU_SAMPLE_US / _wall_us(call, 1)))
        return lambda: _wall_us(call, calls)


class CudaTimer:
    """Device time on the current CUDA device; see the module's head."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def sampler(self, call: Call) -> Sampler:
        """Warms the call up and returns its sampler."""
        for _ in range(_WARM_UP_CALLS):
            call()
        torch.cuda.synchronize()
        return _QueuedSampler(call, self._flush)

    def wall_sampler(self, call: Call, calls: int) -> Sampler:
        """Wall time of ``calls`` eager calls in a row, launches and device, divided by their number."""

        def sample() -> float:
            torch.cuda.synchronize()
            return _wall_us(call, calls, finish=torch.cuda.synchronize)

        return sample


class _QueuedSampler:
    """Times a call on the device alone, sleeping long enough for the host to enqueue all of it."""

    def __init__(self, call: Call, flush: torch.Tensor) -> None:
        self._call = call
        self._flush = flush
        self._cycles = _FIRST_SLEEP_CYCLES
        self.host_bound = False

    def __call__(self) -> float:
        start, end = _cuda.Event(enable_timing=True), _cuda.Event(enable_timing=True)
        while True:
            self._flush.zero_()
            _cuda._sleep(self._cycles)
            start.record()
            self._call()
            end.record()
            # The start event still pending proves that the host was done before the device began.
            queued_ahead = not start.query()
            end.synchronize()
            if queued_ahead or self.host_bound:
                return float(start.elapsed_time(end)) * 1e3
            if self._cycles >= _LONGEST_SLEEP_CYCLES:
                self.host_bound = True
                self._cycles = _FIRST_SLEEP_CYCLES
            else:
                self._cycles *= 2


def _wall_us(call: Call, calls: int, finish: Call | None = None) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if finish is not None:
        finish()
    return (time.perf_counter() - start) * 1e6 / calls
