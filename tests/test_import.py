"""Importing the package is silent and cheap."""

import subprocess
import sys

import pytest

import fast_embedding

# torch's own warnings, of a missing numpy say, are not ours.
PROLOGUE = """
import sys, warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
before = set(sys.modules)
import fast_embedding
"""


def run(program):
    result = subprocess.run([sys.executable, "-W", "error", "-c", PROLOGUE + program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def test_import_says_nothing():
    result = run("")
    assert result.stdout == result.stderr == ""


def test_import_initialises_no_gpu_and_loads_no_library():
    run("""
assert not torch.cuda.is_initialized()
assert not hasattr(torch.ops.fast_embedding, "embedding")
assert not {"rich", "matplotlib", "numpy", "torch._dynamo", "fast_embedding.bench"} & (set(sys.modules) - before)
if sys.platform == "linux":
    assert "libfast_embedding" not in open("/proc/self/maps").read()
""")


def test_the_first_lookup_loads_the_library():
    run("""
fast_embedding.FastEmbedding(10, 3)(torch.zeros(10_000, dtype=torch.long))
assert hasattr(torch.ops.fast_embedding, "embedding")
""")


@pytest.mark.parametrize("name", fast_embedding.__all__)
def test_public_names(name):
    assert hasattr(fast_embedding, name)


def test_the_package_is_typed():
    from importlib.resources import files

    assert files("fast_embedding").joinpath("py.typed").is_file()


@pytest.mark.parametrize(
    "module", ["", ".distributed", ".everywhere", ".functional", ".layout", ".modules", ".replace"]
)
def test_examples_in_docstrings(module):
    import doctest
    import importlib

    results = doctest.testmod(importlib.import_module("fast_embedding" + module))
    assert results.attempted > 0
    assert results.failed == 0
