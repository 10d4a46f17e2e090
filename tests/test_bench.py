"""The benchmark's own code: its streams, limits, clocks, records, reports and command line. Tiny shapes, no speeds."""

import copy
import dataclasses
import json

import pytest
import torch

from fast_embedding import __main__ as cli
from fast_embedding.bench import (
    console,
    environment,
    limits,
    measure,
    report,
    selftest,
    shapes,
    sparse,
    streams,
    timing,
)
from fast_embedding.bench.timing import CpuTimer, CudaTimer, Effort

TINY = Effort(min_rounds=3, max_rounds=3, seconds=0, wall_calls=2)
RATES = limits.Rates(copy=1e9, fill=2e9, launch_us=3.0)


@pytest.fixture(params=["cpu", "cuda"])
def session(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device(request.param)
    timer = CudaTimer(device) if device.type == "cuda" else CpuTimer()
    return measure.Session(device, timer, RATES, TINY, reproducible=True)


def smoke_run(folder, *more):
    # One thread: on a busy machine each parallel region of so small a lookup waits for the other threads.
    threads = torch.get_num_threads()
    options = {"--device": "cpu", "--threads": "1", "--json": folder / "run.json", "--plots": folder}
    try:
        return cli.main(["bench", "--smoke", *(str(word) for option in options.items() for word in option), *more])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of the whole: exit code, folder of its files, record."""
    folder = tmp_path_factory.mktemp("bench")
    code = smoke_run(folder)
    return code, folder, json.loads((folder / "run.json").read_text())


# ---- Streams and shapes ----------------------------------------------------------------------------------------------


def test_text_is_the_same_whenever_it_is_read(monkeypatch):
    root, files = streams.standard_library()
    monkeypatch.setattr(streams, "standard_library", lambda: (root, files[:20]))
    first, second = streams.text.__wrapped__(), streams.text.__wrapped__()
    assert first.digest == second.digest
    assert torch.equal(first.ranks, second.ranks)


def test_text_ids_are_frequency_ranks_capped_at_the_vocabulary():
    stream = streams.text()
    counts = torch.bincount(stream.ranks)
    assert (counts.diff() <= 0).all()
    assert len(counts) == stream.vocabulary
    ids = stream.ids(100)
    assert ids.max() == 99
    assert (ids == 0).sum() == counts[0]
    assert (ids == 99).sum() == counts[99:].sum()


def test_text_starts_again_where_the_corpus_ends():
    stream = streams.TextStream(torch.tensor([0, 1, 2]), vocabulary=3, num_files=1, digest="")
    assert stream.indices(2, 7).tolist() == [0, 1, 1, 0, 1, 1, 0]


def test_tabular_columns_keep_their_cardinalities_and_the_target_is_the_next_type():
    table = streams.tabular(3000)
    assert table.features.shape == (3000, len(table.columns))
    assert (table.features >= 0).all()
    assert (table.features.amax(0) < torch.tensor(table.cardinalities)).all()
    kind = table.columns.index("type")
    assert torch.equal(table.target[:-1], table.features[1:, kind])
    previous = table.columns.index("previous token")
    assert torch.equal(table.features[1:, previous], table.features[:-1, table.columns.index("token")])
    assert len(shapes.TABULAR_DIMS) == len(table.columns)


@pytest.mark.parametrize("distribution", shapes.DISTRIBUTIONS)
def test_indices_are_in_range_and_depend_on_the_seed_alone(distribution):
    drawn = shapes.draw_indices(50, 1000, distribution, seed=1)
    assert drawn.shape == (1000,)
    assert drawn.dtype == torch.int64
    assert drawn.min() >= 0
    assert drawn.max() < 50
    assert torch.equal(drawn, shapes.draw_indices(50, 1000, distribution, seed=1))
    if distribution in ("uniform", "zipf"):
        assert not torch.equal(drawn, shapes.draw_indices(50, 1000, distribution, seed=2))
    if distribution == "one":
        assert drawn.unique().numel() == 1


def test_zipf_has_the_stated_exponent():
    counts = torch.bincount(shapes.draw_indices(1000, 2_000_000, "zipf", seed=0)).sort(descending=True).values.double()
    # p(1) / p(8) = 8^1.05; 2e6 draws leave a standard error below 1% on either count.
    assert counts[0] / counts[7] == pytest.approx(8**shapes.ZIPF_EXPONENT, rel=0.05)


def test_unknown_distributions_are_named():
    with pytest.raises(ValueError, match="distribution must be one of uniform, zipf, one, text, got 'normal'"):
        shapes.draw_indices(10, 10, "normal", seed=0)


# ---- Limits ----------------------------------------------------------------------------------------------------------


def test_limit_counts_each_byte_once():
    moved = limits.traffic(num_embeddings=1000, embedding_dim=10, num_indices=100, distinct=60, element_size=4)
    assert moved.forward == 100 * 8 + 60 * 40 + 100 * 40
    assert moved.backward == 100 * 8 + 100 * 40
    assert moved.dense_gradient == 1000 * 40
    limit = limits.limits_us(moved, RATES)
    assert limit["forward"] == pytest.approx(7.2 + 3)
    assert limit["backward"] == pytest.approx(4.8 + 20 + 3)
    assert limit["both"] == pytest.approx(limit["forward"] + limit["backward"])


def test_limit_of_many_tables_has_one_launch():
    one = limits.traffic(num_embeddings=10, embedding_dim=4, num_indices=100, distinct=10, element_size=4)
    assert limits.limits_us(one + one, RATES)["forward"] - 3 == pytest.approx(
        2 * (limits.limits_us(one, RATES)["forward"] - 3)
    )


# ---- Clocks ----------------------------------------------------------------------------------------------------------


def test_interleaving_takes_turns_and_rotates_who_begins():
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    times = timing.interleave(samplers, TINY)
    assert "".join(order) == "abcbcacab"
    assert all(times[name].repetitions == 3 for name in "abc")


def test_interleaving_stops_when_the_time_is_over():
    effort = Effort(min_rounds=2, max_rounds=10**9, seconds=0)
    assert timing.interleave({"a": lambda: 1.0}, effort)["a"].repetitions == 2


def test_quantiles():
    summary = timing.summarise([float(i) for i in range(11)])
    assert (summary.p10, summary.median, summary.p90) == (1.0, 5.0, 9.0)
    assert timing.summarise([2.0]).p90 == 2.0


def test_times_of_a_call_are_positive_and_ordered(session):
    x = torch.ones(1000, device=session.device)
    sampler = session.timer.sampler(lambda: x + 1)
    times = timing.interleave({"add": sampler}, TINY)["add"]
    assert 0 < times.p10 <= times.median <= times.p90
    assert not times.host_bound


def test_a_call_that_synchronises_is_marked():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device("cuda")
    x = torch.ones(1000, device=device)
    sampler = CudaTimer(device).sampler(lambda: x.sum().item())
    assert timing.interleave({"sum": sampler}, TINY)["sum"].host_bound


# ---- Measuring -------------------------------------------------------------------------------------------------------

PASSES = {"forward", "backward", "both"}


def check_record(record, device_type, contenders=(measure.BASELINE, measure.OURS)):
    """What every reader of the JSON relies on."""
    wall = {"wall"} if device_type == "cuda" else set()
    assert set(record["limit_us"]) == PASSES
    for contender in contenders:
        times = record["times"][contender]
        assert set(times) == PASSES | wall
        for value in times.values():
            assert 0 < value["p10"] <= value["median"] <= value["p90"]
            assert value["repetitions"] == 3
        assert set(record["share"][contender]) == PASSES
    assert record["share"][measure.OURS]["forward"] == pytest.approx(
        record["limit_us"]["forward"] / record["times"][measure.OURS]["forward"]["median"], rel=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_table_is_measured(session, dtype):
    from fast_embedding.bench import lookup

    record = lookup.run(shapes.LookupShape(20, 3, 400, "zipf"), dtype, session)
    check_record(record, session.device.type, (measure.BASELINE, measure.INDEX_ADD, measure.OURS))
    assert measure.OURS_REPRODUCIBLE in record["times"]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["concat", "sum"])
@pytest.mark.parametrize("dims", [(3, 3), (8, 8)])  # with a hole between the tables, and without
def test_many_tables_are_measured(session, dtype, mode, dims):
    from fast_embedding.bench import multi

    record = multi.run(shapes.MultiShape(300, (5, 7), dims, mode=mode), dtype, session)
    check_record(record, session.device.type, (measure.BASELINE, measure.OFFSETS, measure.OURS))
    assert record["distinct"] == [5, 7]
    # torch adds the 60 bfloat16 gradients of a row in bfloat16 on some CPUs.
    assert record["gradient_error"][measure.OFFSETS] <= (1e-5 if dtype == torch.float32 else 60 * 2**-9)
    columns = sum(dims) if mode == "concat" else dims[0]
    moved = (300 * 2 * 8 + 300 * columns * dtype.itemsize + 12 * dims[0] * dtype.itemsize) / RATES.copy * 1e6
    assert record["limit_us"]["forward"] == pytest.approx(moved + RATES.launch_us)


def test_tables_of_several_dims_have_no_offset_indices(session):
    from fast_embedding.bench import multi

    record = multi.run(shapes.MultiShape(300, (5, 7), (3, 2)), torch.float32, session)
    assert measure.OFFSETS not in record["times"]


def test_chosen_shapes_are_compiled(session):
    if session.device.type == "cuda":
        pytest.importorskip("triton")
    from fast_embedding.bench import multi

    session = dataclasses.replace(session, compile_chosen=True)
    shape = shapes.MultiShape(300, (5, 7), (3, 2), compiled=True)
    compiled = {measure.COMPILED, measure.OURS_COMPILED}
    assert compiled <= set(multi.run(shape, torch.float32, session)["times"])
    assert not compiled & set(multi.run(shape, torch.bfloat16, session)["times"])
    assert not compiled & set(multi.run(dataclasses.replace(shape, compiled=False), torch.float32, session)["times"])


def test_the_grid_of_many_tables():
    grid = shapes.multi_shapes()
    assert len({shape.label for shape in grid}) == len(grid)
    for sizes in (shapes.TEN_TABLES, shapes.RETAIL):
        assert len(sizes[0]) == len(sizes[1])
    assert (len(shapes.RETAIL[0]), len(shapes.CLICK_LOG), len(shapes.ATOM_FEATURES)) == (24, 26, 9)
    assert sum(shape.fbgemm_us is not None for shape in grid) == 7


def test_a_contender_that_is_wrong_is_refused(session):
    weight = torch.randn(10, 4, device=session.device, requires_grad=True)
    indices = torch.arange(10, device=session.device)
    right = measure.Contender("right", lambda: weight[indices], (weight,))
    grad_output = torch.randn(10, 4, device=session.device)
    wrong_output = measure.Contender("wrong", lambda: weight[indices] * 2, (weight,))
    exact = [lambda: measure.exact_gradient(10, indices, grad_output)]
    with pytest.raises(ArithmeticError, match="the output of wrong differs"):
        measure.measure([right, wrong_output], grad_output, exact, limits.Traffic(), session)
    ours = measure.Contender(measure.OURS, lambda: weight[indices].detach() + 0 * weight[indices], (weight,))
    with pytest.raises(ArithmeticError, match="the gradient of fast_embedding is off"):
        measure.measure([right, ours], grad_output, exact, limits.Traffic(), session)


def test_a_wrong_sparse_gradient_is_refused(session, monkeypatch):
    class OtherRows(torch.nn.Embedding):
        def forward(self, indices):
            return super().forward(indices.clamp(max=2))

    class Doubled(torch.nn.Embedding):
        def forward(self, indices):
            return super().forward(indices) * 2

    for wrong, message in ((OtherRows, "has other rows"), (Doubled, "is off by")):
        monkeypatch.setattr(sparse, "FastEmbedding", wrong)
        with pytest.raises(ArithmeticError, match=f"the sparse gradient of fast_embedding {message}"):
            sparse.run(shapes.LookupShape(50, 4, 300, "uniform"), torch.float32, session)


# ---- The whole -------------------------------------------------------------------------------------------------------


def test_a_run_holds_every_section(smoke):
    code, _, result = smoke
    assert code == 0
    assert not result["failures"]
    assert result["environment"]["torch"] == torch.__version__
    assert result["environment"]["device"] == "cpu"
    assert result["rates"]["copy"] > 0
    assert result["lookup"]
    assert result["multi"]
    for record in result["lookup"] + result["multi"]:
        check_record(record, "cpu")
    (sparse,) = result["sparse"]
    assert sparse["gradient_error"] < 1e-6
    for times in sparse["times"].values():
        assert times["gradient"]["median"] > 0
        assert times["step"]["median"] > 0
    assert {run["model"] for run in result["training"]} == {"tokens", "tabular"}


def test_training_learns_and_the_losses_agree(smoke):
    for run in smoke[2]["training"]:
        assert run["agree"]
        assert run["last_loss"] < run["first_loss"]
        assert len(run["losses"][measure.OURS]) == run["steps"]


def test_no_path_of_the_machine_is_in_a_result(smoke):
    folder = smoke[1]
    assert str(folder) not in (folder / "run.json").read_text()
    assert "/" not in json.dumps(smoke[2]["environment"])


def test_report_makes_the_page_from_json_alone(smoke, tmp_path):
    page = tmp_path / "docs" / "performance.md"
    assert report.main([str(smoke[1] / "run.json"), "--markdown", str(page)]) == 0
    text = page.read_text()
    assert "| 1000 x 64 | 128 | uniform |" in text
    assert "### Sparse gradients, float32" in text
    assert "| 100000 x 32 | 16384 | zipf |" in text
    assert "### Training" in text


def test_report_makes_the_plots_that_the_run_made(smoke, tmp_path):
    pytest.importorskip("matplotlib")
    assert report.main([str(smoke[1] / "run.json"), "--plots", str(tmp_path)]) == 0
    for name in ("cpu_fast_embedding_perf_results.svg", "cpu_fast_multi_embedding_perf_results.svg"):
        plot = (tmp_path / name).read_text()
        assert "forward + backward" in plot
        assert plot == (smoke[1] / name).read_text()


def test_plots_show_one_device(smoke, tmp_path):
    pytest.importorskip("matplotlib")
    other = copy.deepcopy(smoke[2])
    other["environment"]["cpu"] = "another"
    for plot in report.write_plots([smoke[2], other], tmp_path):
        assert plot.read_text() == (smoke[1] / plot.name).read_text()


def as_of_a_gpu(result):
    result = copy.deepcopy(result)
    for record in result["lookup"] + result["multi"]:
        for times in record["times"].values():
            times["wall"] = times["both"]
        record["extra_bytes"] = {name: {"forward": 0, "backward": 1_500_000} for name in record["times"]}
    return result


def test_report_of_a_gpu_shows_wall_time_memory_and_what_others_took_there(smoke):
    columns = {column for table in report.tables(as_of_a_gpu(smoke[2])) for column in table.columns}
    assert {"x nn.Embedding, wall", "extra MB, bwd", "x FBGEMM dense, fwd + bwd"} <= columns
    assert not any("FBGEMM" in column for table in report.tables(smoke[2]) for column in table.columns)


@pytest.mark.parametrize("section", shapes.SECTIONS)
def test_one_section_alone(tmp_path, section):
    assert smoke_run(tmp_path, "--only", section) == 0
    result = json.loads((tmp_path / "run.json").read_text())
    assert [name for name in shapes.SECTIONS if result[name]] == [section]


def test_what_is_shown_fits_a_terminal(smoke):
    tables = report.summaries(as_of_a_gpu(smoke[2]))
    assert len(tables) == 4
    for table in tables:
        assert max(map(len, table.plain().splitlines())) <= 100
        assert len({len(row) for row in (table.columns, *table.rows)}) == 1


def test_failures_and_diverging_losses_are_problems(smoke):
    result = copy.deepcopy(smoke[2])
    assert report.problems(result) == []
    result["failures"].append({"case": "a case", "error": "an error"})
    result["training"][0] |= {"agree": False, "max_relative_difference": 0.5}
    assert len(report.problems(result)) == 2


def test_a_failing_shape_is_reported_and_the_others_run(monkeypatch, tmp_path, capsys):
    from fast_embedding.bench import lookup

    original = lookup.run

    def run(shape, dtype, session):
        if shape.num_indices == 128:
            raise RuntimeError("broken on purpose")
        return original(shape, dtype, session)

    monkeypatch.setattr(lookup, "run", run)
    assert smoke_run(tmp_path) == 1
    result = json.loads((tmp_path / "run.json").read_text())
    assert [failure["error"] for failure in result["failures"]] == ["RuntimeError: broken on purpose"]
    assert result["lookup"]
    assert result["training"]
    assert "FAILED: 1000 x 64, 128 uniform, float32: RuntimeError: broken on purpose" in capsys.readouterr().out


def test_tables_without_rich(capsys):
    table = console.Table("A title", ("name", "number"), [("a", "1"), ("long name", "22")])
    assert table.plain().splitlines() == ["A title", "name       number", "a               1", "long name      22"]
    assert table.markdown().splitlines()[1] == "| --- | --: |"


# ---- The command line ------------------------------------------------------------------------------------------------


def test_own_shape(tmp_path):
    path = tmp_path / "own.json"
    arguments = "--smoke --device cpu --num-embeddings 30 --dim 5 --tokens 700 --dist one --dtype float64 --seed 3"
    assert cli.main(["bench", *arguments.split(), "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    (record,) = result["lookup"]
    assert (record["num_embeddings"], record["embedding_dim"], record["num_indices"]) == (30, 5, 700)
    assert (record["distribution"], record["dtype"], record["distinct"]) == ("one", "float64", 1)
    assert result["settings"]["seed"] == 3
    assert not result["training"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--quick --full", "not allowed with"),
        ("--dim 5", "go together"),
        ("--dist zipf", "--dist needs"),
        ("--only multi --num-embeddings 5 --dim 5 --tokens 5", "--only is for the grid"),
        ("--num-embeddings 0 --dim 5 --tokens 5", "must be positive"),
        ("--dtype int8", "invalid choice"),
        ("--device meta", "--device must be cpu or cuda"),
        ("--device nonsense", "--device"),
    ],
)
def test_arguments_that_make_no_sense_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["bench", *arguments.split()])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_info_names_versions_and_verdict(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "cpu" in text


def test_selftest_passes_and_notices_a_wrong_gradient(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.main(["selftest"]) == 0
    assert "48 of 48 checks passed" in capsys.readouterr().out
    monkeypatch.setattr(selftest, "_DTYPES", (torch.float32,))
    monkeypatch.setattr(selftest, "relative_difference", lambda values, reference: float("nan"))
    assert cli.main(["selftest"]) == 1


def test_commit_comes_from_the_environment_outside_of_a_clone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FAST_EMBEDDING_COMMIT", raising=False)
    assert environment.commit() is None
    monkeypatch.setenv("FAST_EMBEDDING_COMMIT", "abc")
    assert environment.commit() == "abc"
