"""One run of the benchmark: what to measure on this device, in which order, and the record that comes of it."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from fast_embedding import ops

from . import console, environment, lookup, multi, report, sparse, streams, training
from .limits import measure_rates
from .measure import Session
from .shapes import LOOKUP_SHAPES, SPARSE_SHAPES, LookupShape, MultiShape, multi_shapes
from .timing import CpuTimer, CudaTimer, Effort
from .training import TrainingSize

SCHEMA = 1

PRESETS = ("smoke", "quick", "full")

# On the progress bar: a training run takes as long as several shapes.
_TRAINING_WEIGHT = 4

# Of the available memory: the rest is for the allocator's rounding and for other processes.
_USABLE_MEMORY = 0.85

Shape = TypeVar("Shape", LookupShape, MultiShape)


@dataclass(frozen=True)
class Preset:
    """How much a run does. A shape is measured if it keeps the three sizes.

    ``multi_effort`` is that of many tables, if it is another: their slowest peers take hundreds of launches a call.
    """

    effort: Effort
    training: TrainingSize
    dtypes: tuple[torch.dtype, ...]
    multi_effort: Effort | None = None
    reproducible: bool = False
    compile_chosen: bool = False
    max_indices: float = float("inf")
    max_weight_numel: float = float("inf")
    max_output_numel: float = float("inf")

    def admits(self, *, indices: int, weight_numel: int, output_numel: int) -> bool:
        return (
            indices <= self.max_indices
            and weight_numel <= self.max_weight_numel
            and output_numel <= self.max_output_numel
        )


_FLOAT32 = (torch.float32,)
_BOTH = (torch.float32, torch.bfloat16)
_TINY_TRAINING = TrainingSize(
    steps=24, vocabulary=1000, token_dim=16, context=4, token_batch=64, tabular_batch=256, hidden=32
)
_CPU_TRAINING = TrainingSize(
    steps=200, vocabulary=5000, token_dim=64, context=8, token_batch=256, tabular_batch=4096, hidden=64
)
_CUDA_TRAINING = TrainingSize(
    steps=300, vocabulary=50257, token_dim=256, context=16, token_batch=2048, tabular_batch=65536, hidden=512
)
_SMOKE = Preset(
    Effort(min_rounds=3, max_rounds=3, seconds=0, wall_calls=2),
    _TINY_TRAINING,
    _FLOAT32,
    max_indices=16384,
    max_weight_numel=10**7,
    max_output_numel=10**6,
)

_PRESETS = {
    ("smoke", "cpu"): _SMOKE,
    ("smoke", "cuda"): _SMOKE,
    # At most about 160 MB a table or an output: the whole in two to three minutes on two cores.
    ("quick", "cpu"): Preset(
        Effort(min_rounds=3, max_rounds=50, seconds=0.5),
        _CPU_TRAINING,
        _FLOAT32,
        max_indices=262144,
        max_weight_numel=40 * 10**6,
        max_output_numel=32 * 10**6,
    ),
    ("full", "cpu"): Preset(Effort(min_rounds=5, max_rounds=100, seconds=3), _CPU_TRAINING, _BOTH),
    ("quick", "cuda"): Preset(Effort(min_rounds=7, max_rounds=11, seconds=0.25, wall_calls=5), _CUDA_TRAINING, _BOTH),
    ("full", "cuda"): Preset(
        Effort(min_rounds=15, max_rounds=31, seconds=1),
        _CUDA_TRAINING,
        _BOTH,
        multi_effort=Effort(min_rounds=7, max_rounds=15, seconds=0.2),
        reproducible=True,
        compile_chosen=True,
    ),
}


@dataclass(frozen=True)
class Options:
    """What the command line asks for; ``None`` leaves it to the preset or the device.

    ``shape`` is one's own: it alone is measured, without training. ``only`` is one of ``shapes.SECTIONS``.
    """

    device: torch.device
    preset: str | None = None
    only: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    shape: LookupShape | None = None
    compile: bool = False
    seed: int = 0
    threads: int | None = None
    json: Path | None = None
    plots: Path = Path("results")


def run(options: Options) -> int:
    """Measures, prints tables, writes the JSON and the plots.

    Returns:
        The exit code: 1 if a shape failed or a pair of loss curves disagrees.
    """
    device = options.device
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    if ops.native_platform():
        try:
            ops.require(device.type)  # before minutes of work
        except RuntimeError as error:
            print(f"FAILED: {error}")
            return 1

    busy = environment.load()
    if busy is not None and busy > (os.cpu_count() or 1):
        print(f"this machine is busy (load {busy} on {os.cpu_count()} CPUs): expect noise, on the CPU above all")
    result = measure(options)

    kind = "-own" if options.shape else f"-{options.only}" if options.only else ""
    path = options.json or Path("results") / f"bench-{device.type}{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.to_json(result))

    for table in report.summaries(result):
        console.show(table)
    for line in report.left_out(result):
        print(line)
    written = [path, *(report.write_plots([result], options.plots) if options.shape is None else ())]
    print("written: " + ", ".join(map(str, written)))
    print(f"with limits, quantiles and all contenders: python -m fast_embedding.bench.report {path} --markdown FILE")
    problems = report.problems(result)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def measure(options: Options) -> dict[str, Any]:
    """The run itself. Returns the record that the JSON file holds."""
    device = options.device
    name = options.preset or ("full" if device.type == "cuda" else "quick")
    preset = _PRESETS[name, device.type]
    dtypes = options.dtypes or preset.dtypes
    timer = CudaTimer(device) if device.type == "cuda" else CpuTimer()
    rates = measure_rates(device, timer)
    session = Session(
        device=device,
        timer=timer,
        rates=rates,
        effort=preset.effort,
        seed=options.seed,
        compile=options.compile,
        compile_chosen=preset.compile_chosen,
        reproducible=preset.reproducible,
    )
    multi_session = replace(session, effort=preset.multi_effort or preset.effort)

    trains = options.shape is None and options.only in (None, "training")
    lookup_cases, multi_cases, sparse_cases, left_out = _cases(options, preset)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment.describe(device),
        "settings": {
            "preset": name,
            "seed": options.seed,
            "compile": options.compile,
            "effort": asdict(preset.effort),
            "multi_effort": asdict(multi_session.effort),
        },
        "rates": rates.as_dict(),
        "corpus": streams.text().summary() if trains or any(c.distribution == "text" for c in lookup_cases) else None,
        "lookup": [],
        "multi": [],
        "sparse": [],
        "training": [],
        "skipped": left_out,
        "failures": [],
    }
    steps = (
        (len(lookup_cases) + len(multi_cases)) * len(dtypes)
        + len(sparse_cases)
        + (2 * _TRAINING_WEIGHT if trains else 0)
    )
    with console.progress(steps) as progress:
        run_case = _CaseRunner(result, device, progress)
        for case in lookup_cases:
            for dtype in dtypes:
                run_case.shape("lookup", case, dtype, lookup.required_bytes, lookup.run, session)
        for multi_case in multi_cases:
            for dtype in dtypes:
                run_case.shape("multi", multi_case, dtype, multi.required_bytes, multi.run, multi_session)
        for case in sparse_cases:
            run_case.shape("sparse", case, dtypes[0], sparse.required_bytes, sparse.run, session)
        if trains:
            for train in (training.run_tokens, training.run_tabular):
                run_case.train(train, preset.training, options.seed)
    return result


def _cases(
    options: Options, preset: Preset
) -> tuple[Sequence[LookupShape], Sequence[MultiShape], Sequence[LookupShape], list[dict[str, str]]]:
    """The shapes to measure, and those that the preset leaves out with the reason."""
    if options.shape is not None:
        return [options.shape], [], [], []

    def admits_lookup(shape: LookupShape) -> bool:
        return preset.admits(
            indices=shape.num_indices,
            weight_numel=shape.num_embeddings * shape.embedding_dim,
            output_numel=shape.num_indices * shape.embedding_dim,
        )

    def admits_multi(shape: MultiShape) -> bool:
        return preset.admits(
            indices=shape.num_rows * shape.num_tables,
            weight_numel=shape.weight_numel,
            output_numel=shape.num_rows * sum(shape.embedding_dims),
        )

    all_lookups = LOOKUP_SHAPES if options.only in (None, "lookup") else ()
    all_multi = multi_shapes() if options.only in (None, "multi") else ()
    all_sparse = SPARSE_SHAPES if options.only in (None, "sparse") else ()
    lookups = [shape for shape in all_lookups if admits_lookup(shape)]
    multis = [shape for shape in all_multi if admits_multi(shape)]
    sparses = [shape for shape in all_sparse if admits_lookup(shape)]
    left_out = [shape.label for shape in all_lookups if shape not in lookups]
    left_out += [shape.label for shape in all_multi if shape not in multis]
    left_out += [f"sparse, {shape.label}" for shape in all_sparse if shape not in sparses]
    return (
        lookups,
        multis,
        sparses,
        [{"case": label, "reason": "larger than this preset measures"} for label in left_out],
    )


class _CaseRunner:
    """Runs cases one by one; what fails is noted in the result and does not end the run."""

    def __init__(self, result: dict[str, Any], device: torch.device, progress: console.Progress) -> None:
        self._result = result
        self._device = device
        self._progress = progress
        self._device_lost = False

    def shape(
        self,
        section: str,
        shape: Shape,
        dtype: torch.dtype,
        required_bytes: Callable[[Shape, torch.dtype], int],
        measure_shape: Callable[[Shape, torch.dtype, Session], dict[str, object]],
        session: Session,
    ) -> None:
        case = f"{shape.label}, {str(dtype).removeprefix('torch.')}"
        with self._noting_failure(case):
            needed = required_bytes(shape, dtype)
            usable = int(environment.available_bytes(self._device) * _USABLE_MEMORY)
            if needed > usable:
                reason = f"needs {needed / 2**30:.1f} GiB, {usable / 2**30:.1f} GiB are usable"
                self._result["skipped"].append({"case": case, "reason": reason})
            else:
                self._result[section].append(measure_shape(shape, dtype, session))
        self._progress.advance()

    def train(
        self,
        run_training: Callable[[TrainingSize, torch.device, int, Callable[[], None]], dict[str, object]],
        size: TrainingSize,
        seed: int,
    ) -> None:
        case = run_training.__name__.replace("run_", "training: ")
        with self._noting_failure(case):
            share = _TRAINING_WEIGHT / size.steps
            record = run_training(size, self._device, seed, lambda: self._progress.advance(share))
            self._result["training"].append(record)

    @contextlib.contextmanager
    def _noting_failure(self, case: str) -> Iterator[None]:
        self._progress.describe(case)
        try:
            if self._device_lost:
                raise RuntimeError("not run: the GPU stopped answering in an earlier case")
            yield
        except Exception as error:  # whatever it is, the other cases can still run
            message = f"{type(error).__name__}: {error}"
            self._result["failures"].append({"case": case, "error": message})
            self._progress.print(f"{case}: {message}")
        if self._device.type == "cuda" and not self._device_lost:
            try:
                # One shape's blocks do not fit the next one's sizes.
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                self._device_lost = True  # a failed kernel ends the CUDA context for good
