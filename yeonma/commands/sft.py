"""`yeonma sft`: rows and a template in, an adapter folder out."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from yeonma.config.parse import to_yaml
from yeonma.config.settings import RunConfig
from yeonma.errors import LOST, gather
from yeonma.run_folder.lock import check_unlocked
from yeonma.train.interrupt import BEGAN, REASONS, Stopped, stoppable
from yeonma.train.preflight import preflight

ENVIRONMENT = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
"""Seconds that torchrun gives its processes to end after a signal; its own 30 may be too few for a step and a save."""


def run(config: RunConfig, *, as_command: bool = True) -> int:
    """Train in this process, or in the processes that `nproc` asks for. Under torchrun, torchrun's count holds.

    Raises UserError for whatever can be known to be wrong without torch before that is imported, and Stopped where a
    signal or `time_limit` ended the run. `as_command`: see `stoppable`.
    """
    return train("sft", config, as_command=as_command)


def train(verb: str, config: RunConfig, *, as_command: bool = True) -> int:
    """What `run` does, for any verb that trains."""
    run_settings = config.run
    several = run_settings.nproc > 1 and "WORLD_SIZE" not in os.environ
    # the others need not look: where they come so far, the first of them may be the one that holds it
    first = os.environ.get("RANK", "0") == "0"
    unlocked = [partial(check_unlocked, run_settings.output_dir)] if first else []
    gather(partial(preflight, config), *unlocked)
    # torchrun's own handlers pass signals on to the processes that it started; a second one too.
    with stoppable(run_settings.time_limit, as_command=as_command and not several) as stop:
        if several:
            with tempfile.TemporaryDirectory() as folder:
                settings = Path(folder) / "settings.yaml"
                settings.write_text(to_yaml(config), encoding="utf-8")
                return _start_processes(run_settings.nproc, ["-m", "yeonma", verb, "--config", str(settings)])
        from yeonma.train.run import run_training

        run_training(config, stop)
    return 0


def _start_processes(processes: int, command: list[str]) -> int:
    """Run a command of Python's under torchrun, and return the exit status of the process that failed first, or 0.

    torchrun ends the others then. Its own report is a traceback; what it says is said here in one line.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    message = "stopped; what is saved is kept: run the same command to continue"
    try:
        with _inherited(
            OMP_NUM_THREADS=_cores_of_each(processes), **ENVIRONMENT, **{BEGAN: str(time.time())}
        ):
            run(parse_args(["--standalone", f"--nproc_per_node={processes}", *command]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (2, LOST):  # which that process has told
            return int(failure.exitcode)
        if failure.exitcode in REASONS:
            raise Stopped(message, failure.exitcode, told=True) from None
        print(f"yeonma: process {rank} ended with status {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as signal:
        raise Stopped(message, 128 + int(signal.sigval), told=True) from None
    return 0


def _cores_of_each(processes: int) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return str(max(1, cores // processes))


@contextmanager
def _inherited(**variables: str) -> Iterator[None]:
    """Environment variables of the processes that are started within; those that are set already stay as they are."""
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]
