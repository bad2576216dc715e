"""The environment that a run's bits depend on: processes, threads, processor and library versions.

A run may resume in another environment. Sums are then formed in another order, and the result is equal only to
rounding.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version

import torch

from yeonma.messages import tr
from yeonma.packages import version_of


def environment(processes: int, device: torch.device) -> dict[str, str | int]:
    """The environment that checkpoints record. Processors are equal if PyTorch picks the same routines."""
    on_gpu = device.type == "cuda"
    return {
        "processes": processes,
        "threads of a process": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        **versions(),
        **({"triton": version_of("triton") or "none"} if on_gpu else {}),
    }


def versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch", "transformers", "peft")}


def environment_change(
    before: Mapping[str, str | int], now: Mapping[str, str | int], dropout: bool
) -> str | None:
    """A line that lists the changes and their effect; None if there are none. Entries that an older checkpoint does not
    record are ignored."""
    changes = [
        tr("{name} was {before} and is now {now}", name=name, before=before[name], now=now[name])
        for name in now
        if name in before and before[name] != now[name]
    ]
    if not changes:
        return None
    effect = tr(
        "every step has the same rows, but the result equals that of an uninterrupted run only to rounding"
    )
    dropout_effect = tr("; dropout draws other numbers") if dropout and "processes" in changes[0] else ""
    return f"{', '.join(changes)}: {effect}{dropout_effect}"
