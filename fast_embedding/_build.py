"""How the native libraries are compiled: the CPU kernels, the CUDA kernels and the binding to torch.

It needs the standard library and a compiler, nothing of the rest of the package: setup.py loads this file by its path,
and the loader compiles the binding with it for a torch that no prebuilt one fits.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Where the CUDA runtime's wheels put it, seen from fast_embedding/lib: CUDA 12 and CUDA 13.
_CUDA_RPATHS = ("$ORIGIN/../../nvidia/cuda_runtime/lib", "$ORIGIN/../../nvidia/cu13/lib")

# Torch's libraries that the binding needs by name: Python loads them locally, so nothing else makes their symbols seen.
_TORCH_LIBRARIES = ("c10", "torch_cpu", "torch")


class BuildError(RuntimeError):
    """A compiler is missing or failed; the message says which and what to do."""


@dataclass(frozen=True)
class Torch:
    """An unpacked torch, or the headers of one: `include/` and `version.py`."""

    root: Path
    version: str
    cxx11_abi: bool
    cuda: str | None = None

    @staticmethod
    def at(root: Path, cxx11_abi: bool | None = None) -> Torch:
        """The torch in directory `root`; the C++ ABI, if not given, as its CMake files or else its version tell."""
        facts = (root / "version.py").read_text(encoding="utf-8")
        match = re.search(r"__version__ = '([^']+)'", facts)
        if match is None:
            raise BuildError(f"{root / 'version.py'} names no version")
        version = match[1]
        if cxx11_abi is None:
            config = root / "share/cmake/Torch/TorchConfig.cmake"
            flag = (
                re.search(r"_GLIBCXX_USE_CXX11_ABI=([01])", config.read_text(encoding="utf-8"))
                if config.exists()
                else None
            )
            # Official wheels up to torch 2.6 have the old ABI.
            cxx11_abi = flag[1] == "1" if flag else _minor(version) >= (2, 7)
        cuda = re.search(r"^cuda(?:: [^=]+)? = '([\d.]+)'", facts, re.MULTILINE)
        return Torch(root, version, cxx11_abi, cuda[1] if cuda else None)

    @property
    def is_release(self) -> bool:
        """Whether the version is a release's: one binding fits all releases of a minor, but no development build."""
        return re.fullmatch(r"\d+\.\d+\.\d+(\+.*)?", self.version) is not None

    @property
    def cxx_standard(self) -> str:
        """What its headers are written in: C++20 since torch 2.14, and older ones do not all compile as that."""
        return "c++20" if _minor(self.version) >= (2, 14) else "c++17"

    @property
    def binding_name(self) -> str:
        """File name of the prebuilt binding, e.g. torch2_11_abi1.so."""
        major, minor = _minor(self.version)
        return f"torch{major}_{minor}_abi{int(self.cxx11_abi)}.so"


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True)
class Step:
    """One run of a compiler. It is left out while `output` is newer than all it was made of, by the same command."""

    command: list[str]
    output: Path
    inputs: list[Path]
    depfile: Path | None = None

    def run(self, log: Callable[[str], None]) -> None:
        record = self.output.with_name(self.output.name + ".cmd")
        command = shlex.join(self.command)
        if self._is_current(record, command):
            return
        log(f"{Path(self.command[0]).name} {self.output.name}")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        result = subprocess.run(self.command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise BuildError(f"this command failed:\n{command}\n{result.stdout}{result.stderr}")
        record.write_text(command, encoding="utf-8")

    def _is_current(self, record: Path, command: str) -> bool:
        if not self.output.exists() or not record.exists() or record.read_text(encoding="utf-8") != command:
            return False
        made = self.output.stat().st_mtime_ns
        inputs = list(self.inputs)
        if self.depfile is not None:
            if not self.depfile.exists():
                return False
            # Make's syntax: "target: file file \<newline> file"
            rule = self.depfile.read_text(encoding="utf-8").replace("\\\n", " ")
            inputs += [Path(name) for name in rule.partition(":")[2].split()]
        return all(path.exists() and path.stat().st_mtime_ns <= made for path in inputs)


@dataclass(frozen=True)
class Library:
    """A shared library: steps that may run in any order, then the link."""

    compile_steps: list[Step]
    link_step: Step


def build(libraries: Iterable[Library], log: Callable[[str], None] = lambda line: None) -> None:
    """Bring the libraries up to date, MAX_JOBS compilers at a time (default: one a core, at most 8). BuildError."""
    libraries = list(libraries)
    jobs = int(os.environ.get("MAX_JOBS") or min(os.cpu_count() or 1, 8))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda step: step.run(log), [step for library in libraries for step in library.compile_steps]))
    for library in libraries:
        library.link_step.run(log)


