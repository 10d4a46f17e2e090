"""The house itself: the files beside the code agree with the code, with each other and with build_matrix.toml."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fast_embedding
from fast_embedding import _loader
from fast_embedding.bench import report

ROOT = Path(__file__).resolve().parents[1]
needs_tree = pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="the source tree is not here")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def tree() -> list[Path]:
    """Files under version control, or about to be."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def texts() -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
        for path in tree()
        if path.suffix not in {".svg", ".png"}
    ]


def workflows() -> list[tuple[str, str]]:
    return [
        (path.name, path.read_text(encoding="utf-8")) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))
    ]


@pytest.mark.skipif("FAST_EMBEDDING_INSTALLED" not in os.environ, reason="make test and tools/gpu-check set it")
def test_the_tests_run_on_the_installed_package():
    assert Path(fast_embedding.__file__).resolve().parent != ROOT / "fast_embedding"
    assert (Path(fast_embedding.__file__).parent / "py.typed").exists()


@needs_tree
def test_versions_agree():
    version = fast_embedding.__version__
    assert re.search(r'^  version: "(.+)"$', read("conda/recipe.yaml"), re.MULTILINE)[1] == version
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] == version


def test_the_distribution_has_the_version_of_the_package():
    distributions = {
        d.name: d.version for d in importlib.metadata.distributions() if d.name.startswith("fast-embedding")
    }
    if not distributions:
        pytest.skip("not installed as a distribution")
    assert set(distributions.values()) == {fast_embedding.__version__}


@needs_tree
@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", "docs/distribution.md", ".ci/run", ".github/workflows"]
)
def test_named_make_targets_exist(path):
    where = ROOT / path
    files = sorted(where.glob("*.yml")) if where.is_dir() else [where]
    code = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    # Commands, not prose: at the start of a line, behind YAML's or Docker's word for run, or in backticks.
    command = re.compile(r"(?:^\s*|run: |RUN |`)make (?:--\S+ )*([a-z-]+(?: [a-z-]+)*)")
    commands = [found for line in code for found in command.findall(line)]
    assert commands
    targets = set(re.findall(r"^([a-z][a-z-]*):", read("Makefile"), re.MULTILINE))
    assert {target for command in commands for target in command.split()} <= targets


@needs_tree
def test_ci_runs_the_test_command_of_the_readme():
    assert re.search(r"^ {4}make test\b", read("README.md"), re.MULTILINE)
    assert re.search(r"^make --no-print-directory test$", read(".ci/run"), re.MULTILINE)


@needs_tree
def test_the_example_of_the_readme_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    script = tmp_path / "readme.py"
    script.write_text(example)
    names = runpy.run_path(str(script))
    assert names["hidden"].shape == (8, 1024, 768)
    assert names["features"].shape == (4096, 52)
    assert names["replaced"] == 1


@needs_tree
def test_the_tests_that_the_docs_name_exist():
    text = read("docs/compatibility.md")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 60
    missing = [f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in read(f"tests/{file}")]
    assert not missing
    cases = set(re.findall(r"`(\w+)`", text.partition("## Several processes")[2])) - {"enable"}
    assert cases == set(re.findall(r"^        (\w+),$", read("tests/distributed_cases.py"), re.MULTILINE))


@needs_tree
def test_no_file_names_a_path_of_one_machine_or_a_registry():
    machine = re.compile(r"(?<![\w.$}-])/(?:root|farm|work|Users/\w+|home/[a-z]\w*|tmp/\w+)/")
    registry = re.compile(r"(?:pypi|pythonhosted|npmjs|debian|anaconda)[.](?:org|com)\b")
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if machine.search(line) or registry.search(line)
    ]
    assert not found, "\n".join(found)


