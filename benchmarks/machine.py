"""What a measurement was made on, and what the process uses: from /proc, so on Linux alone."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MATRIX = 2048
REPEATS = 7


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    system = f"{platform.system()} {platform.release()}"
    return {"cpu": cpu, "cores": cores(), "memory_bytes": memory_bytes, "system": system}


def gpu() -> dict[str, Any] | None:
    """The first CUDA device, its driver and the CUDA version that torch was built with; None without a device."""
    import torch

    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "name": about.name,
        "memory_bytes": about.total_memory,
        "capability": [about.major, about.minor],
        "multiprocessors": about.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


def own_bytes(field: str) -> int:
    """A memory field of /proc/self/status: VmHWM (the highest resident size so far), VmRSS, RssAnon."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} in /proc/self/status")


def matrix_rate() -> float:
    """Floating point operations a second of float32 `torch.mm`, the best of several."""
    import torch

    return _rate(torch.mm)


def frozen_rate() -> float:
    """The same of the routine that Yeonma multiplies frozen weights by; on some machines it is another one."""
    from yeonma.model.kernels.linear import product

    return _rate(product)


def _rate(multiply: Callable[[Any, Any], Any]) -> float:
    import torch

    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    seconds = []
    for _ in range(REPEATS + 1):  # the first is warm-up
        started = time.perf_counter()
        multiply(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * MATRIX**3 / min(seconds[1:])
