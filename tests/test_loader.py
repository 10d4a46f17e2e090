"""What a person reads when the native library cannot be loaded: what it was built for, what is there, what to do."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fast_embedding
from fast_embedding import _loader, functional, ops

PACKAGE = Path(fast_embedding.__file__).parent

pytestmark = pytest.mark.skipif(not ops.native_platform(), reason="no native libraries on this platform")

LOOKUP = "import torch, fast_embedding as fe; print(fe.FastEmbedding(9, 2)(torch.zeros(5000, dtype=torch.long)).shape)"


@pytest.fixture
def package(tmp_path):
    """A copy of the installed package, to be damaged."""
    target = tmp_path / "site" / "fast_embedding"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__", "bench"))
    if not (target / "csrc").is_dir():  # an editable install has the binding's source beside the package
        shutil.copytree(PACKAGE.parent / "csrc", target / "csrc")
    return target


def run(package, program=LOOKUP, **environment):
    """In a process of its own, for a process loads the library once. The cache of compiled bindings is empty."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(package.parent),
        "FAST_EMBEDDING_CACHE": str(package.parent.parent / "cache"),
        **environment,
    }
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def last_line(result):
    assert result.returncode != 0, result.stdout
    return result.stderr.strip().splitlines()[-1]


def remove_binding(package):
    for binding in (package / "lib").glob("torch*.so"):
        binding.unlink()


def test_the_installed_package_loads():
    ops.load()
    ops.require("cpu")
    status = _loader.status()
    assert status["binding"]["loaded"]
    assert status["cpu"]["loaded"]
    assert Path(status["cpu"]["path"]).parent == PACKAGE / "lib"
    assert status["torch"]["version"] == torch.__version__


def test_a_copy_loads(package):
    assert run(package).stdout == "torch.Size([5000, 2])\n"


def test_no_binding_and_no_compiler(package):
    """The binding for a torch that the package holds none for is compiled; the message says what that needs."""
    remove_binding(package)
    message = last_line(run(package, CXX="", PATH=""))
    assert message.startswith("RuntimeError: fast-embedding ")
    assert "was built for no torch" in message
    assert f"you have torch {torch.__version__}" in message
    assert "g++" in message
    assert "install" in message.lower()


def test_a_binding_for_another_torch_is_not_tried(package):
    remove_binding(package)
    (package / "lib/torch1_13_abi0.so").write_bytes(b"")
    message = last_line(run(package, CXX="", PATH=""))
    assert "was built for torch1_13_abi0; you have torch" in message


def test_a_damaged_binding_is_named(package):
    for binding in (package / "lib").glob("torch*.so"):
        binding.write_bytes(b"not a library")
    message = last_line(run(package, CXX="", PATH=""))
    assert "does not load" in message


def test_a_failing_compiler_is_quoted(package):
    remove_binding(package)
    compiler = package.parent / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'internal compiler error: out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    assert "out of luck" in run(package, CXX=str(compiler)).stderr


def test_a_binding_that_is_not_there_is_compiled_once(package):
    """A torch newer than the package: its source compiles against that torch's headers, without nvcc."""
    remove_binding(package)
    (package / "lib/libfast_embedding_cuda.so").unlink(missing_ok=True)
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    first = run(package, CXX=compiler)
    assert first.stdout == "torch.Size([5000, 2])\n", first.stderr
    assert "compiling the binding" in first.stderr
    (compiled,) = (package.parent.parent / "cache").glob("*/*.so")
    assert compiled.name.startswith(f"torch{torch.__version__}_abi")
    again = run(package, CXX="false")
    assert again.stdout == "torch.Size([5000, 2])\n", again.stderr
    assert again.stderr == ""


