"""`yeonma sft`: supervised fine-tuning, in this process or in several."""

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
from yeonma.messages import tr
from yeonma.model.device_check import is_certainly_cpu
from yeonma.model.quantization import check_optimizer_device
from yeonma.platforms import usable_cores
from yeonma.run_folder.lock import check_unlocked
from yeonma.streams import log_line, unfailing_streams
from yeonma.train.interrupt import REASONS, START_TIME, Stopped, heeded_signals, stoppable
from yeonma.train.preflight import preflight, with_adapters_lora

ENVIRONMENT = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
"""torchrun kills its processes so many seconds after a signal. Its default of 30 may be too short for a step and a
save."""


def run(config: RunConfig, *, as_command: bool = True) -> int:
    """Trains in this process, or in `nproc` processes. Under torchrun, `nproc` has no effect. Returns the exit status.

    Raises UserError, before torch is imported if possible, and Stopped if a signal or `time_limit` ended the run.
    `as_command`: see `stoppable`.
    """
    return train("sft", config, as_command=as_command)


def train(verb: str, config: RunConfig, *, as_command: bool = True) -> int:
    """As `run`, for any verb that trains."""
    run_settings = config.run
    start_processes = run_settings.nproc > 1 and "WORLD_SIZE" not in os.environ
    # rank 0 only: by the time the other ranks get here, rank 0 of this run may hold the lock
    first = os.environ.get("RANK", "0") == "0"
    lock_checks = [partial(check_unlocked, run_settings.output_dir)] if first else []
    gather(partial(preflight, config), partial(_check_optimizer_here, config), *lock_checks)
    config = with_adapters_lora(config)
    # torchrun's own handlers forward every signal to the processes that it started
    with (
        unfailing_streams(as_command=as_command),
        stoppable(run_settings.time_limit, as_command=as_command and not start_processes) as stop,
    ):
        if start_processes:
            with tempfile.TemporaryDirectory() as folder:
                settings = Path(folder) / "settings.yaml"
                settings.write_text(to_yaml(config), encoding="utf-8")
                return _start_processes(run_settings.nproc, ["-m", "yeonma", verb, "--config", str(settings)])
        from yeonma.inspect.start_verdict import log_verdict
        from yeonma.train.run import run_training

        run_training(config, stop, *([] if config.reward else [log_verdict]))
    return 0


def _check_optimizer_here(config: RunConfig) -> None:
    if is_certainly_cpu(config.model.device):
        check_optimizer_device(config.step.optimizer, "cpu")


def _start_processes(processes: int, command: list[str]) -> int:
    """Runs Python with these arguments under torchrun. Returns 0, or the exit status of the process that failed first.

    torchrun then ends the other processes. One line replaces the traceback that it would print.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # in a notebook, whose variables ask for colours: lines rather than a live line, which cannot move there
    display = {} if sys.stdout.isatty() else {"TTY_INTERACTIVE": "0"}
    message = tr("stopped; saved checkpoints are kept: run the same command to continue")
    try:
        with _inherited(
            OMP_NUM_THREADS=_cores_per_process(processes),
            **ENVIRONMENT,
            **display,
            **{START_TIME: str(time.time())},
        ):
            options = [f"--nproc_per_node={processes}", f"--signals_to_handle={heeded_signals()}"]
            run(parse_args(["--standalone", *options, *command]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (2, LOST):  # that process has printed the reason
            return int(failure.exitcode)
        if failure.exitcode in REASONS:
            raise Stopped(message, failure.exitcode, printed=True) from None
        log_line(tr("process {rank} ended with status {exitcode}", rank=rank, exitcode=failure.exitcode))
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as signal:
        raise Stopped(message, 128 + int(signal.sigval), printed=True) from None
    return 0


def _cores_per_process(processes: int) -> str:
    return str(max(1, usable_cores() // processes))


@contextmanager
def _inherited(**variables: str) -> Iterator[None]:
    """Sets environment variables for processes started within the block, unless they are already set."""
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]
