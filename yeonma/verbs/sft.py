"""`yeonma sft`: rows and a template in, an adapter folder out."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from yeonma.configure import group_of, to_yaml
from yeonma.settings import RunSettings


def run(settings: Mapping[type, object]) -> int:
    """Train in this process, or in the processes that `nproc` asks for. Under torchrun, torchrun's count holds."""
    processes = group_of(settings, RunSettings).nproc
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        return _start_processes(settings, processes)
    from yeonma.train.run import run_sft

    run_sft(settings)
    return 0


def _start_processes(settings: Mapping[type, object], processes: int) -> int:
    """The same run under torchrun, with the settings in a file and the cores shared out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // processes)), **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "settings.yaml"
        config.write_text(to_yaml(*settings.values()), encoding="utf-8")
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
        return subprocess.call([*torchrun, "-m", "yeonma", "sft", "--config", str(config)], env=environment)
