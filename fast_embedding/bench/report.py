"""Tables and plots, made from the JSON of one or more runs and from nothing else.

python -m fast_embedding.bench.report docs/results/*.json --markdown docs/performance.md --plots docs/
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .console import Table
from .measure import BASELINE, COMPILED, INDEX_ADD, OFFSETS, OURS, OURS_COMPILED, OURS_REPRODUCIBLE
from .shapes import FBGEMM, span

Record = dict[str, Any]
Cell = Callable[[Record], float | None]
Describe = Callable[[Record], dict[str, str]]

_PLOTS = {"lookup": "fast_embedding_perf_results.svg", "multi": "fast_multi_embedding_perf_results.svg"}
_PASSES = {"forward": "fwd", "backward": "bwd", "both": "fwd + bwd"}


# ---- Reading and writing a result ------------------------------------------------------------------------------------


def to_json(result: Record) -> str:
    """The file of one run: a line for each record, so that two runs can be compared line by line."""

    def text(value: object) -> str:
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f"{json.dumps(key)}: {text(value)}" for key, value in result.items()) + "\n}\n"


def problems(result: Record) -> list[str]:
    """What must not be overlooked: failed cases, and training runs that differ by more than rounding."""
    failed = [f"{failure['case']}: {failure['error']}" for failure in result["failures"]]
    apart = [
        f"training: {run['model']}: losses differ by {run['max_relative_difference']:.1e} and tables by "
        f"{run['table_difference']:.1e}, more than rounding explains"
        for run in result["training"]
        if not run["agree"]
    ]
    return failed + apart


def left_out(result: Record) -> list[str]:
    """What was not measured, a line for each reason."""
    cases: dict[str, list[str]] = {}
    for skipped in result["skipped"]:
        cases.setdefault(skipped["reason"], []).append(skipped["case"])
    return [f"not measured, {reason}: {'; '.join(names)}" for reason, names in cases.items()]


def median(record: Record, contender: str, pass_: str) -> float | None:
    """Microseconds, or None where the contender or the pass was not measured."""
    timing: dict[str, float] | None = record["times"].get(contender, {}).get(pass_)
    return None if timing is None else timing["median"]


def ratio(record: Record, pass_: str, contender: str = OURS, baseline: str = BASELINE) -> float | None:
    """How many times as fast as the baseline the contender is."""
    ours, theirs = median(record, contender, pass_), median(record, baseline, pass_)
    return None if ours is None or theirs is None else theirs / ours


def geometric_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None


# ---- Tables ----------------------------------------------------------------------------------------------------------


def tables(result: Record) -> list[Table]:
    """All tables of one run: per section and dtype the times and what they mean, then the training runs."""
    sections = {"lookup": ("One table", _lookup_columns), "multi": ("Many tables", _multi_columns)}
    made = []
    for title, rows, describe in _parts(result, sections):
        made.append(_times(f"{title}: microseconds, median [p10 p90]", rows, describe))
        made.append(_shares(f"{title}: speed", rows, describe))
    return made + _sparse_tables(result) + _training_tables(result)


def summaries(result: Record) -> list[Table]:
    """What fits a terminal of 100 columns: a table per section and dtype, and the training runs."""
    sections = {"lookup": ("One table", _short_lookup_columns), "multi": ("Many tables", _short_multi_columns)}
    made = [
        _summary(f"{title}: ours, x = times as fast as {BASELINE}", rows, describe)
        for title, rows, describe in _parts(result, sections)
    ]
    return made + _sparse_tables(result) + _training_tables(result)


def _parts(
    result: Record, sections: Mapping[str, tuple[str, Describe]]
) -> Iterator[tuple[str, Sequence[Record], Describe]]:
    """Per section and dtype a title, the records, and how to describe one."""
    for section, (title, describe) in sections.items():
        records = result[section]
        for dtype in dict.fromkeys(record["dtype"] for record in records):
            yield f"{title}, {dtype}", [record for record in records if record["dtype"] == dtype], describe


def _sparse_tables(result: Record) -> list[Table]:
    records = result.get("sparse", [])  # results of before have none
    if not records:
        return []
    columns: dict[str, Callable[[Record], str]] = {}
    for pass_, name in (("gradient", "grad"), ("step", "step")):
        columns[f"{name}, torch"] = partial(_median_cell, BASELINE, pass_)
        columns[f"{name}, ours"] = partial(_median_cell, OURS, pass_)
        columns[f"{name} x"] = partial(_number_cell, partial(_ratio_to, BASELINE, pass_), _factor)
    title = f"Sparse gradients, {records[0]['dtype']}: us, x = times as fast as {BASELINE}"
    return [_table(title, records, _short_lookup_columns, columns)]


def _training_tables(result: Record) -> list[Table]:
    return [_training(result["training"])] if result["training"] else []


def _summary(title: str, records: Sequence[Record], describe: Describe) -> Table:
    columns: dict[str, Callable[[Record], str]] = {}
    means: list[str] = []
    for pass_ in ("forward", "backward"):
        short = _PASSES[pass_]
        columns[f"{short} us"] = partial(_median_cell, OURS, pass_)
        columns[f"{short} x"] = partial(_number_cell, partial(_ratio_to, BASELINE, pass_), _factor)
        columns[f"{short} limit"] = partial(_number_cell, partial(_share, pass_), _percent)
        means += [
            "",
            _factor(geometric_mean(ratio(record, pass_) for record in records)),
            _percent(geometric_mean(_share(pass_, record) for record in records)),
        ]
    for pass_, name in (("both", "both x"), ("wall", "wall x")):
        if _has(records, OURS, pass_):
            columns[name] = partial(_number_cell, partial(_ratio_to, BASELINE, pass_), _factor)
            means.append(_factor(geometric_mean(ratio(record, pass_) for record in records)))
    return _with_means(_table(title, records, describe, columns), means)


def _short_lookup_columns(record: Record) -> dict[str, str]:
    return {
        "V x D": f"{record['num_embeddings']} x {record['embedding_dim']}",
        "N": str(record["num_indices"]),
        "indices": record["distribution"],
    }


def _short_multi_columns(record: Record) -> dict[str, str]:
    sizes = f"{span(record['num_embeddings'])} x {span(record['embedding_dims'])}"
    return {"V x D": f"{record['num_tables']} of {sizes}", "rows": str(record["num_rows"])}


def _is_sum(record: Record) -> bool:
    return record.get("mode") == "sum"


def _lookup_columns(record: Record) -> dict[str, str]:
    return _short_lookup_columns(record) | {"indices": _indices_cell(record)}


def _multi_columns(record: Record) -> dict[str, str]:
    return {
        "tables": f"{record['num_tables']}{', summed' if _is_sum(record) else ''}",
        "V x D each": f"{span(record['num_embeddings'])} x {span(record['embedding_dims'])}",
        "rows": str(record["num_rows"]),
        "indices": _indices_cell(record),
    }


def _indices_cell(record: Record) -> str:
    note = f" ({record['note']})" if record["note"] else ""
    return f"{record['distribution']}{note}"


def _times(title: str, records: Sequence[Record], describe: Describe) -> Table:
    columns: dict[str, Callable[[Record], str]] = {}
    for pass_ in ("forward", "backward"):
        short = _PASSES[pass_]
        columns[f"limit {short}"] = partial(_limit_cell, pass_)
        columns[f"ours {short}"] = partial(_quantiles_cell, OURS, pass_)
        # The forward is reproducible as it is: the same kernel.
        others = {OURS_REPRODUCIBLE: "reproducible"} if pass_ == "backward" else {}
        peers = (BASELINE, INDEX_ADD, OFFSETS, COMPILED, OURS_COMPILED)
        others |= {name: name for name in peers}
        for contender, name in others.items():
            if _has(records, contender, pass_):
                columns[f"{name} {short}"] = partial(_median_cell, contender, pass_)
    if any(map(_fbgemm, records)):
        columns[f"{FBGEMM} fwd + bwd"] = _fbgemm_cell
    return _table(title, records, describe, columns)


def _shares(title: str, records: Sequence[Record], describe: Describe) -> Table:
    numbers: dict[str, tuple[Cell, Callable[[float | None], str]]] = {}
    for pass_, short in _PASSES.items():
        numbers[f"of the limit, {short}"] = (partial(_share, pass_), _percent)
    for pass_, short in _PASSES.items():
        numbers[f"x {BASELINE}, {short}"] = (partial(_ratio_to, BASELINE, pass_), _factor)
    if _has(records, INDEX_ADD, "backward"):
        numbers[f"x {INDEX_ADD}, bwd"] = (partial(_ratio_to, INDEX_ADD, "backward"), _factor)
    for peer in (OFFSETS, COMPILED):
        if _has(records, peer, "both"):
            numbers[f"x {peer}, fwd + bwd"] = (partial(_ratio_to, peer, "both"), _factor)
    if any(map(_fbgemm, records)):
        numbers[f"x {FBGEMM}, fwd + bwd"] = (_ratio_to_fbgemm, _factor)
    has_wall = _has(records, OURS, "wall")
    if has_wall:
        numbers[f"x {BASELINE}, wall"] = (partial(_ratio_to, BASELINE, "wall"), _factor)

    columns: dict[str, Callable[[Record], str]] = {
        name: partial(_number_cell, cell, text) for name, (cell, text) in numbers.items()
    }
    if has_wall:
        columns["wall us"] = partial(_median_cell, OURS, "wall")
    if any("extra_bytes" in record for record in records):
        columns["extra MB, bwd"] = partial(_megabytes_cell, OURS)
        columns[f"extra MB, {BASELINE}"] = partial(_megabytes_cell, BASELINE)

    table = _table(title, records, describe, columns)
    means = [text(geometric_mean(map(cell, records))) for cell, text in numbers.values()]
    return _with_means(table, means)


def _with_means(table: Table, means: Sequence[str]) -> Table:
    """The table with a last row of geometric means, of its first columns of numbers."""
    blanks = [""] * (len(table.columns) - table.left - len(means))
    last_row = ("geometric mean", *[""] * (table.left - 1), *means, *blanks)
    return Table(table.title, table.columns, [*table.rows, last_row], table.left)


def _has(records: Sequence[Record], contender: str, pass_: str) -> bool:
    return any(median(record, contender, pass_) is not None for record in records)


def _share(pass_: str, record: Record) -> float | None:
    share: float | None = record["share"][OURS].get(pass_)
    return share


def _ratio_to(baseline: str, pass_: str, record: Record) -> float | None:
    return ratio(record, pass_, baseline=baseline)


def _fbgemm(record: Record) -> float | None:
    """What FBGEMM took for this shape elsewhere; of no use beside the times of a CPU."""
    on_gpu = any("wall" in times for times in record["times"].values())
    return record.get("fbgemm_us") if on_gpu else None


def _fbgemm_cell(record: Record) -> str:
    return microseconds(_fbgemm(record))


def _ratio_to_fbgemm(record: Record) -> float | None:
    theirs, ours = _fbgemm(record), median(record, OURS, "both")
    return None if theirs is None or ours is None else theirs / ours


def _number_cell(cell: Cell, text: Callable[[float | None], str], record: Record) -> str:
    return text(cell(record))


def _limit_cell(pass_: str, record: Record) -> str:
    return microseconds(record["limit_us"][pass_])


def _median_cell(contender: str, pass_: str, record: Record) -> str:
    return microseconds(median(record, contender, pass_))


def _quantiles_cell(contender: str, pass_: str, record: Record) -> str:
    timing = record["times"][contender][pass_]
    text = f"{microseconds(timing['median'])} [{microseconds(timing['p10'])} {microseconds(timing['p90'])}]"
    return text + ("*" if timing["host_bound"] else "")


def _megabytes_cell(contender: str, record: Record) -> str:
    return f"{record['extra_bytes'][contender]['backward'] / 1e6:.1f}"


def _table(
    title: str,
    records: Sequence[Record],
    describe: Describe,
    columns: dict[str, Callable[[Record], str]],
) -> Table:
    names = tuple(describe(records[0]))
    rows = [(*describe(record).values(), *(cell(record) for cell in columns.values())) for record in records]
    return Table(title, (*names, *columns), rows, left=len(names))


def _training(runs: Sequence[Record]) -> Table:
    columns = (
        "model",
        "batch",
        "steps",
        "loss",
        "loss differs",
        "tables differ",
        f"{BASELINE}, us",
        "ours, us",
        "x",
    )
    rows = []
    for run in runs:
        ours, theirs = run["step_us"][OURS]["median"], run["step_us"][BASELINE]["median"]
        rows.append(
            (
                run["model"],
                str(run["batch"]),
                str(run["steps"]),
                f"{run['first_loss']:.3f} to {run['last_loss']:.3f}",
                f"{run['max_relative_difference']:.1e}",
                f"{run['table_difference']:.1e}" + ("" if run["agree"] else " TOO MUCH"),
                microseconds(theirs),
                microseconds(ours),
                _factor(theirs / ours),
            )
        )
    return Table("Training, the same model and data: time of a step, x = times as fast", columns, rows)


def microseconds(value: float | None) -> str:
    """Three digits at least; ``-`` for nothing."""
    if value is None:
        return "-"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


# ---- Plots -----------------------------------------------------------------------------------------------------------


def write_plots(results: Sequence[Record], directory: Path) -> list[Path]:
    """One SVG per device kind and section: how many times as fast as ``nn.Embedding``, forward and backward together.

    Of several devices of a kind, the first's.

    Returns the files written: none without matplotlib, which is said on standard error.
    """
    try:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return []
    # Text stays text and ids do not change from run to run: small files, readable differences.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fast_embedding"})

    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for device in ("cpu", "cuda"):
        for section, name in _PLOTS.items():
            measured = [result for result in results if result["environment"]["device"] == device and result[section]]
            if not measured:
                continue
            line = _device_line(measured[0]["environment"])
            records = [r for result in measured if _device_line(result["environment"]) == line for r in result[section]]
            figure = _plot(pyplot, records, section, line)
            path = directory / f"{'gpu' if device == 'cuda' else 'cpu'}_{name}"
            figure.savefig(path, metadata={"Date": None})
            pyplot.close(figure)
            written.append(path)
    return written


def _plot(pyplot: Any, records: Sequence[Record], section: str, device: str) -> Any:
    layer = "FastEmbedding" if section == "lookup" else "FastMultiEmbedding"
    labels = list(dict.fromkeys(record["label"] for record in records))
    dtypes = list(dict.fromkeys(record["dtype"] for record in records))

    figure, axes = pyplot.subplots(figsize=(max(7.0, 2.0 + 0.55 * len(labels)), 6.0), layout="constrained")
    width = 0.8 / len(dtypes)
    for number, dtype in enumerate(dtypes):
        chosen = {record["label"]: record for record in records if record["dtype"] == dtype}
        places = [i + (number - (len(dtypes) - 1) / 2) * width for i, label in enumerate(labels) if label in chosen]
        rows = [chosen[label] for label in labels if label in chosen]
        heights = [(ratio(row, "both") or math.nan) - 1 for row in rows]
        axes.bar(places, heights, width, bottom=1, label=dtype, color=f"C{number}", zorder=2)
        if _has(rows, OURS, "wall"):
            walls = [ratio(row, "wall") or math.nan for row in rows]
            style = {"s": 18, "facecolor": f"C{number}", "edgecolor": "black", "linewidth": 0.8, "zorder": 3}
            axes.scatter(places, walls, label=f"{dtype}, eager wall time", **style)
    axes.axhline(1, color="black", linewidth=0.8, zorder=1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_ylabel("time of nn.Embedding / ours\nforward + backward")
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_title(f"{layer} on {device}", fontsize=10)
    axes.grid(axis="y", linewidth=0.4, zorder=0)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _device_line(environment: Record) -> str:
    if environment["device"] == "cuda":
        return f"{environment['gpu']}, torch {environment['torch']}"
    return f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}"


# ---- The page for the docs -------------------------------------------------------------------------------------------

_MARKDOWN_HEAD = """# Performance