def test_a_torch_that_is_too_old_is_not_tried(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.3.1+cu121")
    reason = _loader._load_binding().reason
    assert "needs torch 2.4 or newer; you have torch 2.3.1+cu121; pip install 'torch>=2.4'" in reason


def test_why_there_are_no_gpu_kernels(monkeypatch, tmp_path):
    """Each of the ways to have the wrong CUDA, with what to do."""

    class Binding:
        def fe_binding_load(self, *_):
            return b"libcudart.so.12: cannot open shared object file: No such file or directory"

    def reason(library=True, **info):
        monkeypatch.setattr(_loader, "_build_info", lambda: {"cuda_variants": ["12.1", "12.4", "13.0"], **info})
        folder = tmp_path / str(library)
        folder.mkdir(exist_ok=True)
        if library:
            (folder / "libfast_embedding_cuda.so").touch()
        monkeypatch.setattr(_loader, "_LIBRARIES", folder)
        return _loader._load_cuda(Binding()).reason

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in reason()
    monkeypatch.setattr(torch.version, "cuda", "12.5")
    assert "was built for the CPU alone (it was built without nvcc on PATH); you have" in reason(
        library=False, cuda_missing="it was built without nvcc on PATH"
    )
    other = reason(cuda="13.0")
    assert "was built for CUDA 13.0; you have torch" in other
    assert "(CUDA 12.5); pip install fast-embedding-cu124, or build from source" in other
    lost = reason(cuda="12.4", cuda_requirement="nvidia-cuda-runtime-cu12>=12.4,<13")
    assert "its kernels do not load (libcudart.so.12: cannot open" in lost
    assert "; pip install 'nvidia-cuda-runtime-cu12>=12.4,<13', or" in lost


def test_no_kernels(package):
    (package / "lib/libfast_embedding_cpu.so").unlink()
    message = last_line(run(package))
    assert "libfast_embedding_cpu.so" in message
    assert "reinstall" in message


def test_the_reason_is_kept(package):
    """The second use fails as the first did, without trying again."""
    remove_binding(package)
    program = f"""
import time
start = time.perf_counter()
for _ in range(2):
    try:
        {LOOKUP.replace("; ", chr(10) + "        ")}
    except RuntimeError as error:
        print(str(error).count("was built for"))
"""
    assert run(package, program, CXX="", PATH="").stdout == "1\n1\n"


def test_what_torch_does_itself_needs_no_library(package):
    shutil.rmtree(package / "lib")
    program = (
        "import torch, fast_embedding as fe\n"
        "x = torch.zeros(5000, dtype=torch.long)\n"
        "print(fe.FastEmbedding(9, 2, max_norm=1.0)(x).shape)\n"
    )
    assert run(package, program, CXX="", PATH="").stdout == "torch.Size([5000, 2])\n"


def test_no_gpu_kernels(monkeypatch):
    ops.load()
    monkeypatch.setitem(_loader._state.devices, "cuda", _loader._Part(reason="built for the CPU alone; you have ..."))
    with pytest.raises(RuntimeError, match="built for the CPU alone"):
        ops.require("cuda")
    with pytest.raises(RuntimeError, match="cpu and cuda, not for xpu"):
        ops.require("xpu")


@pytest.mark.parametrize(
    "cuda, distribution",
    [("12.1", "fast-embedding-cu121"), ("12.5", "fast-embedding-cu124"), ("13.2", "fast-embedding-cu130")],
)
def test_the_distribution_for_a_cuda(cuda, distribution):
    assert _loader._wanted_distribution(cuda) == distribution


def test_two_installed_variants_are_named(monkeypatch):
    class Installed:
        version = "0.1.0"

        def __init__(self, name):
            self.metadata = {"Name": name}

    names = ["torch", "fast-embedding-cu121", "Fast_Embedding_cu130", "fast-embeddings"]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [Installed(name) for name in names])
    assert _loader.status()["conflict"].startswith(
        "fast-embedding-cu121 and fast-embedding-cu130 are installed together"
    )


def test_other_platforms_run_on_torchs_operations(monkeypatch):
    """macOS and Windows: correct, unaccelerated, and nothing is loaded."""
    monkeypatch.setattr(functional, "_ON_CPU", False)
    monkeypatch.setattr(ops, "embedding", None)
    monkeypatch.setattr(ops, "multi_embedding", None)
    weight = torch.randn(32)
    x = torch.randint(3, (5000, 2))
    expected = torch.cat([weight[:15].view(3, 5)[x[:, 0]], weight[16:26].view(5, 2)[x[:, 1]]], 1)
    assert torch.equal(functional.multi_embedding(x, weight, [3, 5], [5, 2]), expected)
    assert torch.equal(functional.embedding(x, weight.view(8, 4)), weight.view(8, 4)[x])
    assert fast_embedding.FastMultiEmbedding([3, 5], [2, 2], mode="sum")(x).shape == (5000, 2)
