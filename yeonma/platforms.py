"""Which systems Yeonma runs on: Linux, macOS on the CPU, and Windows through WSL2."""

from __future__ import annotations

import os
from pathlib import Path

from yeonma.errors import UserError
from yeonma.messages import tr


def check_platform() -> None:
    """Raises UserError on Windows itself, where files, signals and processes work otherwise."""
    if os.name == "nt":
        cure = tr("use Linux inside Windows (WSL2): run `wsl --install`, and install Yeonma there")
        raise UserError(tr("native Windows is not supported"), cure=cure)


def usable_cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_host_memory() -> int | None:
    """Bytes of memory that this process can still allocate; None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return None
    return min([available, *cgroup_free_bytes()])


def cgroup_free_bytes(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What a container's memory limit (cgroup v2) leaves; empty without a limit."""
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such file, or "max"
        return []
    return [limit - used]