Made by `python -m fast_embedding.bench.report` from the JSON files of `fast-embedding bench`; not edited by hand.

**The limit** is the time of the fewest bytes that must move, at the copy and fill rate measured on the same device in
the same run, plus 3 us for a launch on a GPU:

    forward   (N * 8 indices + U * D * b rows read + N * D * b output) / copy rate
    backward  (N * 8 indices + N * D * b gradient read) / copy rate + V * D * b dense gradient / fill rate

V rows in the table, D columns, N indices, U distinct rows among them, b bytes an element; for many tables the sum over
them, where tables are summed with one output and one gradient of it. On a CPU small shapes stay in the caches and may
beat it.

Contenders take turns within one run. On a GPU `fwd` and `bwd` are the device's own time, the L2 flushed before each
call and the call queued behind a sleeping kernel (`*`: it could not be queued, host time is in it); `wall` is eager
forward and backward, host included. `index_add_` is `index_select`, whose backward is `zeros.index_add_`.
`reproducible` runs under `torch.use_deterministic_algorithms(True)`. `extra MB` is the peak of memory beyond inputs and
gradient. `x nn.Embedding` is how many times as fast as it we are.

With many tables, `nn.Embedding` is one of them a table and `torch.cat` (or additions), `torch.compile` the same
compiled, `nn.Embedding, offset indices` a single one over all rows, where the tables are of one D. `FBGEMM dense` is
not of this run: fbgemm_gpu 1.6.0's dense table-batched embedding on an H200, float32, events around forward and
backward.

