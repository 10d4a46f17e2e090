"""The kernels of a CUDA library by name: those that it has, and those that have run."""

import ctypes
import re
import struct
from pathlib import Path

import torch


def section(file: bytes, wanted: bytes) -> bytes:
    """What a section of a 64-bit little-endian ELF file holds."""
    (at,) = struct.unpack_from("<Q", file, 40)
    size, count, of_names = struct.unpack_from("<3H", file, 58)
    headers = [struct.unpack_from("<2I4Q", file, at + i * size) for i in range(count)]  # name, -, -, -, offset, bytes
    names = headers[of_names][4]
    (found,) = [header for header in headers if file.startswith(wanted + b"\0", names + header[0])]
    return file[found[4] : found[4] + found[5]]


def demangle(name: str) -> str:
    """As the profiler does it, so that names can be compared."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.__cxa_demangle.restype = ctypes.c_void_p
    address = library.__cxa_demangle(name.encode(), None, None, None)
    if address is None:  # not mangled
        return name
    demangled = ctypes.string_at(address).decode()
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    free(address)
    return demangled


def kernels_of(library: Path) -> set[str]:
    """All kernels and template instances, for whichever architecture, demangled.

    They are registered by their mangled names, strings among the constants. The functions of the host have their names
    elsewhere, in the table of symbols.
    """
    constants = section(library.read_bytes(), b".rodata")
    return {demangle(name.decode()) for name in re.findall(rb"(?<![^\0])_Z\w+(?=\0)", constants)}


def kernels_in(profile: torch.profiler.profile) -> set[str]:
    """All kernels that ran on the GPU, torch's among them, demangled."""
    cuda = torch.autograd.DeviceType.CUDA
    return {demangle(event.name) for event in profile.events() if event.device_type == cuda}