def binding(csrc: Path, torch: Torch, work: Path, output: Path) -> Library:
    """The binding of csrc/binding for one torch. Objects go to `work`."""
    cxx = _cxx()
    # Without -fopenmp at::parallel_for is silently serial. The link leaves libgomp out on purpose: its symbols come
    # from the OpenMP that libtorch_cpu.so itself loaded, so that torch.set_num_threads rules here too. Clang's code
    # would need another runtime than torch's wheels bring.
    openmp = [] if _is_clang(cxx) else ["-fopenmp"]
    flags = [
        *(f"-std={torch.cxx_standard}", "-O2", "-DNDEBUG", "-fvisibility-inlines-hidden", *openmp),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}",
        *("-isystem", str(torch.root / "include")),
        *("-isystem", str(torch.root / "include/torch/csrc/api/include")),
    ]
    objects = [_cxx_step(cxx, source, csrc, work, flags) for source in _sources(csrc / "binding", "*.cpp")]
    # Empty libraries of the right names put torch's into NEEDED, and the headers alone are enough to build.
    stubs = [
        Step(
            [*cxx, "-shared", "-x", "c++", os.devnull, "-o", str(stub), f"-Wl,-soname,{stub.name}"],
            output=stub,
            inputs=[],
        )
        for stub in (work / f"lib{name}.so" for name in _TORCH_LIBRARIES)
    ]
    inputs = [step.output for step in (*objects, *stubs)]
    link = [*cxx, "-shared", "-s", "-o", str(output), "-Wl,--no-as-needed", *map(str, inputs), "-ldl"]
    return Library([*objects, *stubs], Step(link, output, inputs))


def cpu_library(csrc: Path, work: Path, output: Path) -> Library:
    """libfast_embedding_cpu.so: the kernels choose their instruction set at run time."""
    cxx = _cxx()
    sources = [*_sources(csrc / "cpu", "*.cpp"), csrc / "plan.cpp"]
    objects = [_cxx_step(cxx, source, csrc, work, ["-std=c++17", "-O3"]) for source in sources]
    inputs = [step.output for step in objects]
    link = [*cxx, "-shared", "-s", "-o", str(output), *map(str, inputs), "-Wl,-z,defs"]
    return Library(objects, Step(link, output, inputs))


def cuda_library(csrc: Path, architectures: list[str], work: Path, output: Path) -> Library:
    """libfast_embedding_cuda.so with code for each architecture ("90") and PTX of the last; no GPU is needed."""
    cxx = _cxx()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise BuildError("the CUDA library needs nvcc on PATH")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    listed = " ".join([*(f"sm_{arch}" for arch in architectures), f"compute_{architectures[-1]}"])
    # No NDEBUG: the kernels' asserts are what stops a bad index.
    flags = [
        "-std=c++17",
        "-O3",
        *codes,
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
        f'-DFE_CUDA_ARCHITECTURES="{listed}"',
    ]
    objects = []
    for source in _sources(csrc / "cuda", "*.cu"):
        target = work / f"{source.name}.o"
        depfile = work / f"{source.name}.d"
        command = [*_ccache(), nvcc, *flags, f"-I{csrc / 'include'}", "-MMD", "-MF", str(depfile), "-c", str(source)]
        objects.append(Step([*command, "-o", str(target)], target, [source], depfile))
    objects.append(_cxx_step(cxx, csrc / "plan.cpp", csrc, work, ["-std=c++17", "-O3"]))
    inputs = [step.output for step in objects]
    # The runtime is torch's own, already in the process; the paths serve who loads the library without torch.
    rpath = ":".join(_CUDA_RPATHS)
    link = [nvcc, "-shared", "-cudart", "shared", "-cudadevrt", "none", "-o", str(output), *map(str, inputs)]
    # CUB's NVTX opens a library; before glibc 2.34 dlopen is in one of its own.
    link += ["-ldl", "-Xlinker", f"-rpath={rpath}", "-Xlinker", "-z,defs", "-Xlinker", "-s"]
    return Library(objects, Step(link, output, inputs))


def nvcc_version() -> str | None:
    """ "13.0" of the nvcc on PATH, None without one."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", banner)
    return match[1] if match else None


def _sources(directory: Path, pattern: str) -> list[Path]:
    sources = sorted(directory.glob(pattern))
    if not sources:
        raise BuildError(f"no sources in {directory}")
    return sources


def _cxx_step(cxx: list[str], source: Path, csrc: Path, work: Path, flags: list[str]) -> Step:
    target = work / f"{source.name}.o"
    depfile = work / f"{source.name}.d"
    command = [*_ccache(), *cxx, *flags, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{csrc / 'include'}"]
    return Step(
        [*command, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(target)], target, [source], depfile
    )


def _cxx() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of g++, c++ and clang++."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["g++"], ["c++"], ["clang++"]]
    for candidate in candidates:
        if shutil.which(candidate[0]):
            return candidate
    raise BuildError(
        f"no C++ compiler: CXX={named} is not to be found"
        if named
        else "no C++ compiler found: install g++ (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
        "conda: conda install gxx), or name one in CXX"
    )


def _is_clang(cxx: list[str]) -> bool:
    banner = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=False).stdout
    return "clang" in banner


def _ccache() -> list[str]:
    return ["ccache"] if shutil.which("ccache") else []
