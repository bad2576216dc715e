"""`yeonma sft`: rows and a template in, an adapter folder out."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from yeonma.configure import group_of, to_yaml
from yeonma.errors import gather
from yeonma.settings import RunSettings
from yeonma.train.lock import check_unlocked
from yeonma.train.preflight import preflight


def run(settings: Mapping[type, object]) -> int:
    """Train in this process, or in the processes that `nproc` asks for. Under torchrun, torchrun's count holds.

    Raises UserError for whatever can be known to be wrong without torch before that is imported.
    """
    return train("sft", settings)


def train(verb: str, settings: Mapping[type, object]) -> int:
    """What `run` does, for any verb that trains."""
    asked = group_of(settings, RunSettings)
    # the others need not look: where they come so far, the first of them may be the one that holds it
    first = os.environ.get("RANK", "0") == "0"
    unlocked = [partial(check_unlocked, asked.output_dir)] if first else []
    gather(partial(preflight, settings), *unlocked)
    processes = asked.nproc
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "settings.yaml"
            config.write_text(to_yaml(*settings.values()), encoding="utf-8")
            return _start_processes(processes, ["-m", "yeonma", verb, "--config", str(config)])
    from yeonma.train.run import run_training

    run_training(settings)
    return 0


def _start_processes(processes: int, command: list[str]) -> int:
    """Run a command of Python's under torchrun, and return the exit status of the process that failed first, or 0.

    torchrun ends the others then. Its own report is a traceback; what it says is said here in one line.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with _shared_cores(processes):
            run(parse_args(["--standalone", f"--nproc_per_node={processes}", *command]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == 2:  # a mistake of the user's, which that process has told
            return 2
        print(f"yeonma: process {rank} ended with status {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as signal:
        return 128 + int(signal.sigval)
    return 0


@contextmanager
def _shared_cores(processes: int) -> Iterator[None]:
    """Each process gets its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = "OMP_NUM_THREADS" in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    try:
        yield
    finally:
        if not chosen:
            del os.environ["OMP_NUM_THREADS"]
