"""What a result depends on besides the code: device, driver, versions, commit. No paths and no host names."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import fast_embedding

# Elsewhere than on Linux; enough for most shapes of the grid.
_MEMORY_WHERE_UNKNOWN = 4 << 30


def describe(device: torch.device) -> dict[str, object]:
    """The environment of a run, for its JSON; ``None`` where something could not be found out."""
    record: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fast_embedding": fast_embedding.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "device": device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load": load(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "driver": driver_version(),
        }
    return record


def load() -> float | None:
    """Processes that wanted to run in the last minute, on average; above the number of CPUs, times are unreliable."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def commit() -> str | None:
    """The commit of the clone that the command runs in; ``FAST_EMBEDDING_COMMIT`` where there is no clone."""
    named = os.environ.get("FAST_EMBEDDING_COMMIT")
    # The package is usually installed from a clone, not run in it, so the working directory is asked. It might be a
    # clone of something else.
    if named or not Path("csrc/include/fast_embedding.h").is_file():
        return named
    return _output_of("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def cpu_name() -> str | None:
    """The model of the CPU, as the system names it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or None


def driver_version() -> str | None:
    """The version of NVIDIA's kernel driver."""
    try:
        match = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        match = None
    if match:
        return match[0]
    answer = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


def available_bytes(device: torch.device) -> int:
    """Memory that a benchmark may use on this device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_read_memory("/proc/meminfo", r"MemAvailable:\s+(\d+) kB", 1024)]
    group_limit = _read_memory("/sys/fs/cgroup/memory.max", r"(\d+)", 1)
    group_use = _read_memory("/sys/fs/cgroup/memory.current", r"(\d+)", 1)
    if group_limit is not None and group_use is not None:
        limits.append(group_limit - group_use)
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else _MEMORY_WHERE_UNKNOWN


def _read_memory(file: str, pattern: str, unit: int) -> int | None:
    try:
        match = re.search(pattern, Path(file).read_text())
    except OSError:
        return None
    return int(match[1]) * unit if match else None


def _output_of(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