Sparse gradients are wall time, host included, for both wait for the device: `grad` is forward and backward up to
the coalesced gradient that an optimizer asks for, `step` is a whole one with `SparseAdam`.
"""


def markdown(results: Sequence[Record]) -> str:
    """The page: how it was measured, then a section for each run."""
    return "\n".join([_MARKDOWN_HEAD, *map(_markdown_section, results)])


def _markdown_section(result: Record) -> str:
    environment, rates, settings = result["environment"], result["rates"], result["settings"]
    facts = [f"fast-embedding {environment['fast_embedding']}"]
    if environment["commit"]:
        facts.append(f"commit {environment['commit']}")
    facts += [f"torch {environment['torch']}", f"Python {environment['python']}", environment["date"][:10]]
    if environment["device"] == "cuda":
        facts += [f"CUDA {environment['cuda']}", f"driver {environment['driver']}"]
    source = (
        f"{', '.join(facts)}; preset `{settings['preset']}`. Copy {rates['copy'] / 1e12:.3g} TB/s (read + write), "
        f"fill {rates['fill'] / 1e12:.3g} TB/s."
    )
    if result["corpus"]:
        source += f" Text: {result['corpus']['source']}, {result['corpus']['tokens']} tokens."
    parts = [f"## {_device_line(environment)}", source]
    for table in tables(result):
        parts += [f"### {table.title}", table.markdown()]
    parts += [f"- {line}" for line in left_out(result)]
    parts += [f"- FAILED: {problem}" for problem in problems(result)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fast_embedding.bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="JSON", help="files written by `fast-embedding bench`")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables into this page")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the plots into this folder")
    options = parser.parse_args(arguments)
    results = [json.loads(path.read_text()) for path in options.results]
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown(results))
    if options.plots:
        write_plots(results, options.plots)
    if not options.markdown and not options.plots:
        from .console import show

        for result in results:
            for table in tables(result):
                show(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
