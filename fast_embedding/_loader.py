"""Loads the native libraries at first use and remembers why one can't be loaded.

The package holds one binding per torch minor and C++ ABI. For another torch the binding's source, which the package
holds too, is compiled once into a cache folder. Nothing here touches a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from . import _build

_PACKAGE = Path(__file__).resolve().parent
_LIBRARIES = _PACKAGE / "lib"

# The oldest whose C++ interface the binding is written for.
_OLDEST_TORCH = "2.4"

_logger = logging.getLogger("fast_embedding")


@dataclass
class _Part:
    """A library: where it stands if it is loaded, or else why it is not."""

    path: Path | None = None
    reason: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        path = None if self.path is None else str(self.path)
        return {"loaded": self.path is not None, "path": path, "reason": self.reason, **self.details}


@dataclass
class _State:
    """All that was loaded. Without a binding there are no `devices` and no `library`, the handle of the binding."""

    binding: _Part
    devices: dict[str, _Part] = field(default_factory=dict)
    library: ctypes.CDLL | None = None


_state: _State | None = None
_lock = threading.Lock()


def native_platform() -> bool:
    """Whether this platform has native libraries at all; macOS and Windows run on PyTorch's own operators."""
    return sys.platform == "linux"


def load() -> None:
    """Load the binding and the kernel libraries, once.

    Raises:
        RuntimeError: there is no binding for this torch; the message says what the package was built for, what is
            there, and what to do. A device without kernels is no error before it is used: see :func:`require`.
    """
    binding = (_state or _load_once()).binding
    if binding.reason is not None:
        raise RuntimeError(binding.reason)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_while_tracing(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result(), which would import all of torch._dynamo: torch.compile calls the
    function while it traces, and its result is a constant of the graph."""
    # Dynamo of torch 2.4 binds the result to a global variable of that name in the module that it compiles.
    name = f"_fast_embedding_constant_{function.__name__}"
    function.__code__ = function.__code__.replace(co_name=name)
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_while_tracing
def load_while_tracing() -> None:
    """:func:`load` for code that torch.compile traces."""
    load()


def require(device_type: str) -> None:
    """Load the libraries and see that there are kernels for "cpu" or "cuda".

    Raises:
        RuntimeError: as :func:`load`, or there are no kernels for the device, with the same kind of message.
    """
    load()
    assert _state is not None
    part = _state.devices.get(device_type)
    if part is None:
        raise RuntimeError(f"fast-embedding has kernels for cpu and cuda, not for {device_type}")
    if part.reason is not None:
        raise RuntimeError(part.reason)


def accelerate_aten() -> None:
    """Have aten::embedding and its dense backward run our kernels, until as many calls of :func:`leave_aten_alone`.

    Raises:
        RuntimeError: as :func:`load`, or the operators cannot be replaced in this torch.
    """
    load()
    assert _state is not None
    assert _state.library is not None
    error = _state.library.fe_binding_enable(int(torch.version.cuda is not None))
    if error is not None:
        raise RuntimeError(f"fast-embedding cannot replace kernels of torch {torch.__version__}: {error.decode()}")


def leave_aten_alone() -> None:
    """Take back one call of :func:`accelerate_aten`."""
    assert _state is not None
    assert _state.library is not None
    _state.library.fe_binding_disable()


def status() -> dict[str, Any]:
    """What is installed, what of it was loaded and why not the rest; for people and bug reports. Loads, never raises.

    Returns:
        Plain data: "version", "distributions" (name to version), "conflict" (text or None), "built" (what the build
        recorded, or None), "torch", "platform", "bindings" (the names of those that the package holds), and for each
        of "binding", "cpu" and "cuda" a dict of "loaded", "path", "reason" (None if loaded) and details.
    """
    state = _state or _load_once()
    absent = _Part(reason=state.binding.reason)
    return {
        "version": _version(),
        "distributions": _distributions(),
        "conflict": _conflict(),
        "built": _build_info(),
        "platform": {"system": platform.platform(), "machine": platform.machine(), "python": platform.python_version()},
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cxx11_abi": _cxx11_abi(),
        },
        "bindings": _prebuilt(),
        "binding": state.binding.describe(),
        "cpu": state.devices.get("cpu", absent).describe(),
        "cuda": state.devices.get("cuda", absent).describe(),
    }


def _load_once() -> _State:
    global _state
    with _lock:
        if _state is None:
            _state = _load_all()
        return _state


def _load_all() -> _State:
    binding = _load_binding()
    if binding.path is None:
        return _State(binding)
    library = ctypes.CDLL(str(binding.path))
    library.fe_binding_load.restype = ctypes.c_char_p
    library.fe_binding_refuse.restype = None
    library.fe_binding_enable.restype = ctypes.c_char_p
    library.fe_binding_disable.restype = None
    devices = {"cpu": _load_cpu(library), "cuda": _load_cuda(library)}
    for device_type, part in devices.items():
        if part.reason is not None:
            library.fe_binding_refuse(device_type.encode(), part.reason.encode())
    return _State(binding, devices, library)


# ---- The binding ----------------------------------------------------------------------------------------------------


def _load_binding() -> _Part:
    if not native_platform():
        return _Part(reason=f"fast-embedding has native libraries for Linux only; this is {sys.platform}")
    installed = _build.Torch(Path(torch.__file__).parent, torch.__version__, _cxx11_abi())
    if not _new_enough(torch.__version__):
        return _Part(
            reason=f"fast-embedding {_version()} needs torch {_OLDEST_TORCH} or newer; you have torch "
            f"{torch.__version__}; pip install 'torch>={_OLDEST_TORCH}'"
        )
    prebuilt = _LIBRARIES / installed.binding_name
    problem = ""
    if installed.is_release and prebuilt.exists():
        try:
            torch.ops.load_library(str(prebuilt))
            return _Part(prebuilt, details={"origin": "prebuilt"})
        except OSError as error:
            problem = f" {prebuilt.name} does not load: {error}."
    try:
        compiled = _compiled_binding(installed)
        torch.ops.load_library(str(compiled))
        return _Part(compiled, details={"origin": "compiled here"})
    except (OSError, _build.BuildError) as error:
        have = ", ".join(_prebuilt()) or "no torch in particular"
        return _Part(
            reason=f"fast-embedding {_version()} was built for {have}; you have torch {torch.__version__} "
            f"(C++ ABI {int(_cxx11_abi())}).{problem} Compiling a binding for it failed: {error}{_conflict_note()}"
        )


def _prebuilt() -> list[str]:
    """Names of the bindings that the package holds, by torch minor."""
    names = [path.stem for path in _LIBRARIES.glob("torch*.so")]
    return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _compiled_binding(installed: _build.Torch) -> Path:
    """The binding compiled for this very torch, from the cache if it was compiled before. BuildError, OSError."""
    csrc = next((path for path in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if (path / "binding").is_dir()), None)
    if csrc is None:
        raise _build.BuildError(f"the binding's source is missing from {_PACKAGE}; reinstall the package")
    digest = hashlib.sha256()
    for source in sorted(path for path in csrc.glob("*/*") if path.parent.name in ("binding", "include")):
        digest.update(source.read_bytes())
    name = f"torch{installed.version}_abi{int(installed.cxx11_abi)}_{platform.machine()}_{digest.hexdigest()[:12]}.so"
    folder = _cache() / _version()
    output = folder / name
    if output.exists():
        return output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{name}.lock").open("w")
    except OSError as error:
        raise _build.BuildError(f"{error}; FAST_EMBEDDING_CACHE=FOLDER puts the result elsewhere") from error
    # Every rank of a job comes here at once: one compiles, the others wait for it.
    with lock, tempfile.TemporaryDirectory(dir=folder) as work:
        _hold(lock)
        if not output.exists():
            made = Path(work) / name
            library = _build.binding(csrc, installed, Path(work), made)
            _logger.warning("compiling the binding for torch %s, once (about 20 s)", installed.version)
            _build.build([library])
            os.replace(made, output)
    return output


def _cache() -> Path:
    named = os.environ.get("FAST_EMBEDDING_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fast-embedding"


def _hold(lock: IO[str]) -> None:
    """Wait for the file's lock and keep it until the file is closed."""
    import fcntl  # not on Windows

    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        # A file system without locks. The rename is atomic, so the worst is a binding compiled twice.
        _logger.debug("no lock on %s", lock.name)


def _new_enough(version: str) -> bool:
    return tuple(map(int, version.split(".")[:2])) >= tuple(map(int, _OLDEST_TORCH.split(".")))


def _cxx11_abi() -> bool:
    return bool(torch.compiled_with_cxx11_abi())


# ---- The kernels ----------------------------------------------------------------------------------------------------


def _load_cpu(binding: ctypes.CDLL) -> _Part:
    path = _LIBRARIES / "libfast_embedding_cpu.so"
    error = binding.fe_binding_load(b"cpu", str(path).encode())
    if error is not None:
        return _Part(
            reason=f"fast-embedding {_version()} lost its CPU kernels ({error.decode()}); reinstall the package"
        )
    return _Part(path)


def _load_cuda(binding: ctypes.CDLL) -> _Part:
    if torch.version.hip is not None:
        return _Part(reason="fast-embedding has no kernels for ROCm; PyTorch's own operators run there")
    if torch.version.cuda is None:
        return _Part(reason=f"torch {torch.__version__} is built without CUDA")
    have = f"you have torch {torch.__version__} (CUDA {torch.version.cuda})"
    wanted = _wanted_distribution(torch.version.cuda)
    advice = f"{f'pip install {wanted}, or ' if wanted else ''}build from source with nvcc on PATH"
    path = _LIBRARIES / "libfast_embedding_cuda.so"
    info = _build_info() or {}
    if not path.exists():
        why = info.get("cuda_missing")
        return _Part(
            reason=f"fast-embedding {_version()} was built for the CPU alone{f' ({why})' if why else ''}; {have}; "
            f"{advice}{_conflict_note()}"
        )
    built = info.get("cuda") or "of unknown version"
    if built.split(".")[0] != torch.version.cuda.split(".")[0]:
        return _Part(
            reason=f"fast-embedding {_version()} was built for CUDA {built}; {have}; {advice}{_conflict_note()}"
        )
    error = binding.fe_binding_load(b"cuda", str(path).encode())
    if error is not None:
        if b"libcudart" in error and info.get("cuda_requirement"):
            advice = f"pip install '{info['cuda_requirement']}', or {advice}"
        return _Part(
            reason=f"fast-embedding {_version()} was built for CUDA {built}; {have}; its kernels do not load "
            f"({error.decode()}); {advice}{_conflict_note()}"
        )
    library = ctypes.CDLL(str(path))
    library.fe_cuda_architectures.restype = ctypes.c_char_p
    details = {
        "compiled_version": _dotted(library.fe_cuda_compiled_version()),
        "runtime_version": _dotted(library.fe_cuda_runtime_version()),
        "architectures": library.fe_cuda_architectures().decode().split(),
    }
    return _Part(path, details=details)


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability has code among `architectures`, "sm_90" or, for the driver to compile,
    "compute_90"."""
    major, minor = capability
    for architecture in architectures:
        kind, number = architecture.split("_")
        built = divmod(int(number), 10)
        # A GPU runs what was compiled for its own major and no newer minor; PTX serves all that is newer.
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return False


def _dotted(version: int) -> str:
    """CUDA's integer for a version: 13000 is 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _wanted_distribution(cuda: str) -> str | None:
    """The variant for torch's CUDA: the newest of its major version that is not newer, or else the oldest of it."""
    wanted = tuple(map(int, cuda.split(".")[:2]))
    variants = [tuple(map(int, variant.split("."))) for variant in (_build_info() or {}).get("cuda_variants", [])]
    same_major = [variant for variant in variants if variant[0] == wanted[0]]
    if not same_major:
        return None
    major, minor = max((variant for variant in same_major if variant <= wanted), default=min(same_major))
    return f"fast-embedding-cu{major}{minor}"


# ---- What is installed ----------------------------------------------------------------------------------------------


def _version() -> str:
    from . import __version__

    return __version__


def _build_info() -> dict[str, Any] | None:
    try:
        info: dict[str, Any] = json.loads((_PACKAGE / "_build_info.json").read_text(encoding="utf-8"))
        return info
    except FileNotFoundError:
        return None


def _distributions() -> dict[str, str]:
    """The installed distributions that hold this package, name to version; all but one were overwritten."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if re.fullmatch(r"fast-embedding(-cu\d+)?", name):
            found[name] = distribution.version
    return found


def _conflict() -> str | None:
    names = sorted(_distributions())
    if len(names) < 2:
        return None
    return (
        f"{' and '.join(names)} are installed together and overwrite each other's files: "
        f"pip uninstall {' '.join(names)}, then install one of them"
    )


def _conflict_note() -> str:
    conflict = _conflict()
    return "" if conflict is None else f". Note: {conflict}"
