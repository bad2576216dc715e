"""What this machine has left for a run: processor, memory, disks, GPUs. No torch here, which would take seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from time import monotonic

from yeonma.files import free_bytes
from yeonma.messages import counted, tr
from yeonma.platforms import free_host_memory, usable_cores
from yeonma.shown import size_text
from yeonma.studio.roots import Roots

GPU_SECONDS = 5.0
"""How long nvidia-smi may take, and how long its answer counts."""
_FIELDS = "name,memory.free,memory.total,utilization.gpu"


def machine_lines(roots: Roots) -> Iterator[tuple[str, str]]:
    """(subject, text) of each part."""
    free, whole = free_host_memory(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield tr("processor"), counted(usable_cores(), "core")
    yield (
        tr("memory"),
        tr("{free} of {whole} free", free=size_text(free), whole=size_text(whole))
        if free is not None
        else tr("memory unknown"),
    )
    gpus = _gpus(int(monotonic() // GPU_SECONDS))
    for number, (name, free_mib, whole_mib, busy) in enumerate(gpus):
        yield (
            tr("GPU {number}", number=number),
            tr(
                "{name}, {free} of {whole} free, {busy}% busy",
                name=name,
                free=size_text(int(free_mib) << 20),
                whole=size_text(int(whole_mib) << 20),
                busy=busy,
            ),
        )
    if not gpus:
        yield tr("GPU"), tr("none that nvidia-smi finds")
    for folder in roots.folders:
        yield tr("disk"), tr("{folder}: {free} free", folder=folder, free=size_text(free_bytes(folder)))


@lru_cache(maxsize=1)
def _gpus(moment: int) -> list[list[str]]:
    """The values of `_FIELDS` of each GPU; none without the driver's own tool. `moment` changes when they are old."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GPU_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return []
    rows = [[value.strip() for value in line.rsplit(",", 3)] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == 4 and row[1].isdecimal() and row[2].isdecimal()]
