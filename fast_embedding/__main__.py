"""The command line: ``python -m fast_embedding info | bench | selftest``; the console script is ``fast-embedding``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, _loader, ops
from .bench import environment
from .bench.shapes import DISTRIBUTIONS, SECTIONS, LookupShape

_DTYPES = ("float32", "float64", "float16", "bfloat16")

# Of what the build wrote down, what a person reads; the rest serves the messages.
_RECORDED = ("distribution", "version", "cuda", "cuda_architectures")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit code: 0 for success, 1 for a failure found, 2 for arguments that make no sense.
    """
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fast-embedding", description="Fast embedding layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fast-embedding {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="show versions, devices, and which native libraries load or why not")
    info.set_defaults(run=_info)

    selftest = commands.add_parser("selftest", help="check both layers on each device against PyTorch and float64")
    selftest.set_defaults(run=_selftest)

    bench = commands.add_parser(
        "bench",
        help="measure speed against nn.Embedding and the limit of the memory",
        description="Measures one table, many tables and two training runs, on a grid of shapes or on one's own shape.",
    )
    bench.set_defaults(run=_bench, usage_error=bench.error)
    extent = bench.add_mutually_exclusive_group()
    for preset, text in (
        ("smoke", "a few seconds, to see that all of it works"),
        ("quick", "the default on a CPU: the shapes up to some 150 MB, under 3 minutes on two cores"),
        ("full", "the default on a GPU: all shapes that fit, more repetitions, and the reproducible mode on a GPU"),
    ):
        extent.add_argument(f"--{preset}", dest="preset", action="store_const", const=preset, help=text)
    bench.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto (default) takes a GPU if there is"
    )
    bench.add_argument(
        "--dtype",
        action="append",
        choices=_DTYPES,
        help="may be repeated; by default float32, and bfloat16 if not --quick on a CPU",
    )
    bench.add_argument("--compile", action="store_true", help="also measure torch.compile, at every shape")
    bench.add_argument(
        "--only", choices=SECTIONS, help="one table, many tables, sparse gradients, or the training runs alone"
    )
    bench.add_argument("--threads", type=_positive, metavar="N", help="threads on the CPU")
    bench.add_argument("--seed", type=int, default=0, help="of indices, weights and training (default 0)")
    bench.add_argument("--json", type=Path, metavar="PATH", help="result file (default results/bench-<device>.json)")
    bench.add_argument(
        "--plots", type=Path, default=Path("results"), metavar="DIR", help="folder for the SVG plots (default results)"
    )
    own = bench.add_argument_group("one's own shape", "measured alone, without training; the first three go together")
    own.add_argument("--num-embeddings", type=_positive, metavar="V", help="rows of the table")
    own.add_argument("--dim", type=_positive, metavar="D", help="columns of the table")
    own.add_argument("--tokens", type=_positive, metavar="N", help="indices looked up at once")
    own.add_argument("--dist", choices=DISTRIBUTIONS, help="of the indices (default zipf)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _bench(options: argparse.Namespace) -> int:
    from .bench import runner

    own = (options.num_embeddings, options.dim, options.tokens)
    if any(own) and not all(own):
        options.usage_error("--num-embeddings, --dim and --tokens go together")
    if options.dist and not any(own):
        options.usage_error("--dist needs --num-embeddings, --dim and --tokens")
    if options.only and any(own):
        options.usage_error("--only is for the grid: one's own shape is measured alone")
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
        )
    except RuntimeError as error:
        options.usage_error(f"--device: {error}")
    if device.type not in ("cpu", "cuda"):
        options.usage_error(f"--device must be cpu or cuda, got {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        options.usage_error(f"--device {device}: torch {torch.__version__} finds no GPU")
    return runner.run(
        runner.Options(
            device=device,
            preset=options.preset,
            dtypes=tuple(getattr(torch, name) for name in options.dtype) if options.dtype else None,
            shape=LookupShape(*own, options.dist or "zipf") if all(own) else None,
            only=options.only,
            compile=options.compile,
            seed=options.seed,
            threads=options.threads,
            json=options.json,
            plots=options.plots,
        )
    )


def _selftest(_: argparse.Namespace) -> int:
    from .bench import selftest

    return selftest.run()


def _info(_: argparse.Namespace) -> int:
    status = _loader.status()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    recorded = status["built"] or {}
    built = ", ".join(f"{key} {_words(recorded[key])}" for key in _RECORDED if recorded.get(key))
    torch_facts = ", ".join(f"{key} {value}" for key, value in status["torch"].items() if key != "version")
    lines = [
        f"fast-embedding {status['version']}",
        f"installed as    {', '.join(f'{n} {v}' for n, v in status['distributions'].items()) or 'no distribution'}",
        f"built with      {built or 'nothing recorded'}",
        f"bindings        {_words(status['bindings']) or 'none prebuilt'}",
        f"python          {status['platform']['python']} on {status['platform']['system']}",
        f"torch           {status['torch']['version']} ({torch_facts})",
        *(f"{part:16}{_part_line(status[part])}" for part in ("binding", "cpu", "cuda")),
        *_gpu_lines(status["cuda"]),
    ]
    if status["conflict"]:
        lines.append(f"conflict        {status['conflict']}")
    unusable = [device for device in devices if not status[device]["loaded"]]
    if "cuda" in devices and "cuda" not in unusable and not any(_has_kernels(status["cuda"], n) for n in _gpus()):
        unusable.append("cuda")
    if not ops.native_platform():
        unusable = []
        lines.append("verdict         works, by PyTorch's own operators: this platform has no native libraries")
    elif unusable:
        lines.append(f"verdict         NOT usable on {' and '.join(unusable)}: see above")
    else:
        lines.append(f"verdict         usable on {' and '.join(devices)}")
    print("\n".join(lines))
    return 1 if unusable else 0


def _part_line(part: dict[str, Any]) -> str:
    if not part["loaded"]:
        return f"not loaded: {part['reason']}"
    details = (
        f"{key.replace('_', ' ')} {_words(value)}"
        for key, value in part.items()
        if key not in ("loaded", "path", "reason")
    )
    return ", ".join([f"loaded from {part['path']}", *details])


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _gpus() -> list[int]:
    return list(range(torch.cuda.device_count()))


def _has_kernels(cuda: dict[str, Any], number: int) -> bool:
    return _loader.runs_on(cuda["architectures"], torch.cuda.get_device_capability(number))


def _gpu_lines(cuda: dict[str, Any]) -> list[str]:
    if not torch.cuda.is_available():
        driver = environment.driver_version()
        return [f"gpu             no GPU that torch can use{f', though there is driver {driver}' if driver else ''}"]
    lines = [f"driver          {environment.driver_version() or 'unknown'}"]
    for number in _gpus():
        gpu = torch.cuda.get_device_properties(number)
        lines.append(
            f"cuda:{number:<11}{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.0f} GiB"
        )
        if cuda["loaded"] and not _has_kernels(cuda, number):
            lines[-1] += f": NO kernels for it, build from source with FAST_EMBEDDING_ARCHS={gpu.major}{gpu.minor}"
    return lines


if __name__ == "__main__":
    sys.exit(main())