@needs_tree
def test_scripts_are_executable():
    tools = [str(p.relative_to(ROOT)) for p in (ROOT / "tools").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    for path in [".ci/run", "docker/entrypoint", *tools]:
        if read(path).startswith("#!"):
            assert os.access(ROOT / path, os.X_OK), path


@needs_tree
@pytest.mark.parametrize("name, text", workflows(), ids=lambda value: value if value.endswith(".yml") else "")
def test_workflows_are_pinned_and_least_privileged(name, text):
    actions = re.findall(r"uses: (\S+)(.*)", text)
    assert actions
    for action, comment in actions:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+(\.\d+)*", comment), f"{action}: which version?"
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    assert "\npermissions: {}\n" in text
    assert "\nconcurrency:\n" in text
    assert text.count("runs-on:") == text.count("timeout-minutes:")


@pytest.fixture
def matrix():
    return pytest.importorskip("tomllib").loads(read("build_matrix.toml"))


@needs_tree
def test_the_build_matrix_is_whole(matrix):
    every = matrix["cpu"]["torch"]
    cudas = [row["cuda"] for row in matrix.values() if "cuda" in row]
    assert every == sorted(every, key=as_tuple)
    assert cudas == sorted(cudas, key=as_tuple)
    for name, row in matrix.items():
        assert set(row["torch"]) <= set(every), "every wheel has a binding for every torch"
        assert row["registry"]
        assert [torch for torch in row["torch"] if torch in row["registry"]] == row["registry"]
        assert "x86_64" in row["image"]
        if name == "cpu":
            continue
        assert name == "cu" + row["cuda"].replace(".", "")
        assert row["archs"] == sorted(row["archs"], key=int)
        assert re.search(rf">={row['cuda']},<{as_tuple(row['cuda'])[0] + 1}$", row["requirement"])
        assert row["compiler"] == f"nvcc {row['cuda']}"
        assert all(image.endswith(f":cuda{row['cuda']}") for image in row["image"].values())
    # The registry has one build of each torch, so a minor belongs to one row.
    tested = [torch for name, row in matrix.items() if name != "cpu" for torch in row["registry"]]
    assert tested == every
    assert every[-1] in list(matrix.values())[-1]["torch"]


@needs_tree
def test_what_cannot_read_the_build_matrix_agrees_with_it(matrix):
    every = matrix["cpu"]["torch"]
    variants = [row["cuda"] for row in matrix.values() if "cuda" in row]

    workflow = read(".github/workflows/test.yml")
    tested = [minor(torch) for torch in re.findall(r'torch: "([\d.]+)"', workflow)]
    assert tested == [every[0], every[-1]]
    between = re.search(r"torch: \[(.+)\]", workflow)[1]
    assert [minor(torch) for torch in re.findall(r'"([\d.]+)"', between)] == every[1:-1]
    (default,) = re.findall(r"^TORCH \?= torch==([\d.]+)$", read("Makefile"), re.MULTILINE)
    assert minor(default) in every

    docker = read("docker/Dockerfile")
    variant = re.search(r"^ARG CUDA=(\w+)$", docker, re.MULTILINE)[1]
    assert minor(re.search(r"^ARG CUDA_IMAGE=([\d.]+)$", docker, re.MULTILINE)[1]) == matrix[variant]["cuda"]
    built, run = re.findall(r"^ARG TORCH=([\d.]+)$", docker, re.MULTILINE)
    assert built == run
    assert minor(run) in matrix[variant]["torch"]

    gpu = read(".github/workflows/gpu.yml")
    variant = re.search(r"CUDA=(cu\d+)", gpu)[1]
    assert minor(re.search(r"TORCH: torch==([\d.]+)", gpu)[1]) in matrix[variant]["torch"]

    published = re.findall(r"distribution: fast-embedding(?:-(\w+))?,", read(".github/workflows/wheels.yml"))
    assert published == ["" if name == "cpu" else name for name in matrix]

    compatibility = re.search(r"^\| CUDA \| ([\d.]+) to ([\d.]+),", read("README.md"), re.MULTILINE)
    assert [compatibility[1], compatibility[2]] == [variants[0], variants[-1]]
    assert re.search(rf"^\| torch \| {re.escape(every[0])} and newer;", read("README.md"), re.MULTILINE)
    assert f'"torch>={every[0]}"' in read("setup.py")
    assert every[0] == _loader._OLDEST_TORCH


@needs_tree
def test_the_table_of_the_docs_is_the_build_matrix(matrix):
    rows = [line for line in read("docs/distribution.md").splitlines() if line.startswith("| `fast-embedding")]
    expected = []
    for name, row in matrix.items():
        package = "fast-embedding" if name == "cpu" else f"fast-embedding-{name}"
        torches = f"{row['torch'][0]} to {row['torch'][-1]}"
        archs = ", ".join(f"{arch[:-1]}.{arch[-1]}" for arch in row.get("archs", []))
        runtime = f"`{row['requirement']}`" if "requirement" in row else ""
        images = ", ".join(f"`{image}`" for image in row["image"].values())
        expected.append(f"| `{package}` | {torches} | {archs} | {runtime} | {images} |")
    assert rows == expected


@needs_tree
@pytest.mark.parametrize("extent", ["small", "full"])
def test_the_jobs_of_the_wheels_are_the_build_matrix(matrix, extent):
    printed = subprocess.run(
        [sys.executable, "tools/wheel-jobs", extent], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    builds, tests = (json.loads(line.partition("=")[2]) for line in printed.splitlines())
    made = {(build["variant"], build["machine"]) for build in builds}
    if extent == "full":
        assert made == {(name, machine) for name, row in matrix.items() for machine in row["image"]}
    else:
        assert made == {("cpu", "x86_64"), (list(matrix)[-1], "x86_64")}
    assert {(test["variant"], test["machine"], test["torch"]) for test in tests} == {
        (variant, machine, torch)
        for variant, machine in made
        for torch in (matrix[variant]["registry"][0], matrix[variant]["registry"][-1])
    }


def as_tuple(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


@needs_tree
def test_the_performance_page_is_what_its_results_say():
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "docs/results").glob("*.json"))]
    assert read("docs/performance.md") == report.markdown(results)
    assert all(result["environment"]["commit"] for result in results)
    assert not any(report.problems(result) for result in results)


@needs_tree
@pytest.mark.parametrize("section, dtype", [(s, d) for s in ("lookup", "multi") for d in ("float32", "bfloat16")])
def test_the_readme_quotes_the_results(section, dtype):
    result = json.loads(read("docs/results/h100.json"))
    records = [record for record in result[section] if record["dtype"] == dtype]
    times = report.geometric_mean(report.ratio(record, "both") for record in records)
    shares = [
        report.geometric_mean(record["share"]["fast_embedding"][pass_] for record in records)
        for pass_ in ("forward", "backward")
    ]
    name = "one table" if section == "lookup" else "many tables"
    row = f"| {name}, {dtype} ({len(records)} shapes) | {times:.1f} | {shares[0]:.0%} | {shares[1]:.0%} |"
    assert row in read("README.md")
