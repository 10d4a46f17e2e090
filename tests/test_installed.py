"""What is installed, as a package: its files, its metadata, and what the process has loaded once it works."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fast_embedding
from fast_embedding import _loader, ops

PACKAGE = Path(fast_embedding.__file__).parent
LIBRARIES = sorted((PACKAGE / "lib").glob("*.so"))

pytestmark = pytest.mark.skipif(not ops.native_platform(), reason="no native libraries on this platform")


@pytest.fixture
def distribution():
    found = [d for d in importlib.metadata.distributions() if re.match(r"fast.embedding(-cu\d+)?$", d.name)]
    if not found or not (PACKAGE / "lib").is_dir() or (PACKAGE.parent / "csrc").is_dir():
        pytest.skip("not installed from a wheel")
    assert len(found) == 1
    return found[0]


def dynamic_section(library):
    """NEEDED and RUNPATH of a shared library, from the program that every C++ compiler brings."""
    try:
        text = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("no readelf")
    return (
        set(re.findall(r"\(NEEDED\).*\[(.+)\]", text)),
        [path for paths in re.findall(r"\(R(?:UN)?PATH\).*\[(.+)\]", text) for path in paths.split(":")],
    )


def test_one_openmp_in_the_process():
    """A second libgomp, grafted into a wheel, has a pool of its own: torch.set_num_threads would not rule it."""
    program = """
import torch, fast_embedding
layer = fast_embedding.FastEmbedding(100, 16)
layer(torch.randint(100, (50_000,))).sum().backward()
maps = open("/proc/self/maps").read()
assert "libfast_embedding_cpu" in maps
print(*sorted({line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libomp" in line}), sep="\\n")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = result.stdout.split()
    assert len(loaded) <= 1, loaded
    assert not any(str(PACKAGE) in path or "fast_embedding" in path for path in loaded)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_bundle_nothing(library):
    needed, runpath = dynamic_section(library)
    system = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1"}
    system |= {"libstdc++.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    if library.name.startswith("torch"):
        assert {"libc10.so", "libtorch_cpu.so", "libtorch.so"} <= needed
        assert needed - system == {"libc10.so", "libtorch_cpu.so", "libtorch.so"}
        assert not runpath
    elif library.name == "libfast_embedding_cuda.so":
        assert {re.sub(r"\.\d+$", "", name) for name in needed - system} == {"libcudart.so"}
        # Relative to fast_embedding/lib: where NVIDIA's wheels of CUDA 12 and of CUDA 13 put it.
        assert {"$ORIGIN/../../nvidia/cuda_runtime/lib", "$ORIGIN/../../nvidia/cu13/lib"} <= set(runpath)
    else:
        assert needed <= system
        assert not runpath


def test_the_wheel_is_for_every_python(distribution):
    text = distribution.read_text("WHEEL")
    tags = re.findall(r"^Tag: (\S+)$", text, re.MULTILINE)
    assert tags
    assert all(tag.startswith("py3-none-") for tag in tags)
    assert "Root-Is-Purelib: false" in text


def test_it_requires_no_newest_torch_and_the_runtime_of_its_cuda(distribution):
    """A cap on torch would make pip downgrade the one that is there."""
    required = [line for line in distribution.requires if "extra ==" not in line]
    assert "torch>=2.4" in required
    runtime = [line for line in required if line != "torch>=2.4"]
    variant = re.search(r"cu(\d+)(\d)$", distribution.name)
    if variant is None:
        assert runtime == []
    else:
        (line,) = runtime
        package = "nvidia-cuda-runtime-cu12" if variant[1] == "12" else "nvidia-cuda-runtime"
        assert re.match(rf"{package}[<>]", line)
        assert f">={variant[1]}.{variant[2]}" in line


def test_licence_and_bill_of_materials_are_in_it(distribution):
    files = {str(path).partition(".dist-info/")[2]: path for path in distribution.files if ".dist-info/" in str(path)}
    assert "BSD 3-Clause" in distribution.locate_file(files["licenses/LICENSE"]).read_text(encoding="utf-8")
    bill = json.loads(distribution.locate_file(files["sboms/fast-embedding.cdx.json"]).read_text(encoding="utf-8"))
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == distribution.name
    assert bill["metadata"]["component"]["version"] == distribution.version
    names = {part["name"] for part in bill["components"]}
    assert names == ({"cub"} if (PACKAGE / "lib/libfast_embedding_cuda.so").exists() else set())


def test_info_names_what_was_loaded(capsys):
    from fast_embedding.__main__ import main

    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    status = _loader.status()
    assert f"fast-embedding {fast_embedding.__version__}" in printed
    assert f"torch           {torch.__version__}" in printed
    assert f"cpu             loaded from {status['cpu']['path']}" in printed
    if torch.version.cuda and (PACKAGE / "lib/libfast_embedding_cuda.so").exists() and status["cuda"]["loaded"]:
        assert f"cuda            loaded from {status['cuda']['path']}" in printed
    else:
        assert f"cuda            not loaded: {status['cuda']['reason']}" in printed
    if not torch.cuda.is_available():
        assert "no GPU that torch can use" in printed
        assert printed.endswith("verdict         usable on cpu\n")


@pytest.mark.parametrize(
    "architectures, capability, runs",
    [
        (["sm_75", "sm_90", "compute_90"], (9, 0), True),
        (["sm_75", "sm_90", "compute_90"], (12, 0), True),
        (["sm_75", "sm_90", "compute_90"], (7, 0), False),
        (["sm_75", "sm_90", "compute_90"], (8, 6), False),
        (["sm_80", "compute_90"], (8, 6), True),
        (["sm_86", "compute_90"], (8, 0), False),
        (["sm_100", "sm_120", "compute_120"], (10, 3), True),
        (["sm_100", "sm_120", "compute_120"], (9, 0), False),
    ],
)
def test_which_gpu_runs_what(architectures, capability, runs):
    assert _loader.runs_on(architectures, capability) is runs
