"""What a run's numbers depend on beside its settings and data: processes, threads, processor and libraries.

A run may go on elsewhere. Then the same sums are done in another order, and the result is equal to rounding only.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch


def environment(processes: int, device: torch.device) -> dict[str, str | int]:
    """Kept in every checkpoint. Processors count as the same where PyTorch chooses the same routines for them."""
    on_gpu = device.type == "cuda"
    return {
        "processes": processes,
        "threads of a process": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        **versions(),
        **({"triton": _version_or_none("triton")} if on_gpu else {}),
    }


def _version_or_none(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch", "transformers", "peft")}


def moved(before: Mapping[str, str | int], now: Mapping[str, str | int], dropout: bool) -> str | None:
    """One line on what is not as it was, and what follows; None where all is. A checkpoint of a version of Yeonma that
    kept nothing of it says nothing."""
    changes = [
        f"{name} was {before[name]} and is now {now[name]}"
        for name in now
        if name in before and before[name] != now[name]
    ]
    if not changes:
        return None
    equal = "the rows of the steps are the same, the result equals the uninterrupted run's only to rounding"
    other = "; dropout draws other numbers" if dropout and "processes" in changes[0] else ""
    return f"{', '.join(changes)}: {equal}{other}"
