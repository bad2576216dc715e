"""Which systems Yeonma runs on: Linux, macOS on the CPU, and Windows through WSL2."""

from __future__ import annotations

import os

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
